"""The Python interface as a notebook uses it: a study runs while an event loop runs, in a thread, from a script without a guard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from extending_files import FILES

pytestmark = pytest.mark.engine

CELL = '''
import asyncio
import sys
import threading

import softseg_dist
from missed_voxels import STUDY


async def cell():
    """A cell of a notebook is executed while the loop of its kernel runs."""
    return softseg_dist.run(STUDY, out="runs", local=True, debug=True)


run = asyncio.run(cell())
assert run.outcome.finished == len(run.fits) == 6
assert (run.outcome.failed, run.outcome.unfinished, run.outcome.interrupted) == (0, 0, False)
assert set(run.ranking["candidate"]) == {"brier", "missed_weight2", "missed_weight4"}
assert run.report().is_file()

again = []
thread = threading.Thread(target=lambda: again.append(softseg_dist.run("missed_voxels.py", local=True, debug=True)))
thread.start()
thread.join()
assert again[0].outcome == run.outcome, "the study file and the study in Python are one study"
assert "ray" not in sys.modules
print(run.answer)
'''


def test_a_study_runs_in_a_cell_and_in_a_thread_without_ray(tmp_path: Path) -> None:
    (tmp_path / "missed_voxels.py").write_text(FILES["missed_voxels.py"])
    (tmp_path / "cell.py").write_text(CELL)
    ran = subprocess.run([sys.executable, "cell.py"], cwd=tmp_path, capture_output=True, text=True, timeout=550)
    assert ran.returncode == 0, ran.stderr
    assert "brier" in ran.stdout.splitlines()[-1]
    assert "6/6  missed" in ran.stdout, "progress is plain lines where there is no terminal"
