"""The shell scripts of tests/ are free of known mistakes; first_minutes.sh reports every part, versions.sh takes both ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TESTS = Path(__file__).parents[1]
FIRST_MINUTES = TESTS / "gpu/first_minutes.sh"
# Stands in for Python: prints its arguments, fails where FAILS is one of them, and hangs where HANGS is.
STAND_IN = """#!{python} -S
import os, runpy, sys, time
words = sys.argv[1:]
if words[:2] == ["-m", "zipfile"]:
    sys.argv = words[1:]
    runpy.run_module("zipfile", run_name="__main__")
print("figure of", *words)
if words[0].endswith("machine.py"):
    import carried_package
    sys.exit(int(os.environ["MACHINE"]))
if os.environ.get("HANGS") in words:
    time.sleep(600)
sys.exit(os.environ.get("FAILS") in words)
"""
PARTS = (
    "versions", "many fits", "engine", "memory of steps", "memory of fits", "whole fit", "bench_gpu.py unet32",
    "bench_gpu.py unet3d", "fits and threads",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    command = [Path(sys.executable).parent / "shellcheck", "--severity=style", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def first_minutes(folder: Path, *arguments: str, machine: int = 0, **more: str) -> tuple[int, list[str], str]:
    """Run the script with a stand-in for Python; its exit code, its results.txt by line, and what it prints."""
    python, wheels = folder / "python", folder / "wheels"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried_package-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_package.py", "")
    environment = os.environ | {"PYTHON": str(python), "OUT": str(folder / "out"), "MACHINE": str(machine)} | more
    command = [str(FIRST_MINUTES), "--wheels", str(wheels), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    results = folder / "out/results.txt"
    return done.returncode, results.read_text().splitlines() if results.exists() else [], done.stdout + done.stderr


def verdicts(results: list[str]) -> dict[str, str]:
    lines = [line for line in results if not line.startswith(" ")]
    return {line[:22].strip(): line[22:].split("  ")[0].strip() for line in lines}


def test_every_part_is_reported_with_its_figure(tmp_path: Path) -> None:
    code, results, printed = first_minutes(tmp_path)
    assert code == 0, printed
    assert verdicts(results) == dict.fromkeys(PARTS, "ok")
    assert any("figure of tests/benchmarks/bench_gpu.py --short unet3d" in line for line in results)
    assert set(results) <= set(printed.splitlines())
    assert "==== whole fit" in (tmp_path / "out/log.txt").read_text()


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    code, results, printed = first_minutes(tmp_path, FAILS="tests/gpu/test_many_fits_on_gpu.py")
    assert code == 1
    assert verdicts(results) == dict.fromkeys(PARTS, "ok") | {"many fits": "failed"}
    assert "not all parts passed" in printed


@pytest.mark.engine
def test_a_part_that_hangs_is_ended_and_parts_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    code, results, _ = first_minutes(tmp_path, "--seconds", "5", HANGS="tests/gpu/test_many_fits_on_gpu.py")
    assert code == 1
    late = dict.fromkeys(PARTS[2:], "not run: no time is left")
    assert verdicts(results) == {"versions": "ok", "many fits": "timed out"} | late


def test_without_a_gpu_it_ends_at_once_with_exit_code_2(tmp_path: Path) -> None:
    code, results, _ = first_minutes(tmp_path, machine=2)
    assert code == 2
    assert list(verdicts(results)) == ["versions"]


def test_on_a_machine_that_lacks_a_package_nothing_else_runs(tmp_path: Path) -> None:
    code, results, _ = first_minutes(tmp_path, machine=1)
    assert code == 1
    assert list(verdicts(results)) == ["versions"]


@pytest.mark.parametrize("arguments", [("--wheel",), ("--seconds", "0"), ("--wheels", "no/such/folder")])
def test_a_mistake_in_the_arguments_runs_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, results, printed = first_minutes(tmp_path, *arguments)
    assert (code, results) == (2, [])
    assert "usage" in printed or "no such folder" in printed


def test_versions_are_tried_at_both_ends_of_what_the_package_allows() -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    listed = subprocess.run([TESTS / "versions.sh", "--list"], env=environment, capture_output=True, text=True, check=True)
    needs = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    torch, ray = (next(need for need in needs if re.match(rf"{name}\b", need)) for name in ("torch", "ray"))
    oldest, newest = ([Requirement(word) for word in line.split()] for line in listed.stdout.splitlines())
    assert [need.name for need in oldest] == [need.name for need in newest] == ["torch", "ray"]
    for allowed, low, high in zip(map(Requirement, (torch, ray)), oldest, newest, strict=True):
        assert high.specifier == allowed.specifier
        first = next(str(limit.version) for limit in allowed.specifier if limit.operator == ">=")
        assert str(low.specifier) == f"=={first}.*"
        assert first in low.specifier
