"""`softseg verify`: fits that are run anew have the rows that were recorded, or the first that has not is named."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sealed_files import put, put_table, value_of, vouch

from softseg_dist import NUMERICS, Dice, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Study, UNet
from softseg_dist.cli.main import main
from softseg_dist.data.store import build_store
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.local import LocalBackend
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.session import Outcome, run_search
from softseg_dist.frozen import digest
from softseg_dist.judging.judge import Measurement
from softseg_dist.judging.results import Head
from softseg_dist.pipeline import RunOptions, provenance
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.training.task import FitResult
from softseg_dist.verification import FitCheck, _compared, verify_run

BASE = Recipe(network=UNet(filters=(2, 4)), optim=Optim(lr=1e-2, epochs=2, batch_size=8))
STUDY = Study(
    name="s",
    question="Is it the same again?",
    data=Phantom(subjects=6, size=(16, 16), num_slices=1, raters=2),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2),
    candidates={"a": BASE, "b": BASE.replace(loss=Dice())},
)
KEYS = ("a/000", "a/001", "b/000", "b/001")


def opened(folder: Path) -> RunContext:
    store = build_store(folder.parent / "stores", STUDY.data.cases(None), STUDY.data, STUDY.preprocess)
    prepared, ledger = Prepared(str(store)), Ledger(folder)
    splits = STUDY.make_splits(prepared.sites, prepared.persons)
    ledger.open_study(STUDY, splits, prepared.fingerprint)
    ledger.write("run.json", provenance("") | {"store": str(store), "store_fingerprint": prepared.fingerprint})
    lines = PlainLines(io.StringIO())
    return RunContext(STUDY, splits, prepared, ledger, WorkingCopy(folder), STUDY.resources, LocalBackend(), lines)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = opened(tmp_path_factory.mktemp("done") / "s")
    assert run_search(context) == Outcome(4, 0, 0, interrupted=False)
    return context.copy.folder


@pytest.fixture
def run(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return shutil.copytree(done, tmp_path / "s")


def softseg(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["softseg", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(run: Path, key: str, edit: Callable[[pd.DataFrame], object]) -> None:
    """Another table of a fit, sealed and recorded as its own."""
    path = run / "fits" / key / "cases.parquet"
    rows = pd.read_parquet(path)
    edit(rows)
    put_table(rows, path, "")
    vouch(path.parent)


# What is compared.

VERSIONS = {"python": "3.11", "torch": "2.0"}
FIT = FitResult(candidate="a", split=0, state="finished", engine="float32", versions=VERSIONS, process="here")
CASES = [(case, name, metric) for case in ("c1", "c2") for name in ("GM", "WM") for metric in ("brier", "volume_mm3")]


def table() -> pd.DataFrame:
    """Rows about two cases."""
    rows = [
        row
        for case, name, metric in CASES
        for row in Head("s", "a", 0, 0, "test", "own", case, case).rows([Measurement(name, "mean", None, metric, 0.5)])
    ]
    return pd.DataFrame(rows).astype({"threshold": float})


def with_value(value: float, number: int = 3) -> pd.DataFrame:
    rows = table()
    rows.loc[number, "value"] = value
    return rows


def test_equal_means_every_bit_and_undefined_is_equal_to_undefined() -> None:
    assert _compared(FIT, FIT, table(), table()) == FitCheck("a/000", "equal", 8)
    assert _compared(FIT, FIT, with_value(np.nan), with_value(np.nan)).verdict == "equal"
    assert _compared(FIT, FIT, with_value(np.inf), with_value(np.inf)).verdict == "equal"
    last_digit = _compared(FIT, FIT, table(), with_value(np.nextafter(0.5, 1)))
    assert (last_digit.verdict, last_digit.differing, last_digit.largest) == ("differs", 1, 2**-53)
    sign = _compared(FIT, FIT, with_value(0.0), with_value(-0.0))
    assert (sign.verdict, sign.differing, sign.largest, sign.where) == ("differs", 1, 0.0, "test, c1, WM, volume_mm3")


@pytest.mark.parametrize(
    "other", [with_value(np.nan), with_value(np.inf), table().drop(index=range(3, 8)), table().assign(subset="x")]
)
def test_a_value_that_one_side_lacks_differs_without_a_size(other: pd.DataFrame) -> None:
    two = FIT.replace(num_workers=2)
    for pair in ((table(), other), (other, table())):
        check = _compared(two, FIT, *pair)
        assert (check.verdict, check.largest) == ("differs", None)
        assert "the largest difference at " in str(check)
        assert check.where.endswith(("c1, WM, volume_mm3", "x, c1, GM, brier", "test, c1, GM, brier"))


@pytest.mark.parametrize(
    ("gap", "change", "verdict", "why"),
    [
        (1e-5, {"num_workers": 2}, "within rounding", "recorded with 2 workers, now float32"),
        (1e-5, {"engine": "bfloat16, graph"}, "within rounding", "recorded with bfloat16, graph, now float32"),
        (1e-5, {"engine": "float32", "notes": ("graph: not used, a loss waits",)}, "within rounding", ""),
        (1e-5, {}, "differs", ""),
        (1e-5, {"versions": {"python": "3.11", "torch": "1.0"}}, "differs", "recorded with torch 1.0, now torch 2.0"),
        (1e-5, {"process": "far"}, "differs", "recorded with far, now here"),
        (2e-3, {"num_workers": 2}, "differs", "recorded with 2 workers, now float32"),
        (0, {"num_workers": 2}, "equal", ""),
    ],
)
def test_only_several_workers_and_gpus_may_round(gap: float, change: dict[str, Any], verdict: str, why: str) -> None:
    check = _compared(FIT.replace(**change), FIT, with_value(0.5 + gap), table())
    assert (check.verdict, check.why) == (verdict, (why,) if why else ())
    assert check.largest == pytest.approx(gap, abs=1e-12)


def test_rounding_of_large_values_is_relative() -> None:
    two = FIT.replace(num_workers=2)
    assert _compared(two, FIT, with_value(5000.0), with_value(5004.0)).verdict == "within rounding"
    assert _compared(two, FIT, with_value(5000.0), with_value(5006.0)).verdict == "differs"


# Runs.


@pytest.mark.engine
def test_every_fit_is_equal_and_nothing_is_left_or_changed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run)
    killed = run.parent / f"tmp/.softseg-verify-{os.getuid()}-killed/.lock"
    killed.parent.mkdir()
    killed.touch()
    os.utime(killed, (0, 0))
    assert softseg(monkeypatch, "verify", run, "--local", "--fits", "all") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "equal" in line]
    assert [line.partition(": equal, ")[0] for line in lines] == list(KEYS)
    assert files_of(run) == before
    assert list((run.parent / "tmp").iterdir()) == []


@pytest.mark.engine
def test_a_changed_row_is_found_and_named(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pd.read_parquet(run / "fits/a/001/cases.parquet")
    number = rows.index[(rows["metric"] == "brier") & (rows["subset"] == "test")][0]
    change(run, "a/001", lambda rows: rows.__setitem__("value", rows["value"].where(rows.index != number, rows["value"] + 0.25)))
    assert softseg(monkeypatch, "verify", run, "--local", "--fits", "all", "--json") == 1
    checks = {check["fit"]: check for check in json.loads(capsys.readouterr().out)}
    assert {key: check["verdict"] for key, check in checks.items()} == dict.fromkeys(KEYS, "equal") | {"a/001": "differs"}
    found, row = checks["a/001"], rows.loc[number]
    assert (found["differing"], found["largest"]) == (1, pytest.approx(0.25))
    assert found["where"] == f"test, {row['case']}, {row['class']}, brier"


@pytest.mark.engine
def test_a_changed_number_of_the_result_is_found_and_named(run: Path) -> None:
    record = run / "fits/b/000.json"
    value = value_of(record)
    put(record, value | {"thresholds": value["thresholds"] | {"fixed": 0.75}, "duration_s": 1e6, "process": "elsewhere"})
    lines = io.StringIO()
    (check,) = [check for check in verify_run(run, None, RunOptions(local=True), PlainLines(lines)) if check.verdict != "equal"]
    assert (check.fit, check.differing, check.largest) == ("b/000", 1, pytest.approx(0.25))
    assert check.where == "the result: finished, thresholds.fixed"
    assert (
        f"b/000: differs, 1 of {check.rows} rows, the largest difference 0.25 at {check.where}; recorded with elsewhere, now "
        in lines.getvalue()
    )


@pytest.mark.engine
def test_the_same_fits_are_drawn_again_and_another_seed_draws_others(run: Path) -> None:
    def drawn(seed: int) -> str:
        (check,) = verify_run(run, 1, RunOptions(local=True), PlainLines(io.StringIO()), seed)
        return check.fit

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.engine
def test_what_is_not_as_recorded_comes_first(run: Path) -> None:
    facts, lines = value_of(run / "run.json"), io.StringIO()
    put(run / "run.json", facts | {"versions": facts["versions"] | {"torch": "1.0"}, "machine": facts["machine"] | {"host": "far"}})
    put(run / "code.json", value_of(run / "code.json") | {"numerics": -1})
    verify_run(run, 1, RunOptions(local=True), PlainLines(lines))
    first, second, third, *_ = lines.getvalue().splitlines()
    assert third == f"not as recorded: numerics {NUMERICS}, it was -1"
    assert first == f"not as recorded: torch {facts['versions']['torch']}, it was 1.0"
    assert second == f"not as recorded: host {facts['machine']['host']}, it was far"


@pytest.mark.engine
def test_code_that_this_user_has_not_run_needs_trust(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    text = "raise RuntimeError('it was executed')"
    (run / "sources").mkdir()
    (run / f"sources/{digest(text)}.py").write_text(text)
    put(run / "code.json", value_of(run / "code.json") | {"sources": [{"study": "s.py", "files": {"s.py": digest(text)}}]})
    assert softseg(monkeypatch, "verify", run, "--local") == 2
    assert "verifying a run executes its code (s.py), which you have not run on this machine; if you" in capsys.readouterr().err
    assert softseg(monkeypatch, "verify", run, "--local", "--trust") == 2
    assert "it was executed" in capsys.readouterr().err


@pytest.mark.engine
def test_what_cannot_be_verified_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path / "new" / "s")
    for words, expected in {
        (tmp_path / "new/s",): "no fit has finished yet",
        (tmp_path,): "not a run folder",
        (run, "--fits", "0"): "--fits takes a number from 1 on, or all, got '0'",
        (run, "--fits", "some"): "--fits takes a number from 1 on, or all, got 'some'",
    }.items():
        assert softseg(monkeypatch, "verify", *words, "--local") == 2
        error = capsys.readouterr().err
        assert (expected in error, error.count("\n")) == (True, 1)
