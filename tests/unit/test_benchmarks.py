"""What benchmarks measured is shown as it was measured: in docs/benchmarks.md, in the summary, in the list of benchmarks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from record import RESULTS, Headline, Machine, Result, read, this_machine
from summary import BEGIN, END, PAGE, markdown, table, written

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SLOW = Headline(key="slow_s", what="a slow thing", unit="s", at_most=2)
FAST = Headline(key="ratio", what="a fast thing", unit="times", at_least=3)
LAPTOP = Machine(processor="CPU", cores=2)


def result(machine: Machine = LAPTOP, short: bool = False) -> Result:
    return Result(
        name="things",
        command="python things.py",
        date="2026-11-25",
        machine=machine,
        short=short,
        figures={"slow_s": 2.5, "ratio": 3.14159},
        headlines=(SLOW, FAST),
    )


def test_the_page_shows_the_committed_results() -> None:
    text = PAGE.read_text()
    assert written(text, read(RESULTS)) == text, "run python tests/benchmarks/summary.py --write"


def test_the_page_marks_exactly_the_missed_targets() -> None:
    slow, fast = [line for line in markdown([result()]).splitlines() if " thing |" in line]
    assert "| at most 2 s; **missed** |" in slow
    assert "| at least 3 times |" in fast


def test_committed_results_are_complete_runs() -> None:
    assert not [of.name for of in read(RESULTS) if of.short]


def test_every_benchmark_is_in_the_list() -> None:
    listed = (BENCHMARKS / "README.md").read_text()
    assert not [path.name for path in BENCHMARKS.glob("bench_*.py") if f"| `{path.name}` |" not in listed]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_file_of_the_benchmarks_can_be_imported(path: Path) -> None:
    assert Path(str(importlib.import_module(path.stem).__file__)) == path


def test_a_target_is_met_or_not() -> None:
    slow, fast = table([result()]).splitlines()[1:]
    assert "2.5 s       at most 2 s" in slow
    assert slow.split()[-3:] == ["not", "met", "2026-11-25"]
    assert "3.14 times  at least 3 times" in fast
    assert fast.split()[-3:] == ["times", "met", "2026-11-25"]


def test_a_short_run_is_not_judged() -> None:
    assert all("short run" in line for line in table([result(short=True)]).splitlines()[1:])


def test_every_machine_has_a_table_of_its_own() -> None:
    shown = markdown([result(), result(Machine(processor="CPU", cores=16, gpu="a GPU", memory_gb=128))])
    assert [line for line in shown.splitlines() if line.endswith(":")] == [
        "CPU, 2 cores, no GPU; 2026-11-25:",
        "CPU, 16 cores, 128 GB, a GPU; 2026-11-25:",
    ]


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = written(text, [result()])
    assert (new.startswith(f"before\n{BEGIN}\n"), new.endswith(f"{END}\nafter\n"), "old" in new) == (True, True, False)
    assert written(new, [result()]) == new
    with pytest.raises(ValueError, match="put them where"):
        written("no markers", [result()])


def test_a_headline_needs_its_figure() -> None:
    with pytest.raises(ValidationError, match="things has no figure missing"):
        result().model_validate(result().model_dump() | {"headlines": [{"key": "missing", "what": ""}]})


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    before = result(this_machine())
    (tmp_path / before.file_name).write_text(before.model_dump_json(exclude_defaults=True))
    assert read(tmp_path) == [before]
