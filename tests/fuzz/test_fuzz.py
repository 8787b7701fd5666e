"""1,000 damaged inputs, each read right or refused in one clear line; `make fuzz` reads 10,000."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from fuzzer import BEGIN, END, PAGE, RESULT, WRONG, Fuzzer, fuzzing, summary, table

pytestmark = pytest.mark.engine
INPUTS = 1000


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    with fuzzing(seed=1) as one:
        yield one


def test_no_damage_is_believed_or_ends_in_a_traceback(fuzzer: Fuzzer) -> None:
    found = summary(fuzzer.run(INPUTS), fuzzer.seed)
    assert not found["failures"]
    assert len(found["counts"]) == len(fuzzer.kinds), "of each kind"
    assert found["by_command"] >= INPUTS // 100


def test_a_number_gives_one_input_again(fuzzer: Fuzzer) -> None:
    first, again = ([(one.kind, one.file, one.done, one.end) for one in fuzzer.run(20)] for _ in range(2))
    assert first == again


def test_a_reader_that_believes_damage_is_found(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softseg_dist.sealed.is_sealed", lambda content, key="": True)
    ends = {one.end for one in fuzzer.run(400)}
    assert ends & set(WRONG)


def test_the_page_shows_the_committed_result() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(json.loads(RESULT.read_text())).strip(), "run python tests/fuzz/fuzzer.py --write"
