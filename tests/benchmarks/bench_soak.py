"""Does a long study grow? 2,000 tiny real fits by `softseg run`: memory and open files of the driver and of what trains.

They are looked at whenever 100 more fits have ended; the first 200 warm everything up. Then MLflow's database is counted.

Run:     python tests/benchmarks/bench_soak.py [--fits 2000]    (without: a short run, 300 fits)
Targets: memory of driver and workers within 5 % after the first 200 fits, open files flat, every fit complete in MLflow
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from record import Headline, record

LONG, SHORT = 2_000, 300
SPLITS, EVERY, WARM = 10, 100, 200
SOFTSEG = [sys.executable, "-m", "softseg_dist.cli.main"]
OF_RAY = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
STUDY = '''"""Does a long study grow?"""
from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, Search, Study, UNet

BASE = Recipe(network=UNet(filters=(2, 4)), optim=Optim(epochs=1, batch_size=8))


def propose(trial):
    return BASE.replace(optim=Optim(epochs=1, batch_size=8, lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))


STUDY = Study(
    name="soak",
    question="Does a long study grow?",
    data=Phantom(subjects=6, size=(16, 16), num_slices=1),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count={splits}),
    candidates={{"control": BASE}},
    control="control",
    search=Search(propose, trials={trials}, race=None),
)
'''
HEADLINES = (
    Headline(key="driver", what="2,000 fits: memory of the driver at the end, to that after 200", unit="times", at_most=1.05),
    Headline(key="worker", what="the same of the processes that train", unit="times", at_most=1.05),
    Headline(key="driver, files", what="open files of the driver, more at the end", at_most=0),
    Headline(key="worker, files", what="open files of the processes that train, more at the end", at_most=0),
    Headline(key="missing", what="fits that MLflow does not have, or not complete", at_most=0),
)
Look = tuple[int, float, int, float, int]
"""Fits that have ended; MB and open files of the driver, and the largest of those of the processes that train."""


def main(fits: int) -> None:
    """Run, look, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "soak.py"
        study.write_text(STUDY.format(splits=SPLITS, trials=fits // SPLITS - 1))
        run = subprocess.Popen([*SOFTSEG, "run", str(study), "--json"], cwd=folder, stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        looks, ended = list[Look](), 0
        print(f"{'fits':>6}{'driver [MB]':>14}{'files':>8}{'worker [MB]':>14}{'files':>8}")
        for line in run.stdout:
            event = json.loads(line)
            if event.get("event") == "fit":
                ended += 1
                if ended % EVERY == 0:
                    looks.append(look(ended, psutil.Process(run.pid)))
                    print("{:>6}{:>14.1f}{:>8}{:>14.1f}{:>8}".format(*looks[-1]), flush=True)
        assert run.wait() == 0
        assert ended == fits, f"{ended} fits ended"
        missing = fits - complete(Path(folder) / "runs" / "soak" / "mlflow.db")
    first, early, late = looks[WARM // EVERY - 1], looks[WARM // EVERY - 1 :][: len(looks) // 4], looks[-len(looks) // 4 :]
    figures: dict[str, float] = {"missing": missing}
    for name, mb, files in (("driver", 1, 2), ("worker", 3, 4)):
        largest = max(one[mb] for one in late)  # what a process holds goes up and down
        figures |= {name: largest / first[mb], f"{name}, MB": largest}
        # The fewest of several looks: a file that is only open for a moment adds to one of them, one that is never closed to all.
        figures[f"{name}, files"] = min(one[files] for one in late) - min(one[files] for one in early)
    print(json.dumps(figures, indent=1))
    record("soak", figures, HEADLINES, short=fits != LONG)


def look(ended: int, driver: psutil.Process) -> Look:
    """At the driver, and at the actors of its Ray."""
    titles = {child: " ".join(child.cmdline()) for child in driver.children(recursive=True)}
    actors = [child for child, title in titles.items() if title.startswith("ray::") and not title.startswith(OF_RAY)]
    family = [driver, *actors]
    seen = [(process.memory_full_info().uss / 2**20, process.num_fds()) for process in family]
    return (ended, *seen[0], max(mb for mb, _ in seen[1:]), max(files for _, files in seen[1:]))


def complete(database: Path) -> int:
    """Runs of fits that MLflow has as FINISHED, with a score and a curve."""
    query = """
        select count(*) from runs r where r.status = 'FINISHED'
            and exists (select 1 from latest_metrics m where m.run_uuid = r.run_uuid and m.key = 'score')
            and exists (select 1 from metrics m where m.run_uuid = r.run_uuid and m.key = 'loss')
    """
    with sqlite3.connect(database) as base:
        return int(base.execute(query).fetchone()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fits", type=int, default=SHORT)
    main(parser.parse_args().fits)
