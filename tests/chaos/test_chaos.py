"""Faults in real runs, each carried to its end; `make chaos` injects 100."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

sys.path.append(str(Path(__file__).parent))
from chaos import BEGIN, END, PAGE, RESULT, WRONG, Chaos, chaotic, compared, line, planned, table_of
from strikes import KINDS, Scene, kinds
from watched import NAME, Watched

pytestmark = pytest.mark.engine
SEED = 0
QUICK = ("the driver is killed", "the store is deleted")
MANY = range(1000, 1010)


@pytest.fixture(scope="module")
def chaos() -> Iterator[Chaos]:
    with chaotic(SEED) as one:
        yield one


@pytest.mark.parametrize("kind", QUICK)
def test_a_run_is_carried_to_its_end_in_spite_of_a_fault(chaos: Chaos, kind: str) -> None:
    number = next(n for n in range(1000) if (planned(n, SEED)[0].name, planned(n, SEED)[1]) == (kind, "local"))
    ended = chaos.one(number)
    assert (ended.kind, ended.end) == (kind, "right"), line(ended)


@pytest.mark.long
def test_ten_faults_of_any_kind(chaos: Chaos) -> None:
    assert not [line(ended) for ended in chaos.run(MANY) if ended.end in WRONG]


def test_another_record_of_a_finished_fit_or_a_fit_that_begins_anew_is_found(chaos: Chaos, tmp_path: Path) -> None:
    expected = chaos.expected("local")
    scene = Scene(Random(0), tmp_path)
    shutil.copytree(expected, scene.disk)
    scene.watched = Watched(tmp_path, scene.disk, (), {})
    scene.watched.look()
    assert compared(scene, expected) == []
    fits = scene.disk / "runs" / NAME / "fits" / "a"
    (fits / "000.json").write_text("{}")
    (fits / "001" / "history.jsonl").write_text("")
    (scene.disk / "runs" / NAME / "results.parquet").write_bytes((expected / "runs" / NAME / "results.parquet").read_bytes())
    scene.watched.look()
    scene.watched.close()
    assert {end for end, _ in compared(scene, expected)} == {"lost", "repeated"}


def test_a_number_gives_one_fault_and_100_have_every_kind() -> None:
    assert planned(47, SEED)[:2] == planned(47, SEED)[:2]
    assert {planned(number, SEED)[0].name for number in range(100)} == {kind.name for kind in kinds()}
    assert len(KINDS) == 14


def test_the_page_shows_the_committed_result() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table_of(json.loads(RESULT.read_text())).strip(), "run python tests/chaos/chaos.py --write"
