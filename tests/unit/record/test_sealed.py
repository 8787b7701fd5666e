"""Sealed files: whatever happens to one that is believed later is found when it is next read, and never becomes a number."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed_files import seal_of

import softseg_dist
from softseg_dist import TTA, Dice, Flip, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Study, UNet
from softseg_dist.cli.main import main
from softseg_dist.data.cases import CaseData
from softseg_dist.data.phantom import PhantomCase
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.data.store import Part, Store, build_store, local_store
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.final_model import make_model
from softseg_dist.engine.finalists import ENSEMBLE, HOLDOUT, measure_ensembles, open_holdout
from softseg_dist.engine.local import LocalBackend
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.session import run_search
from softseg_dist.errors import UserError
from softseg_dist.pipeline import RunOptions, _collect, run_study
from softseg_dist.places import LEFT_S, Place, cache_folder, partial_of, sweep_partials
from softseg_dist.record.ledger import Ledger, RaceRecord, json_of
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import status_of
from softseg_dist.report.run_folder import load_run
from softseg_dist.sealed import BLANK, Damaged, is_sealed, seal, sealed_json, unsealed_json
from softseg_dist.study_file import StudyFile
from softseg_dist.training.fit import fit
from softseg_dist.training.inference import weights_of_fits
from softseg_dist.training.saved_model import read_card, read_model
from softseg_dist.training.task import FitResult, FitTask, Interrupted, Worker, history_of, result_path

# The seal.


VALUES = st.none() | st.integers() | st.text() | st.lists(st.floats(allow_nan=False))
NAMES = st.text().filter(lambda name: name not in ("items", "seal"))


@settings(max_examples=30)
@given(value=st.dictionaries(NAMES, VALUES) | st.lists(VALUES), key=st.text())
def test_json_comes_back_and_stays_json(value: object, key: str) -> None:
    content = sealed_json(value, key)
    assert unsealed_json(content, "x", key) == value
    assert json.loads(content).keys() == {*(value if isinstance(value, dict) else ["items"]), "seal"}
    assert not is_sealed(content, f"{key}!"), "of another run"


@settings(max_examples=60)
@given(before=st.binary(), after=st.binary(max_size=40), data=st.data())
def test_no_bit_of_a_sealed_file_can_turn_unseen(before: bytes, after: bytes, data: st.DataObject) -> None:
    content = bytearray(seal(before + BLANK + after))
    assert is_sealed(bytes(content))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not is_sealed(bytes(content))


# A finished run, and what may happen to each of its files.

BASE = Recipe(network=UNet(filters=(2, 4)), augment=(Flip(p=0.5),), optim=Optim(lr=1e-2, epochs=2, batch_size=8))
STUDY = Study(
    name="s",
    question="Is it found?",
    data=Phantom(subjects=8, size=(16, 16), num_slices=1, raters=2),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2),
    repeats=2,
    holdout=0.25,
    candidates={"a": BASE, "b": BASE.replace(loss=Dice())},
    control="a",
    uncertainty=(TTA(transforms=(Flip(p=0.5),), samples=2),),
)


class Lines(Progress):
    """Keeps the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def go_on(folder: Path, study: Study = STUDY) -> tuple[RunContext, list[str]]:
    """Run a study to its end, as `pipeline` does, without a report and MLflow."""
    store = build_store(folder.parent / "stores", study.data.cases(None), study.data, study.preprocess)
    prepared, ledger, lines = Prepared(str(store)), Ledger(folder), Lines()
    splits = study.make_splits(prepared.sites, prepared.persons)
    ledger.open_study(study, splits, prepared.fingerprint, study.held_out(prepared.sites))
    ledger.write("run.json", {"store": str(store)})
    context = RunContext(study, splits, prepared, ledger, WorkingCopy(str(folder)), study.resources, LocalBackend(), lines)
    again = set[str]()
    while True:
        outcome = run_search(context)
        try:
            assert _collect(context.copy)
            open_holdout(context, "b", outcome)
            measure_ensembles(context, "b", outcome)
            load_run(folder)
            make_model(context, "b", folder / "model")
        except Damaged as damage:
            if not damage.fit or damage.fit in again:
                raise
            again.add(damage.fit)
            lines.note(str(damage))
            ledger.forget(damage.fit)
        else:
            return context, lines.notes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    folder = tmp_path_factory.mktemp("done") / "s"
    go_on(folder)
    race = RaceRecord(candidate="b", incumbent="a", after=2, difference=-0.1, p=0.01)
    (folder / "race.json").write_bytes(sealed_json(json_of(race), seal_of(folder / "fits/b/race.json")))
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, done: Path) -> Path:
    """Another run of a study of this name."""
    folder = tmp_path_factory.mktemp("other") / "s"
    go_on(folder, STUDY.replace(seed=1))
    return folder


def flipped(content: bytes, seed: int) -> bytes:
    chance, turned = random.Random(seed), bytearray(content)
    turned[chance.randrange(len(turned))] ^= 1 << chance.randrange(8)
    return bytes(turned)


Harm = Callable[[bytes, bytes], bytes]  # (the file, that of another run) -> what is there instead
HARMS: dict[str, Harm] = {
    **{f"flip {seed}": lambda mine, theirs, seed=seed: flipped(mine, seed) for seed in range(6)},
    "half": lambda mine, theirs: mine[: len(mine) // 2],
    "empty": lambda mine, theirs: b"",
    "of another run": lambda mine, theirs: theirs,
}


def report(run: Path) -> object:
    return load_run(run)


def status(run: Path) -> object:
    return status_of(str(run))


def search(run: Path) -> object:
    ledger = Ledger(run)
    sites = {case.subject: case.site for case in STUDY.data.cases(None)}
    ledger.open_study(STUDY, ledger.splits(), held_out=STUDY.held_out(sites))
    return ledger.candidates(), ledger.results(strict=True)


def collect(run: Path) -> object:
    return _collect(WorkingCopy(run))


def ensemble(run: Path) -> object:
    return weights_of_fits(run / "model", read_card(run / "model"))


def model(run: Path) -> object:
    return read_model(run / "model", read_card(run / "model"))


READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "study.json": (report, status, search),
    "splits.json": (report, status, search),
    "code.json": (report, status, search),
    "holdout.json": (report, search),
    "run.json": (report,),
    "fits/b/candidate.json": (report, status, search),
    "fits/b/001.json": (report, search, collect, ensemble),
    "fits/b/001-r1/history.jsonl": (report,),
    "fits/b/001-r1/cases.parquet": (collect,),
    "fits/b/001-r1/best.safetensors": (ensemble,),
    "results.parquet": (report,),
    "ensemble.parquet": (report,),
    "holdout.parquet": (report,),
    "model/model.json": (model,),
    "model/model.safetensors": (model,),
}
TOLD_BY = {"code.json": "", "model/model.json": "model/model.safetensors"}  # what does not fit to one of another run


@pytest.mark.engine
@pytest.mark.parametrize("name", READERS)
def test_whoever_reads_a_damaged_file_says_so_in_one_line_with_its_name(done: Path, other: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "s"
    shutil.copytree(done, run)
    for read in READERS[name]:
        read(run)
    for kind, harm in HARMS.items():
        (run / name).write_bytes(harm((done / name).read_bytes(), (other / name).read_bytes()))
        for read in READERS[name]:
            with pytest.raises(UserError) as refused:
                read(run)
            named = run / (TOLD_BY.get(name, name) if kind == "of another run" else name)
            assert str(named) in str(refused.value), (kind, read)
            assert "\n" not in str(refused.value), (kind, read)


@pytest.mark.engine
def test_a_file_of_another_fit_of_the_same_run_is_not_taken_for_this_one(done: Path, tmp_path: Path) -> None:
    run = tmp_path / "s"
    shutil.copytree(done, run)
    for one, another in (("a/000.json", "b/000.json"), ("a/candidate.json", "b/candidate.json")):
        shutil.copy(run / "fits" / one, run / "fits" / another)
        with pytest.raises(Damaged, match=another):
            Ledger(run).results(strict=True)
        shutil.copy(done / "fits" / another, run / "fits" / another)


MADE_AGAIN = {  # a file, and what a line must name
    "fits/a/000.json": "fits/a/000.json",
    "fits/a/001/history.jsonl": "fits/a/001/history.jsonl",
    "fits/b/000/cases.parquet": "fits/b/000/cases.parquet",
    "fits/b/001/best.safetensors": "fits/b/001/best.safetensors",
    "fits/b/001-r1.json": "fits/b/001-r1.json",
    "fits/b/001-r1/result.json": "fits/b/001-r1/result.json",
    "fits/b/000-r1/holdout.parquet": "",  # counted
    "results.parquet": "",
    "holdout.parquet": "",
    "ensemble.parquet": "",
    "model/model.safetensors": "model/model.safetensors",
    "fits/b/refit/best.safetensors": "fits/b/refit/best.safetensors",
    "stores": ".arrow",
}


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["flip 0", "flip 1", "half", "of another run"])
def test_what_a_run_has_made_is_made_again(
    done: Path, other: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "s"
    shutil.copytree(done.parent, tmp_path, dirs_exist_ok=True)
    for name in MADE_AGAIN:
        path = next((tmp_path / "stores").glob("*.arrow")) if name == "stores" else run / name
        mine, theirs = path.read_bytes(), (other / name).read_bytes() if name != "stores" else path.read_bytes()[::-1]
        path.write_bytes(HARMS[kind](mine, theirs))
    context, notes = go_on(run)
    said = "\n".join([*caplog.messages, *notes, *(note for fit in context.ledger.results().values() for note in fit.notes)])
    silent = {"fits/b/001-r1/result.json"} if kind == "of another run" else set()  # it says itself whose result it is
    assert {name for name in MADE_AGAIN.values() if name not in said} == silent, said
    for name in ("results.parquet", HOLDOUT, ENSEMBLE):
        pd.testing.assert_frame_equal(pd.read_parquet(run / name), pd.read_parquet(done / name))
    before = Ledger(done).results()
    same = {key: replace_notes(fit) for key, fit in context.ledger.results().items()}
    assert same == {key: replace_notes(fit) for key, fit in before.items()}
    for file in ("model/model.safetensors", "fits/b/001/best.safetensors", "fits/a/001/history.jsonl"):
        assert (run / file).read_bytes() == (done / file).read_bytes()
    assert go_on(run)[1] == [], "nothing is left to do"


def replace_notes(fit: FitResult) -> FitResult:
    """What does not depend on how often it ran."""
    return fit.replace(duration_s=0.0, peak_memory_mb=0.0, notes=(), attempt=0, resumed_epoch=None)


@pytest.mark.engine
def test_a_race_that_was_recorded_and_is_damaged_is_found_by_the_report_and_decided_again(done: Path, tmp_path: Path) -> None:
    run = tmp_path / "s"
    shutil.copytree(done, run)
    shutil.copy(run / "race.json", run / "fits/b/race.json")
    assert list(Ledger(run).races()) == ["b"]
    (run / "fits/b/race.json").write_bytes(flipped((run / "race.json").read_bytes(), 0))
    assert Ledger(run).races() == {}
    with pytest.raises(Damaged, match=r"fits/b/race\.json"):
        load_run(run)


@pytest.mark.engine
def test_a_run_by_its_command_makes_again_what_is_damaged_and_its_commands_say_what_is(
    tmp_path: Path, cache: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["softseg", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    study = STUDY.replace(splits=MonteCarlo(count=1), holdout=None, uncertainty=(), repeats=1)
    options = RunOptions(stores=tmp_path / "stores", final_model=False)
    run = Path(softseg_dist.run(study, out=tmp_path, local=True, options=options).folder)
    table = pd.read_parquet(run / "results.parquet")
    damaged = [run / "fits/a/000/cases.parquet", run / "fits/b/000/history.jsonl", run / "results.parquet"]
    for path in damaged:
        path.write_bytes(flipped(path.read_bytes(), 0))
    capsys.readouterr()
    for words in (("report",), ("report", "--json"), ("compare", str(run))):
        assert told(words[0], str(run), *words[1:]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert " is not as it was written" in said.err
    softseg_dist.run(study, out=tmp_path, local=True, options=options)
    said = capsys.readouterr()
    assert [path.name for path in damaged if str(path) in said.out] == ["cases.parquet", "history.jsonl"]
    pd.testing.assert_frame_equal(pd.read_parquet(run / "results.parquet"), table)
    assert told("report", str(run)) == 0


# Stores.


@pytest.mark.engine
def test_a_store_is_read_once_and_again_when_it_has_changed(done: Path, tmp_path: Path) -> None:
    (built,) = (done.parent / "stores").glob("*.arrow")
    path = shutil.copy(built, tmp_path)
    before = len(list((cache_folder() / "checked").iterdir()))
    assert local_store(path) == Path(path)
    assert len(list((cache_folder() / "checked").iterdir())) == before + 1
    for seed in range(40):
        Path(path).write_bytes(flipped(built.read_bytes(), seed))
        with pytest.raises(Damaged, match=r"\.arrow is not as it was written"):
            local_store(path)
    shutil.copy(built, path)
    assert local_store(path) == Path(path)


def test_a_case_that_changes_while_it_is_prepared_is_refused_and_no_store_stays(tmp_path: Path, cache: None) -> None:
    source = tmp_path / "image"

    class Rewritten(PhantomCase):
        """A case of a file that another program writes while it is read."""

        def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
            return (self.name, sha256_of(source))

        def load(self) -> CaseData:
            source.write_text(source.read_text() + "more")
            return super().load()

    def here(prepare: Callable[[Part], Path], parts: Sequence[Part]) -> Generator[Path, None, None]:
        yield from map(prepare, parts)

    source.write_text("first")
    data = Phantom(subjects=2, size=(16, 16), num_slices=1)
    with pytest.raises(UserError, match="sub-001: a file of it has changed since this began"):
        build_store(tmp_path, [Rewritten(data, 0)], data, Preprocess(dim=2), spread=here)
    assert not list(tmp_path.glob("*.arrow"))


@pytest.mark.engine
def test_a_fit_whose_store_is_damaged_leaves_nothing_that_is_final(done: Path, tmp_path: Path) -> None:
    """Found at its start, and if it happens while the fit runs, at its end."""
    shutil.copytree(done.parent, tmp_path, dirs_exist_ok=True)
    (store,) = (tmp_path / "stores").glob("*.arrow")
    context, _ = go_on(tmp_path / "s")
    whole = store.read_bytes()
    task = context.fit_task("a", BASE, context.splits[0]).replace(folder=str(tmp_path / "fit"), store=str(store))

    def harm(metrics: dict[str, float]) -> None:
        if metrics["epoch"] == BASE.optim.epochs:
            store.unlink()  # what is mapped stays
            store.write_bytes(flipped(whole, 0))

    for report in (harm, lambda metrics: None):
        with pytest.raises(Damaged, match=re.escape(str(store))):
            fit(task, Worker(report=report))
        assert not result_path(task.folder).exists()
    store.write_bytes(whole)
    assert fit(task).state == "finished"


# Fits.


@pytest.mark.engine
@pytest.mark.parametrize("harm", [*(f"flip {seed}" for seed in range(3)), "half", "empty", "folder"])
@pytest.mark.parametrize("file", ["checkpoint.pt", "best.safetensors"])
def test_a_fit_whose_checkpoint_or_best_weights_are_damaged_begins_anew_and_says_so(
    done: Path, tmp_path: Path, file: str, harm: str
) -> None:
    (store,) = (done.parent / "stores").glob("*.arrow")
    ledger = Ledger(done)
    known = ledger.results()["a/000"]
    task = FitTask(
        study=STUDY.name, seed=0, candidate="a", recipe=BASE, split=ledger.splits()[0], objective=STUDY.objective,
        store=str(store), store_fingerprint=Store.open(store).fingerprint, folder=str(tmp_path),
    )  # fmt: skip
    whole = fit(task.replace(folder=str(tmp_path / "whole")))
    epochs: list[float] = []
    with pytest.raises(Interrupted):
        fit(task, Worker(report=lambda metrics: epochs.append(metrics["epoch"]), stop=lambda: len(epochs) == 1))
    path = tmp_path / file
    if harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(HARMS[harm](path.read_bytes(), b""))
    again = fit(task)
    if harm != "folder" and (file == "checkpoint.pt" or whole.best_epoch == 1):
        assert (again.resumed_epoch, len(again.notes)) == (None, 1)
        assert f"{path} is not as it was written" in again.notes[0]
        assert "the fit began anew" in again.notes[0]
    assert again.files == whole.files
    assert (again.score, again.best_epoch) == (known.score, known.best_epoch) == (whole.score, whole.best_epoch)


def test_a_torn_last_line_of_a_history_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert history_of(tmp_path) == [{"epoch": 1}]


# Writing.


def test_what_killed_writers_left_is_swept_and_what_runs_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = partial_of(tmp_path / "a.json").name
    kept, old = tmp_path / name, tmp_path / "fits" / name.replace("a.json", "b.json")
    left = tmp_path / "fits" / name.replace(f".{os.getpid()}-", f".{ended.pid}-")
    elsewhere = tmp_path / f".{ended.pid}-000000.a.json"  # of another machine: its processes are not known here
    user = tmp_path / ".5-notes"
    (tmp_path / "fits").mkdir()
    for path in (kept, old, left, elsewhere, user):
        path.write_text("partial")
    os.utime(old, (time.time() - LEFT_S - 1,) * 2)
    sweep_partials(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {kept, elsewhere, user}


@pytest.mark.engine
def test_what_a_process_that_is_killed_in_a_run_leaves_is_gone_at_its_end(tmp_path: Path, cache: None) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = partial_of(Path("best.safetensors")).name.replace(f".{os.getpid()}-", f".{ended.pid}-")
    seen = list[Path]()

    class Killed(Progress):
        def show(self, event: str, **fields: Any) -> None:
            if event == "fit":
                seen.append(tmp_path / "s" / "fits" / str(fields["fit"]) / name)
                seen[-1].write_bytes(b"half")

    study = STUDY.replace(splits=MonteCarlo(count=1), holdout=None, uncertainty=(), repeats=1)
    run_study(StudyFile.of(study), RunOptions(out=tmp_path, stores=tmp_path / "stores", final_model=False, local=True), Killed())
    assert seen
    assert not [path for path in seen if path.exists()]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sync = list[list[str]](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append([path.name for path in tmp_path.iterdir()]), sync(number)))
    Place.at(tmp_path / "a").write(b"whole")
    assert seen == [[partial_of(tmp_path / "a").name], ["a"]], "and then its folder"
