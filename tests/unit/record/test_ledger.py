"""The ledger: what is written comes back, what is torn runs again, and a changed study is refused with its changes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import value_of

from softseg_dist import Dice, DiceSemimetric, MonteCarlo, Optim, Phantom, Race, Recipe, Resources, Search, Study, TuneEach
from softseg_dist.data.splits import Split
from softseg_dist.errors import UserError
from softseg_dist.record.ledger import CandidateRecord, Ledger, RaceRecord, json_of
from softseg_dist.training.task import FitResult

BASE = Recipe(optim=Optim(lr=0.001, epochs=2))
SUBJECTS = {f"sub-{i:02d}": "" for i in range(10)}


def propose(trial):
    return BASE.replace(optim=Optim(lr=trial.suggest_float("lr", 1e-4, 1e-2)))


STUDY = Study(
    name="ledger",
    question="Does it remember?",
    data=Phantom(subjects=10),
    splits=MonteCarlo(count=2),
    candidates={"dice": BASE, "dml": BASE.replace(loss=DiceSemimetric())},
    control="dice",
    search=Search(propose, trials=4),
)


def splits_of(study: Study) -> tuple[Split, ...]:
    return study.splits.make(SUBJECTS, study.seed)


def opened(folder: Path | str) -> Ledger:
    ledger = Ledger(folder)
    ledger.open_study(STUDY, splits_of(STUDY), "f" * 16)
    return ledger


def record(name: str) -> CandidateRecord:
    return CandidateRecord(name=name, origin="fixed", number=0, recipe=json_of(BASE))


def refusal(folder: Path, study: Study, fingerprint: str | None = None) -> str:
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    with pytest.raises(UserError) as refused:
        Ledger(folder).open_study(study, splits_of(study), fingerprint)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before
    return str(refused.value)


@given(
    state=st.sampled_from(["finished", "failed"]),
    score=st.none() | st.floats(-1, 1),
    reason=st.text(),
    thresholds=st.dictionaries(st.text(), st.floats(0, 1), max_size=3),
)
def test_a_result_comes_back_as_it_was_written(tmp_path_factory, state, score, reason, thresholds):
    ledger = Ledger(tmp_path_factory.mktemp("run"))
    result = FitResult(candidate="dice", split=7, state=state, score=score, reason=reason, thresholds=thresholds)
    ledger.write_candidate(record("dice"))
    ledger.write_result(result)
    assert ledger.results() == {"dice/007": result}
    assert ledger.candidates() == {"dice": record("dice")}


def test_repeats_of_a_split_have_files_of_their_own(tmp_path):
    ledger = opened(tmp_path)
    ledger.write_candidate(record("dice"))
    for repeat in (0, 1, 12):
        ledger.write_result(FitResult(candidate="dice", split=3, repeat=repeat, state="finished", score=repeat))
    assert sorted(ledger.results()) == ["dice/003", "dice/003-r1", "dice/003-r12"]
    assert (tmp_path / "fits/dice/003-r1.json").is_file()
    assert [Path(ledger.fit_folder("dice", splits_of(STUDY)[0], repeat)).name for repeat in (0, 1)] == ["000", "000-r1"]


def test_fewer_repeats_than_have_run_are_refused(tmp_path):
    Ledger(tmp_path).open_study(STUDY.replace(repeats=2), splits_of(STUDY))
    assert "repeats: 2 -> 1" in refusal(tmp_path, STUDY)
    assert Ledger(tmp_path).open_study(STUDY.replace(repeats=3), splits_of(STUDY)) == ("repeats: 2 -> 3",)


def test_a_uri_and_a_path_are_the_same_folder(tmp_path):
    opened(f"file://{tmp_path}/run").write_candidate(record("dice"))
    assert list(Ledger(tmp_path / "run").candidates()) == ["dice"]


def test_works_on_a_filesystem_that_is_not_local(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTSEG_CACHE", str(tmp_path))
    ledger = Ledger("mock://run")
    assert ledger.place.path is None
    ledger.open_study(STUDY, splits_of(STUDY))
    ledger.write_candidate(record("dice"))
    ledger.write_result(FitResult(candidate="dice", split=0, state="finished", score=0.5))
    assert ledger.results()["dice/000"].score == 0.5


@pytest.mark.parametrize("content", [b"", b'{"candidate": "dice", "s', b"\xff\xfe\x00", b"[]", b'{"candidate": "dml"}'])
def test_a_torn_result_is_named_and_left_out(tmp_path, caplog, content):
    ledger = opened(tmp_path)
    ledger.write_candidate(record("dice"))
    for split in (0, 1):
        ledger.write_result(FitResult(candidate="dice", split=split, state="finished", score=0.5))
    (tmp_path / "fits/dice/000.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(ledger.results()) == ["dice/001"]
    assert len(caplog.messages) == 1
    assert f"{tmp_path}/fits/dice/000.json" in caplog.messages[0]


def test_a_torn_candidate_is_refused_with_its_name(tmp_path):
    ledger = opened(tmp_path)
    ledger.write_candidate(record("dice"))
    (tmp_path / "fits/dice/candidate.json").write_text('{"name": "di')
    with pytest.raises(UserError, match=r"fits/dice/candidate\.json"):
        ledger.results()


def test_a_lost_race_comes_back_and_a_torn_one_is_left_out(tmp_path):
    ledger = opened(tmp_path)
    for name in ("dice", "dml"):
        ledger.write_candidate(record(name))
        ledger.write_race(RaceRecord(candidate=name, incumbent="best", after=3, difference=-0.1, p=0.01, values=(0.5,)))
    (tmp_path / "fits/dml/race.json").write_text('{"candidate": "dml", "incu')
    assert ledger.races() == {
        "dice": RaceRecord(candidate="dice", incumbent="best", after=3, difference=-0.1, p=0.01, values=(0.5,))
    }


def test_no_partial_files_are_left(tmp_path):
    opened(tmp_path).write_candidate(record("dice"))
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"study.json", "splits.json", "store.json", "code.json", "candidate.json", ".lock"}


def test_opening_the_same_study_again_changes_nothing(tmp_path):
    opened(tmp_path)
    assert Ledger(tmp_path).open_study(STUDY, splits_of(STUDY), "f" * 16) == ()


def test_the_study_on_disk_is_the_study(tmp_path):
    opened(tmp_path)
    assert Study.model_validate(value_of(tmp_path / "study.json")) == STUDY
    stored = [Split.model_validate(split) for split in value_of(tmp_path / "splits.json")]
    assert tuple(stored) == splits_of(STUDY)


EXTENSIONS = {
    "candidate": STUDY.replace(candidates={**STUDY.candidates, "hard": BASE.replace(label="hard")}),
    "trials": STUDY.replace(search=Search(propose, trials=5)),
    "splits": STUDY.replace(splits=MonteCarlo(count=3)),
    "resources": STUDY.replace(resources=Resources(cpus_per_fit=2)),
    "question": STUDY.replace(question="Does it really?"),
    "control": STUDY.replace(control="dml"),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_is_recorded_and_told(tmp_path, name):
    opened(tmp_path)
    study = EXTENSIONS[name]
    assert len(Ledger(tmp_path).open_study(study, splits_of(study), "f" * 16)) == 1
    assert Study.model_validate(value_of(tmp_path / "study.json")) == study
    assert len(value_of(tmp_path / "splits.json")) == len(splits_of(study))


CHANGES = {
    "candidates.dice.optim.lr: 0.001 -> 0.01": STUDY.replace(
        candidates={**STUDY.candidates, "dice": BASE.replace(optim=Optim(lr=0.01, epochs=2))}
    ),
    "candidates.dml.loss: DiceSemimetric -> Dice": STUDY.replace(candidates={**STUDY.candidates, "dml": BASE.replace(loss=Dice())}),
    "candidates.dml: Recipe -> none": STUDY.replace(candidates={"dice": BASE}),
    "search.trials: 4 -> 3": STUDY.replace(search=Search(propose, trials=3)),
    "search.startup_trials: 10 -> 2": STUDY.replace(search=Search(propose, trials=4, startup_trials=2)),
    "search: Search -> none": STUDY.replace(search=None),
    "search.race: Race -> none": STUDY.replace(search=Search(propose, trials=4, race=None)),
    "search.race.level: 0.1 -> 0.05": STUDY.replace(search=Search(propose, trials=4, race=Race(level=0.05))),
    "tune_each: none -> TuneEach": STUDY.replace(tune_each=TuneEach()),
    "second_objective: none -> brier": STUDY.replace(second_objective="brier"),
    "objective: brier_skill -> dice_dml": STUDY.replace(objective="dice_dml"),
    "data.noise: ": STUDY.replace(data=Phantom(subjects=10, noise=0.5)),
    "number of splits: 2 -> 1; splits.count: 2 -> 1": STUDY.replace(splits=MonteCarlo(count=1)),
    "seed: 0 -> 1; split 0, train subjects: 6 (": STUDY.replace(seed=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_results_is_refused_with_old_and_new(tmp_path, change):
    opened(tmp_path)
    message = refusal(tmp_path, CHANGES[change])
    assert change in message
    assert "\n" not in message


def test_a_change_of_the_tuning_is_refused_and_more_candidates_are_not(tmp_path):
    tuned = STUDY.replace(tune_each=TuneEach(lr=(1e-4, 1e-2)))
    Ledger(tmp_path).open_study(tuned, splits_of(tuned), "f" * 16)
    assert "tune_each: TuneEach -> none" in refusal(tmp_path, STUDY)
    other = tuned.replace(tune_each=TuneEach(lr=(1e-4, 1e-1), splits=3))
    assert "tune_each.lr: (0.0001, 0.01) -> (0.0001, 0.1); tune_each.splits: 2 -> 3" in refusal(tmp_path, other)
    more = tuned.replace(candidates={**STUDY.candidates, "hard": BASE.replace(label="hard")})
    assert len(Ledger(tmp_path).open_study(more, splits_of(more), "f" * 16)) == 1


def test_another_store_is_refused(tmp_path):
    opened(tmp_path)
    assert f"{'f' * 16} -> {'0' * 16}" in refusal(tmp_path, STUDY, "0" * 16)


def test_many_changes_are_counted_not_listed(tmp_path):
    opened(tmp_path)
    change = BASE.replace(optim=Optim(lr=0.1, epochs=9, batch_size=1, patience=1, weight_decay=0.1, clip_norm=1))
    message = refusal(tmp_path, STUDY.replace(candidates={"dice": change, "dml": change}))
    assert "and 5 more" in message  # 2 candidates x 6 fields + the loss of dml = 13, of which 8 are shown


def test_two_drivers_cannot_hold_one_folder(tmp_path):
    code = """import sys; from softseg_dist.locks import hold; from pathlib import Path
with hold(Path(sys.argv[1])): print(input())"""
    path = tmp_path / ".lock"
    with Ledger(tmp_path).lock():
        second = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert second.returncode != 0
        assert f"in use by process {os.getpid()} on " in second.stderr
    third = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, input="mine\n", check=True)
    assert third.stdout == "mine\n"


def test_one_driver_may_nest_its_lock(tmp_path):
    ledger = Ledger(tmp_path)
    with ledger.lock(), ledger.lock():
        ledger.open_study(STUDY, splits_of(STUDY))
