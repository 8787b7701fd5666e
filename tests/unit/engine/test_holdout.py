"""Held-out subjects: chosen alike everywhere, in no split, opened for winner and control alone, and every look is recorded."""

from __future__ import annotations

import io
import shutil
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from s3_server import BUCKET
from sealed_files import value_of

from softseg_dist import KFold, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Resources, Study, UNet, factorial
from softseg_dist.data.splits import held_out
from softseg_dist.data.store import Store, build_store
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.finalists import open_holdout
from softseg_dist.engine.local import LocalBackend
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.session import Outcome
from softseg_dist.errors import UserError
from softseg_dist.judging.thresholds import CURVE
from softseg_dist.places import Place
from softseg_dist.record.ledger import CandidateRecord, HoldoutRecord, Ledger, Opening, json_of
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.report.run_folder import load_run
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitTask, holdout_path, weights_path

PEOPLE = {f"p{i:02d}": "AAB"[i % 3] for i in range(30)}
SHARES = st.floats(0.01, 0.5)
people = st.dictionaries(st.text(min_size=1, max_size=6), st.sampled_from(["A", "B", ""]), min_size=8, max_size=40)

BASE = Recipe(network=UNet(filters=(4, 8)), optim=Optim(lr=5e-3, epochs=1, batch_size=8))
STUDY = Study(
    name="tiny",
    question="Is the winner honest?",
    data=Phantom(subjects=8, size=(16, 16), num_slices=2, raters=2),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2),
    candidates=factorial(BASE, label=("hard", "soft", "nearest")),
    control="hard",
    holdout=0.25,
)


@given(subjects=people, holdout=SHARES, seed=st.integers(0, 2**32), rule=st.sampled_from([MonteCarlo(count=3), KFold(folds=3)]))
@settings(max_examples=50)
def test_no_split_has_a_held_out_subject_and_each_has_all_others(
    subjects: dict[str, str], holdout: float, seed: int, rule: MonteCarlo | KFold
) -> None:
    study = STUDY.replace(splits=rule, holdout=holdout, seed=seed)
    out = study.held_out(subjects)
    assert 1 <= len(out) <= len(subjects) / 2 + 0.5
    for split in study.make_splits(subjects):
        assert sorted((*split.train, *split.validation, *split.test, *out)) == sorted(subjects)


@given(subjects=people, seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_an_inner_study_never_sees_the_test_subjects_of_its_outer_split(subjects: dict[str, str], seed: int) -> None:
    study = STUDY.replace(holdout=None, nested=KFold(folds=3), seed=seed)
    for outer in KFold(folds=3).make(subjects, seed):
        inner = study.inner(outer)
        assert inner.held_out(subjects) == outer.test
        for split in inner.make_splits(subjects):
            assert {*split.train, *split.validation, *split.test} == {*outer.train, *outer.validation}


def test_who_is_held_out_depends_on_people_and_seed_alone() -> None:
    assert held_out(0.2, PEOPLE, 1) == held_out(0.2, dict(reversed(PEOPLE.items())), 1)
    assert held_out(0.2, PEOPLE, 1) != held_out(0.2, PEOPLE, 2)
    assert held_out(0.25, {f"p{i}": "" for i in range(8)}, 0) == ("p4", "p6"), "the same on every machine"


@pytest.mark.parametrize("seed", range(5))
def test_each_site_is_held_out_in_proportion(seed: int) -> None:
    counts = Counter(PEOPLE[subject] for subject in held_out(0.3, PEOPLE, seed))
    assert sum(counts.values()) == round(0.3 * 30)
    assert abs(counts["A"] - 0.3 * 20) <= 1


def test_a_small_share_is_one_subject_and_without_holdout_it_is_none() -> None:
    assert len(held_out(0.001, PEOPLE, 0)) == 1
    assert held_out(None, PEOPLE, 0) == ()


def test_named_subjects_are_held_out_and_unknown_names_refused() -> None:
    assert held_out(("p03", "p01", "p03"), PEOPLE, 0) == ("p01", "p03")
    with pytest.raises(UserError, match="holdout names p98, p99, but the subjects are p00, p01") as refused:
        held_out(("p99", "p01", "p98"), PEOPLE, 0)
    assert "\n" not in str(refused.value)


def test_too_few_left_for_the_splits_are_refused_with_how_many_are_held_out() -> None:
    with pytest.raises(UserError, match=r"at least 3 subjects, got 2: p2, p3; 2 of 4 subjects are held out"):
        STUDY.replace(holdout=("p0", "p1")).make_splits({f"p{i}": "" for i in range(4)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": 0.0}, r"in \(0, 0.5\], .* got 0"),
        ({"holdout": 0.6}, r"in \(0, 0.5\], .* got 0.6"),
        ({"holdout": ()}, r"names of at least one subject, got \(\)"),
        ({"holdout": 0.2, "nested": KFold(folds=3)}, "not both"),
        ({"holdout": None, "nested": KFold(folds=3), "candidates": {"hard": BASE, "winner": BASE}}, "'winner'"),
    ],
)
def test_a_holdout_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        STUDY.replace(**changes)


@pytest.mark.parametrize("holdout", [0.25, ("p1", "p2"), None])
def test_a_study_with_holdout_survives_json(holdout: float | tuple[str, ...] | None) -> None:
    study = STUDY.replace(holdout=holdout)
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_debug_holds_out_one_subject_and_keeps_as_many_for_the_splits() -> None:
    small = STUDY.replace(holdout=("sub-97", "sub-98")).debug()
    sites = {f"sub-{i}": "" for i in range(small.subjects or 0)}
    assert len(small.held_out(sites)) == 1
    assert len(sites) == Study.DEBUG_SUBJECTS + 1
    nested = STUDY.replace(holdout=None, nested=KFold(folds=2), splits=KFold(folds=5)).debug()
    sites = {f"sub-{i}": "" for i in range(nested.subjects or 0)}
    assert nested.nested is not None
    assert all(nested.inner(outer).make_splits(sites) for outer in nested.nested.make(sites, 0))


# The record in the run folder.


def open_study(folder: Path, study: Study, subjects: int = 8) -> tuple[str, ...]:
    sites = {f"p{i}": "" for i in range(subjects)}
    return Ledger(folder).open_study(study, study.make_splits(sites), held_out=study.held_out(sites))


@pytest.mark.parametrize(
    ("change", "subjects", "message"),
    [
        (STUDY.replace(holdout=("p0", "p1")), 8, r"holdout: 0\.25 -> \(p0, p1\); .*subjects: 2 \(p4, p6\) -> 2 \(p0, p1\)"),
        (STUDY.replace(holdout=None), 8, r"holdout: 0\.25 -> none; .*held-out subjects: 2 \(p4, p6\) -> none"),
        (STUDY, 12, r"held-out subjects: 2 \(p4, p6\) -> 3 \("),
    ],
    ids=["others", "nobody", "more data"],
)  # fmt: skip
def test_another_holdout_is_refused_with_the_difference(tmp_path: Path, change: Study, subjects: int, message: str) -> None:
    open_study(tmp_path, STUDY)
    before = (tmp_path / "holdout.json").read_bytes()
    with pytest.raises(UserError, match=message) as refused:
        open_study(tmp_path, change, subjects)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "holdout.json").read_bytes() == before


def test_a_holdout_cannot_be_added_to_a_run_that_has_none(tmp_path: Path) -> None:
    open_study(tmp_path, STUDY.replace(holdout=None))
    with pytest.raises(UserError, match=r"holdout: none -> 0\.25; .*held-out subjects: none -> 2"):
        open_study(tmp_path, STUDY)
    assert not (tmp_path / "holdout.json").exists()


def test_opening_a_study_again_keeps_what_is_known_of_its_holdout(tmp_path: Path) -> None:
    open_study(tmp_path, STUDY)
    looked = HoldoutRecord(subjects=("p4", "p6"), opened=(Opening(at="2026-01-01T00:00:00+00:00", winner="soft"),))
    Ledger(tmp_path).write_holdout(looked)
    open_study(tmp_path, STUDY.replace(splits=MonteCarlo(count=3)))
    assert Ledger(tmp_path).holdout() == looked


def test_more_outer_splits_extend_a_nested_study_and_others_are_refused(tmp_path: Path) -> None:
    sites = {f"p{i}": "" for i in range(8)}
    nested = STUDY.replace(holdout=None, nested=MonteCarlo(count=2))
    more, others = nested.replace(nested=MonteCarlo(count=3)), nested.replace(nested=KFold(folds=3))
    Ledger(tmp_path).open_study(nested, MonteCarlo(count=2).make(sites, 0))
    with pytest.raises(UserError, match=r"split 0, .*nested: MonteCarlo -> KFold"):
        Ledger(tmp_path).open_study(others, KFold(folds=3).make(sites, 0))
    assert Ledger(tmp_path).open_study(more, MonteCarlo(count=3).make(sites, 0)) == ("nested.count: 2 -> 3",)


# Opening.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder whose search is complete, and its store."""
    folder, cases = tmp_path_factory.mktemp("tiny"), STUDY.data.cases(None)
    path = build_store(tmp_path_factory.mktemp("stores"), cases, STUDY.data, STUDY.preprocess)
    sites = {case.subject: case.site for case in cases}
    ledger, splits = Ledger(folder), STUDY.make_splits(sites)
    ledger.open_study(STUDY, splits, held_out=STUDY.held_out(sites))
    for number, (name, recipe) in enumerate(STUDY.candidates.items()):
        ledger.write_candidate(CandidateRecord(name=name, origin="fixed", number=number, recipe=json_of(recipe)))
        for split in splits:
            task = FitTask(
                study=STUDY.name, seed=0, candidate=name, recipe=recipe, split=split, objective=STUDY.objective,
                store=str(path), store_fingerprint=Store.open(path).fingerprint, folder=ledger.fit_folder(name, split),
            )  # fmt: skip
            ledger.write_result(fit(task))
    return folder, path


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> RunContext:
    """A copy of it, to be opened."""
    folder = tmp_path / "tiny"
    shutil.copytree(trained[0], folder)
    return context_of(str(folder), Prepared(str(trained[1])))


def context_of(folder: str, prepared: Prepared) -> RunContext:
    ledger, copy = Ledger(folder), WorkingCopy(folder)
    return RunContext(STUDY, ledger.splits(), prepared, ledger, copy, Resources(), LocalBackend(), PlainLines(io.StringIO()))


COMPLETE = Outcome(finished=6, failed=0, unfinished=0, interrupted=False)


def opened(run: RunContext, winner: str = "soft", outcome: Outcome = COMPLETE) -> str:
    lines = io.StringIO()
    open_holdout(replace(run, progress=PlainLines(lines)), winner, outcome)
    return lines.getvalue()


def rows(run: RunContext) -> pd.DataFrame:
    return pd.read_parquet(run.copy.folder / "holdout.parquet")


def test_winner_and_control_and_no_other_are_measured_on_all_held_out_subjects_by_all_their_fits(run: RunContext) -> None:
    opened(run)
    table, record = rows(run), run.ledger.holdout()
    assert record is not None
    cells = table.groupby(["candidate", "split"], observed=True)["subject"].agg(lambda of_fit: tuple(sorted(set(of_fit))))
    assert cells.to_dict() == {(name, split): record.subjects for name in ("hard", "soft") for split in (0, 1)}
    assert set(table["subset"]) == {"holdout"}
    for result in run.ledger.results().values():
        measured = table[(table["candidate"] == result.candidate) & (table["split"] == result.split)]["threshold"].dropna()
        assert set(measured) >= ({*CURVE, *result.thresholds.values()} if result.candidate != "nearest" else set())
    (opening,) = record.opened
    assert (opening.winner, opening.control) == ("soft", "hard")
    assert opening.fits == ("hard/000", "hard/001", "soft/000", "soft/001")
    loaded = load_run(run.copy.folder)
    assert loaded.holdout_record == record
    assert loaded.holdout is not None
    assert len(loaded.holdout) == len(table)


def test_held_out_subjects_are_measured_as_test_subjects_are(run: RunContext) -> None:
    """If the held-out subjects were those that a fit has tested, its rows would be those that it wrote itself."""
    split = run.ledger.splits()[0]
    run.ledger.write_holdout(HoldoutRecord(subjects=split.test))
    opened(run)
    theirs = pd.read_parquet(run.copy.folder / "fits/soft/000/cases.parquet").query("subset == 'test' and grid == 'own'")
    ours = pd.read_parquet(run.copy.folder / "fits/soft/000/holdout.parquet")
    names = ["subject", "case", "class", "reference", "metric"]
    ours, theirs = (part.astype(dict.fromkeys(names, str)) for part in (ours, theirs.reset_index(drop=True)))
    columns = [*names, "threshold", "value"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns], rtol=1e-5)


def test_running_again_opens_nothing(run: RunContext) -> None:
    opened(run)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.copy.folder.rglob("fits/*/*/holdout.parquet")}
    record = (run.copy.folder / "holdout.json").read_bytes()
    assert opened(run) == ""
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert (run.copy.folder / "holdout.json").read_bytes() == record


def test_an_interrupted_opening_goes_on_and_counts_once(run: RunContext) -> None:
    opened(run)
    whole = rows(run)
    holdout_path(run.copy.folder / "fits/soft/001").unlink()  # as if it had been stopped before its last fit
    (run.copy.folder / "holdout.parquet").unlink()
    assert "1 fits" in opened(run)
    pd.testing.assert_frame_equal(rows(run), whole)
    record = run.ledger.holdout()
    assert record is not None
    assert len(record.opened) == 1


def test_another_winner_is_measured_too_and_the_record_says_that_it_was_not_the_first(run: RunContext) -> None:
    opened(run)
    before = rows(run)
    assert "were open before" in opened(run, winner="nearest")
    after, record = rows(run), run.ledger.holdout()
    pd.testing.assert_frame_equal(after[after["candidate"] != "nearest"].reset_index(drop=True).astype(str), before.astype(str))
    assert set(after["candidate"]) == {"hard", "soft", "nearest"}
    assert record is not None
    assert [(opening.winner, len(opening.fits)) for opening in record.opened] == [("soft", 4), ("nearest", 4)]


def test_a_control_that_wins_is_measured_once(run: RunContext) -> None:
    opened(run, winner="hard")
    assert set(rows(run)["candidate"]) == {"hard"}


@pytest.mark.parametrize(
    ("outcome", "told"),
    [(Outcome(6, 0, 1, False), ""), (Outcome(6, 0, 0, True), ""), (Outcome(6, 1, 0, False), "stay closed: 1 fits were given up")],
    ids=["unfinished", "interrupted", "given up"],
)
def test_nothing_is_opened_while_a_fit_is_missing(run: RunContext, outcome: Outcome, told: str) -> None:
    assert told in opened(run, outcome=outcome)
    assert value_of(run.copy.folder / "holdout.json")["opened"] == []
    assert not list(run.copy.folder.rglob("holdout.parquet"))


def test_weights_that_are_gone_are_named(run: RunContext) -> None:
    weights_path(run.copy.folder / "fits/soft/001").unlink()
    with pytest.raises(UserError, match=r"fits/soft/001/best\.safetensors is not as it was written \(missing"):
        opened(run)


def test_a_remote_run_is_opened_from_anywhere(
    run: RunContext, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}/tiny"
    for path in run.copy.folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            (Place.at(uri) / path.relative_to(run.copy.folder).as_posix()).push(path)
    for machine in ("first", "second"):
        monkeypatch.setenv("SOFTSEG_CACHE", str(tmp_path / machine))
        context = context_of(uri, run.prepared)
        copy, told = context.copy, opened(context)
        assert ("4 fits" in told) == (machine == "first")
        assert {"holdout.json", "holdout.parquet"} <= {path.name for path in copy.folder.iterdir()}
    opened(run)
    pd.testing.assert_frame_equal(pd.read_parquet(copy.folder / "holdout.parquet"), rows(run))
    record = Ledger(uri).holdout()
    assert record is not None
    assert len(record.opened) == 1
