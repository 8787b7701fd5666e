"""How many fits does racing save, and does it find the winner of the full grid?

Run:     python tests/benchmarks/bench_racing.py [--runs 100] [--seeds 10]
Targets: simulated, at most 40 % of the fits of 60 candidates x 15 splits and 55 % of 20 x 10, with the winner of the full grid, or
         one that cannot be told from it, in 98 of 100 runs; real training on a phantom and on the hippocampus, the same or as
         good in 9 of 10 seeds

Scores are made first, all of them, and the searcher then meets them one by one, as a study with one fit at a time would. The
simulated ones are candidate + split + noise, normal with standard deviations 1, 2 and 1: the noise of a fit is as large as what
candidates differ by. The exact Wilcoxon test stands beside the rule that is used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from record import record
from scipy.stats import ttest_rel, wilcoxon

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from driven_search import finished, run, searcher

from softseg_dist import MonteCarlo, Phantom, Recipe, Search, Study
from softseg_dist.search import race

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a ledger that need not be durable
SIMULATED = ((60, 15), (20, 10))  # candidates, splits
Table = npt.NDArray[np.float64]  # scores [candidate x split], higher is better


@dataclass(frozen=True)
class Raced:
    """One race over a table: the share of its fits that ran, and whether the winner is the full table's, or as good."""

    used: float
    same: bool
    as_good: bool


def main(runs: int) -> None:
    """Measure, and print a table."""
    figures: dict[str, float] = {}
    print(f"{'':<44}{'fits used':>12}{'same winner':>14}{'or as good':>12}")
    for candidates, splits in SIMULATED:
        tables = [simulate(seed, candidates, splits) for seed in range(runs)]
        for rule, p in (("t", race.p_worse), ("wilcoxon", wilcoxon_p)):
            for startup in (candidates, 10):
                with patch.object(race, "p_worse", p):
                    raced = [replay(table, startup) for table in tables]
                figures |= show(f"simulated_{candidates}x{splits}_{rule}_startup_{startup}", raced)
    record("racing", figures)


def show(name: str, raced: list[Raced]) -> dict[str, float]:
    """Print a row; returns it for the record."""
    used = float(np.mean([r.used for r in raced]))
    same, as_good = sum(r.same for r in raced), sum(r.as_good for r in raced)
    print(f"{name:<44}{used:>12.3f}{same:>8} of {len(raced)}{as_good:>6} of {len(raced)}", flush=True)
    return {f"{name}_used": used, f"{name}_same": same / len(raced), f"{name}_as_good": as_good / len(raced)}


def simulate(seed: int, candidates: int, splits: int) -> Table:
    """Scores of candidates that differ by as much as two fits of one of them."""
    generator = np.random.default_rng(seed)
    quality, difficulty = generator.normal(0, 1, (candidates, 1)), generator.normal(0, 2, (1, splits))
    return np.asarray(quality + difficulty + generator.normal(0, 1, (candidates, splits)))


def replay(table: Table, startup: int) -> Raced:
    """Race over a table of scores: row i is trial i of a search, the first `startup` of which are opened together."""

    def score(number: str) -> int:
        return int(number.rpartition("-")[2])

    study = Study(
        name="race",
        question="Who wins?",
        data=Phantom(subjects=10),
        splits=MonteCarlo(count=table.shape[1]),
        search=Search(propose, trials=len(table), startup_trials=startup),
    )
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        search = searcher(Path(folder), study)
        tasks = run(search, table.size, lambda task: finished(task, table[score(task.candidate), task.split.index]))
        kept = [score(name) for name, candidate in search.candidates.items() if candidate.raced is None]
    means = table.mean(axis=1)
    winner, best = max(kept, key=lambda row: means[row]), int(means.argmax())
    as_good = winner == best or ttest_rel(table[best], table[winner]).pvalue >= 0.05
    return Raced(len(tasks) / table.size, winner == best, bool(as_good))


def propose(trial) -> Recipe:  # type: ignore[no-untyped-def]
    """What is proposed does not matter: scores go by the number of the trial."""
    trial.suggest_float("x", 0, 1)
    return Recipe()


def wilcoxon_p(differences: npt.ArrayLike, rounding: float = 0.0) -> float:
    """What Optuna's WilcoxonPruner computes."""
    return float(wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100)
    main(parser.parse_args().runs)
