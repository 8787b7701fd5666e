"""What a newcomer waits for: `softseg --help`, and the quickstart study from nothing to its report.

Run:     python tests/benchmarks/bench_quickstart.py
Targets: --help under 0.5 s; the quickstart under 5 minutes and 3 GB on 2 cores
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from record import Headline, record

ROOT = Path(__file__).parents[2]
SOFTSEG = [sys.executable, "-m", "softseg_dist.cli.main"]
SAMPLE_S = 1.0
HEADLINES = (
    Headline(key="quickstart_s", what="quickstart study, 48 fits, from nothing to its report", unit="s", at_most=300),
    Headline(key="quickstart_peak_gb", what="quickstart study: memory of all processes together", unit="GB", at_most=3),
    Headline(key="help_s", what="`softseg --help`", unit="s", at_most=0.5),
)


def main() -> None:
    help_s = statistics.median(_seconds([*SOFTSEG, "--help"]) for _ in range(5))
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        study = ROOT / "studies" / "s001_quickstart.py"
        lines = Path(folder) / "lines.json"  # a file: a pipe that is not read fills up and stops the study
        with lines.open("w") as stdout:
            run = subprocess.Popen([*SOFTSEG, "run", str(study), "--json"], cwd=folder, stdout=stdout)
            peak_bytes = _peak_memory(run)
        quickstart_s = time.monotonic() - started
        end = json.loads(lines.read_text().splitlines()[-1])
    assert end["end"] == "done", end
    figures = {"help_s": help_s, "quickstart_s": quickstart_s, "quickstart_peak_gb": peak_bytes / 1e9, "fits": end["finished"]}
    print(f"{'what':<42}{'measured':>12}{'target':>12}")
    print(f"{'softseg --help, median of 5 [s]':<42}{help_s:>12.2f}{'0.5':>12}")
    print(f"{'quickstart, ' + str(end['finished']) + ' fits [s]':<42}{quickstart_s:>12.0f}{'300':>12}")
    print(f"{'quickstart, all processes together [GB]':<42}{peak_bytes / 1e9:>12.2f}{'3':>12}")
    record("quickstart", figures, HEADLINES)


def _seconds(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


def _peak_memory(run: subprocess.Popen[bytes]) -> int:
    """High-water of the proportional set size of the process and all its children: memory shared by several counts once."""
    peak = 0
    while run.poll() is None:
        family = [psutil.Process(run.pid)]
        total = 0
        try:
            family += family[0].children(recursive=True)
            total = sum(_pss(process) for process in family)
        except psutil.NoSuchProcess:
            total = 0  # one ended while we looked; the next look is in a second
        peak = max(peak, total)
        time.sleep(SAMPLE_S)
    return peak


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


if __name__ == "__main__":
    main()
