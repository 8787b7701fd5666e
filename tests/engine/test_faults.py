"""Processes of a study are killed at random: nothing that had finished is lost, what ran goes on, the results are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
FAULTS = Path(__file__).parent / "faults.py"


@pytest.mark.long
@pytest.mark.parametrize(("workers", "kinds"), [(1, ["worker", "driver"]), (2, ["worker"])])
def test_kills_at_random_moments_cost_time_only(tmp_path: Path, workers: int, kinds: list[str]) -> None:
    command = [sys.executable, str(FAULTS), str(tmp_path), "0", str(workers), *kinds]
    told = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert told.returncode == 0, told.stdout + told.stderr
    figures = json.loads(told.stdout.splitlines()[-1])
    assert figures["kills"] == len(kinds)
    assert figures["continued"] > 0
    wrong = {name: figures[name] for name in ("lost", "repeated", "different", "reserved")}
    assert wrong == dict.fromkeys(wrong, 0)
