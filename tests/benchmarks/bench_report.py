"""What a report of 60 candidates on 15 splits costs: 12 test subjects per split, 4 raters, everything that a fit measures.

Run:     python tests/benchmarks/bench_report.py [--candidates 60] [--splits 15]
Target: `softseg report`, from its start to its page, in under 60 s
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from record import Headline, record
from sealed_files import put_table

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from synthetic_measures import ALL
from synthetic_run import CELLS, write_run

from softseg_dist.report.run_folder import load_run
from softseg_dist.report.tables import summarise

HEADLINES = (
    Headline(
        key="softseg_report_s",
        what="`softseg report` of 60 candidates on 15 splits, 4 raters, everything measured",
        unit="s",
        at_most=60,
    ),
)


def main(candidates: int, splits: int) -> None:
    """Write a run, then measure what its report is made of, and `softseg report` as a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_run(
            Path(name),
            proposed=[f"trial-{i:04d}" for i in range(candidates - len(CELLS))],
            num_splits=splits,
            num_subjects=60,
            num_tested=12,
            raters=("rater1", "rater2", "rater3", "rater4"),
            measured=ALL,
        )
        num_rows = _add_validation(folder)
        seconds = {}
        before = time.perf_counter()
        run = load_run(folder)
        seconds["load"] = time.perf_counter() - before
        before = time.perf_counter()
        summarise(run)
        seconds["numbers"] = time.perf_counter() - before
        before = time.perf_counter()
        subprocess.run([sys.executable, "-m", "softseg_dist.cli.main", "report", name], check=True, stdout=subprocess.DEVNULL)
        seconds["softseg report"] = time.perf_counter() - before
        size_mb = (folder / "report" / "index.html").stat().st_size / 1e6
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds["its processor"], memory_gb = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6
    print(f"{candidates} candidates, {splits} splits, {num_rows:,} rows")
    print("".join(f"{part:>16}" for part in seconds) + f"{'page':>16}{'memory':>16}")
    print("".join(f"{value:>14.1f} s" for value in seconds.values()) + f"{size_mb:>13.1f} MB{memory_gb:>13.1f} GB")
    figures = {f"{part.replace(' ', '_')}_s": value for part, value in seconds.items()}
    figures |= {"page_mb": size_mb, "memory_gb": memory_gb, "rows": num_rows}
    record("report", figures, HEADLINES, short=candidates * splits < 60 * 15)


def _add_validation(folder: Path) -> int:
    """As many rows on validation as on test, which a report must not be slowed by; returns the number of all rows."""
    table = pd.read_parquet(folder / "results.parquet")
    both = pd.concat([table, table.assign(subset="validation")], ignore_index=True)
    put_table(both, folder / "results.parquet")
    return len(both)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--splits", type=int, default=15)
    options = parser.parse_args()
    main(options.candidates, options.splits)
