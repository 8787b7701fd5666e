"""A plan counts the fits of a study, and what they take on a machine follows from its places and its price."""

from __future__ import annotations

import json
import math
from datetime import date
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from softseg_dist import Dice, GivenSplits, KFold, MonteCarlo, Phantom, Recipe, Search, Study, TuneEach
from softseg_dist.cli.main import app
from softseg_dist.data.splits import Split
from softseg_dist.engine.plan import Machine, Plan, load_prices, offers, places_on, plan_study, write_splits
from softseg_dist.errors import UserError
from softseg_dist.record.ledger import CandidateRecord, Ledger, json_of
from softseg_dist.study import Optim, Resources, factorial
from softseg_dist.study_file import load_study
from softseg_dist.training.task import FitResult

PRICES = Path(__file__).parents[3] / "cluster/prices.yaml"
CPU = Machine(name="c", provider="p", region="r", cpus=16, memory_gb=32, on_demand_usd=0.8, spot_usd=0.2)
GPU = CPU.replace(name="g", cpus=8, gpus=1, gpu="L4", on_demand_usd=1.0, spot_usd=0.5)
BASE = Recipe(optim=Optim(epochs=10))


def propose(trial) -> Recipe:  # type: ignore[no-untyped-def]
    return BASE.replace(loss=Dice(smooth=trial.suggest_float("smooth", 0.1, 1)), optim=Optim(epochs=40))


def study(**changes: object) -> Study:
    candidates = factorial(BASE, label=("hard", "soft"))
    fields = {"name": "s", "question": "?", "data": Phantom(subjects=10), "splits": MonteCarlo(count=3)}
    return Study(**fields | {"candidates": candidates} | changes)


def finished_run(folder: Path, of: Study, splits: tuple[Split, ...], seconds: dict[str, float]) -> str:
    """A run folder in which every candidate has finished its first split after so many seconds, and failed its second."""
    ledger = Ledger(folder)
    ledger.open_study(of, splits)
    for number, (name, duration_s) in enumerate(seconds.items()):
        recipe = of.candidates[name]
        record = CandidateRecord(name=name, origin="fixed", number=number, recipe=json_of(recipe))
        ledger.write_candidate(record)
        done = {"candidate": name, "epochs": recipe.optim.epochs, "duration_s": duration_s}
        ledger.write_result(FitResult(split=0, state="finished", score=0.5, **done))
        ledger.write_result(FitResult(split=1, state="failed", **done | {"duration_s": 1e6}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, 2 * 3),
        ({"search": Search(propose, trials=5)}, (2 + 5) * 3),
        ({"candidates": {}, "search": Search(propose, trials=5)}, 5 * 3),
        ({"splits": KFold(folds=4)}, 2 * 4),
        ({"tune_each": TuneEach(trials=4, splits=2)}, 2 * (3 + 4 * 2)),
        ({"tune_each": TuneEach(trials=4, splits=2), "repeats": 5}, 2 * (3 * 5 + 4 * 2)),
        ({"tune_each": TuneEach(trials=4, splits=9)}, 2 * (3 + 4 * 3)),
        ({"subjects": 5, "splits": KFold(folds=5, count=2)}, 2 * 2),
        ({"holdout": 0.3}, 2 * 3),
        ({"nested": KFold(folds=5), "search": Search(propose, trials=5)}, 5 * (2 + 5) * 3),
    ],
)
def test_fits_are_candidates_and_trials_times_splits(changes: dict[str, object], fits: int) -> None:
    assert plan_study(study(**changes), None).fits == fits


def test_a_plan_of_a_nested_study_refuses_too_few_subjects_for_its_inner_splits() -> None:
    with pytest.raises(UserError, match=r"needs at least 6 subjects, got 5: .*; 5 of 10 subjects are held out"):
        plan_study(study(nested=KFold(folds=2), splits=KFold(folds=6)), None)


def test_time_measured_on_a_run_of_the_same_size_is_the_mean_over_candidates(tmp_path: Path) -> None:
    whole = study()
    splits = whole.splits.make({f"{i}": "" for i in range(10)}, 0)
    run = finished_run(tmp_path / "run", whole, splits, {"hard": 10.0, "soft": 30.0})
    assert plan_study(whole, None, run=run).seconds_per_fit == pytest.approx((10 + 30) / 2)


def test_trials_of_a_learning_rate_take_as_long_as_their_candidate(tmp_path: Path) -> None:
    whole = study(tune_each=TuneEach(trials=2, splits=3))
    splits = whole.splits.make({f"{i}": "" for i in range(10)}, 0)
    run = finished_run(tmp_path / "run", whole, splits, {"hard": 10.0, "soft": 30.0})
    searched = whole.replace(search=Search(propose, trials=2))
    assert plan_study(whole, None, run=run).seconds_per_fit == pytest.approx((10 + 30) / 2)
    assert plan_study(searched, None, run=run).seconds_per_fit == pytest.approx((3 * 10 + 3 * 30 + 2 * 20 * 40 / 10) / (3 + 3 + 2))


def test_time_grows_with_epochs_and_training_subjects(tmp_path: Path) -> None:
    whole = study(data=Phantom(subjects=20))
    small = whole.debug()  # 2 of 10 epochs, 6 of 20 subjects
    splits = small.splits.make({f"{i}": "" for i in range(6)}, 0)
    run = finished_run(tmp_path / "run", small, splits, {"hard": 2.0, "soft": 2.0})
    assert len(splits[0].train) == 4
    assert plan_study(whole, None, run=run).seconds_per_fit == pytest.approx(2.0 * 10 / 2 * 12 / 4)


def test_a_candidate_that_has_not_run_is_taken_for_an_average_one_of_its_own_epochs(tmp_path: Path) -> None:
    splits = study().splits.make({f"{i}": "" for i in range(10)}, 0)
    run = finished_run(tmp_path / "run", study(), splits, {"hard": 10.0, "soft": 30.0})
    searched = plan_study(study(search=Search(propose, trials=2)), None, run=run)
    assert searched.seconds_per_fit == pytest.approx((10 + 30 + 2 * 20 * 40 / 10) / 4)  # proposals train 40 epochs, not 10


def test_a_run_without_finished_fits_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no fit has finished there.*--seconds-per-fit"):
        plan_study(study(), None, run=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="give one of them"):
        plan_study(study(), None, seconds_per_fit=1.0, run="run")


@pytest.mark.parametrize(
    ("machine", "resources", "places"),
    [
        (CPU, Resources(), 16),
        (CPU, Resources(cpus_per_fit=3), 5),
        (CPU, Resources(max_concurrent=2), 2),
        (CPU, Resources(gpus_per_fit=1), 0),
        (CPU, Resources(cpus_per_fit=17), 0),
        (GPU, Resources(), 1),
        (GPU, Resources(gpus_per_fit=0), 8),
        (GPU, Resources(gpus_per_fit=0.25), 4),
        (GPU, Resources(gpus_per_fit=0.1), 8),  # ten by the GPU, eight by the CPUs
        (GPU.replace(gpus=4), Resources(gpus_per_fit=2), 2),
        (GPU, Resources(fits_per_gpu=3), 3),
        (GPU, Resources(fits_per_gpu=16), 8),  # sixteen by the GPU, eight by the CPUs
        (GPU.replace(gpus=4, cpus=48), Resources(fits_per_gpu=6), 24),
        (CPU, Resources(fits_per_gpu=2), 0),
    ],
)
def test_places_are_what_cpus_and_gpus_hold(machine: Machine, resources: Resources, places: int) -> None:
    assert places_on(machine, resources) == places


def test_hours_come_in_rounds_and_money_follows_them() -> None:
    plan = Plan("s", candidates=11, trials=0, splits=3, seconds_per_fit=1800)
    cheap, dear = offers(plan, Resources(), (GPU, CPU))
    assert (cheap.machine, dear.machine) == (CPU, GPU)
    assert cheap.hours == math.ceil(33 / 16) * 0.5
    assert dear.hours == 33 * 0.5
    assert (dear.on_demand_usd, dear.spot_usd) == (16.5 * 1.0, 16.5 * 0.5)


def test_machines_that_cannot_hold_a_fit_are_left_out() -> None:
    plan = Plan("s", candidates=1, trials=0, splits=1, seconds_per_fit=1)
    assert [offer.machine for offer in offers(plan, Resources(gpus_per_fit=1), (CPU, GPU))] == [GPU]


def test_the_price_list_of_the_repository_is_one_dated_with_pages_and_cheaper_spot() -> None:
    prices = load_prices(PRICES)
    assert prices.written <= date.today()
    assert {machine.provider for machine in prices.machines} == set(prices.pages) == {"aws", "gcp"}
    assert all("https://" in page for page in prices.pages.values())
    assert len({machine.name for machine in prices.machines}) == len(prices.machines)
    assert all(0 < machine.spot_usd < machine.on_demand_usd for machine in prices.machines)


def test_prices_are_old_after_a_year() -> None:
    prices = load_prices(PRICES).replace(written=date(2026, 11, 24))
    assert not prices.are_old(date(2027, 11, 24))
    assert prices.are_old(date(2027, 11, 25))


def test_offers_without_costs_have_hours_and_the_fastest_first() -> None:
    plan = Plan("s", candidates=11, trials=0, splits=3, seconds_per_fit=1800)
    found = offers(plan, Resources(), (GPU, CPU.replace(spot_usd=99.0)), costs=False)
    assert [(offer.machine.name, offer.hours) for offer in found] == [("c", 1.5), ("g", 16.5)]
    assert {(offer.on_demand_usd, offer.spot_usd) for offer in found} == {(None, None)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machines": []}, r"machines: .* at least 1"),
        ({"machines": [CPU.model_dump() | {"spot_usd": -1}]}, r"machines\.0\.spot_usd: .* greater than 0, got -1"),
        ({"machine": []}, r"machine: there is no such field"),
    ],
)
def test_a_bad_price_list_is_one_line_with_file_and_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(PRICES.read_text()) | json.loads(json.dumps(change))))
    with pytest.raises(UserError, match=rf"prices\.yaml: not a price list: Prices\.{message}") as raised:
        load_prices(path)
    assert "\n" not in str(raised.value)


def test_what_is_no_yaml_or_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "torn.yaml").write_text("machines: [")
    with pytest.raises(UserError, match=r"torn\.yaml: not YAML: .*line 1"):
        load_prices(tmp_path / "torn.yaml")
    with pytest.raises(UserError, match=r"none\.yaml: cannot read the price list: No such file.*--prices"):
        load_prices(tmp_path / "none.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"picture\.yaml: not YAML: .*decode"):
        load_prices(tmp_path / "picture.yaml")


SMALL = """
from softseg_dist import *
STUDY = Study(name="small", question="?", data=Phantom(subjects=12, raters=1, size=(16, 16), num_slices=2),
    splits=MonteCarlo(count=6), candidates=factorial(Recipe(), label=("hard", "soft"), activation=(Sigmoid(), NormReLU()),
    loss=(Dice(), AdaptiveWing())), control="hard-sigmoid-dice")
"""


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A study file outside of the working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "small.py").write_text(SMALL)
    return str(tmp_path / "small.py")


def prices_of(day: date) -> str:
    """The price list of the repository as if it had been written on a day."""
    Path("prices.yaml").write_text(yaml.safe_dump(yaml.safe_load(PRICES.read_text()) | {"written": day}))
    return "prices.yaml"


def test_the_command_says_what_to_do_when_the_time_is_not_known(path: str) -> None:
    said = CliRunner().invoke(app, ["plan", path, "--data-root", "my data"])
    assert said.exit_code == 0
    assert f"softseg run {path} --data-root 'my data' --debug" in said.output
    assert "8 candidates, each on 6 splits: 48 fits" in said.output
    assert "--debug" in said.output
    assert "USD" not in said.output


def test_the_command_shows_every_machine_and_says_the_same_as_json(path: str) -> None:
    words = ["plan", path, "--seconds-per-fit", "3600", "--prices", prices_of(date.today())]
    shown = CliRunner().invoke(app, words).output
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert (told["fits"], told["seconds_per_fit"]) == (48, 3600)
    assert told["prices_written"] in shown
    assert len(told["machines"]) == len(load_prices(PRICES).machines)
    for offer in told["machines"]:
        row = next(line for line in shown.splitlines() if line.startswith(offer["machine"]["name"] + " "))
        assert row.split()[-3:] == [f"{offer[key]:.2f}" for key in ("hours", "on_demand_usd", "spot_usd")]


def test_the_command_shows_hours_only_when_the_prices_are_old_and_names_the_file_to_renew(path: str) -> None:
    words = ["plan", path, "--seconds-per-fit", "3600", "--prices", prices_of(date(2024, 2, 29))]
    shown = CliRunner().invoke(app, words).output
    why = "Prices of 2024-02-29, older than a year, so that no costs are shown; renew prices and date in prices.yaml, from https://"
    assert why in shown
    assert "USD" not in shown
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert len(told["machines"]) == len(load_prices(PRICES).machines)
    for offer in told["machines"]:
        assert (offer["on_demand_usd"], offer["spot_usd"]) == (None, None)
        assert not [key for key in offer["machine"] if "usd" in key]
        row = next(line for line in shown.splitlines() if line.startswith(offer["machine"]["name"] + " "))
        assert row.split()[-1] == f"{offer['hours']:.2f}"


def test_the_command_writes_the_splits_for_nnunet_and_they_can_be_given(path: str) -> None:
    said = CliRunner().invoke(app, ["plan", path, "--write-splits", "new/splits_final.json"])
    assert said.exit_code == 0, said.output
    of = load_study(path).study
    cases = {case.name: case for case in of.data.cases(None)}
    sites = {case.subject: case.site for case in cases.values()}
    ours = of.make_splits(sites)
    written = json.loads(Path("new/splits_final.json").read_text())
    assert [sorted(cases[name].subject for name in split["val"]) for split in written] == [list(split.test) for split in ours]
    assert all({*split["train"], *split["val"]} == cases.keys() for split in written)
    given = of.replace(splits=GivenSplits("new/splits_final.json")).make_splits(
        sites, {name: c.subject for name, c in cases.items()}
    )
    assert [split.test for split in given] == [split.test for split in ours]


def test_splits_of_a_nested_study_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without nested"):
        write_splits(study(nested=KFold(folds=3)), None, tmp_path / "splits.json")
