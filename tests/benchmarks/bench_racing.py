"""How many fits does racing save, and does it find the winner of the full grid?

Run:     python tests/benchmarks/bench_racing.py --runs 100 --seeds 10    (without: a short run, 2 and 1)
Targets: simulated, at most 40 % of the fits of 60 candidates x 15 splits and 55 % of 20 x 10, with the winner of the full grid, or
         one not distinguishable from it, in 98 of 100 runs; really trained on a phantom and on the hippocampus, 20 candidates x 10
         splits, the same or as good in 9 of 10 seeds

All scores of a grid are made first, and the searcher then meets them one by one, as a study with one fit at a time would. The
simulated ones are candidate + split + noise, normal with standard deviations 1, 2 and 1: the noise of a fit is as large as what
candidates differ by. All candidates are opened together, as random ones are, or 10 of them and then one after the other, as those
that Optuna learns to propose. The exact Wilcoxon test stands beside the rule that is used. The hippocampus needs
SOFTSEG_TEST_DATA.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from record import Headline, record
from scipy.stats import ttest_rel, wilcoxon

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from driven_search import finished, run, searcher

from softseg_dist import (
    BCE,
    AdaptiveWing,
    Bids,
    Brier,
    DataSet,
    DiceSemimetric,
    MonteCarlo,
    Optim,
    Phantom,
    Preprocess,
    Recipe,
    Search,
    Study,
    UNet,
)
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.search import race
from softseg_dist.training.fit import RunningFit
from softseg_dist.training.task import FitTask, Worker

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a ledger that need not be durable
SIMULATED = ((60, 15), (20, 10))  # candidates, splits
LOSSES, RATES, SPLITS = (DiceSemimetric(), Brier(), BCE(), AdaptiveWing()), (1e-3, 3e-3, 1e-2, 2e-2, 4e-2), 10
HIPPOCAMPUS = Bids(
    "hippocampus_msd", image="T1w", labels={"anterior": "label-hippocampus_dseg:1", "posterior": "label-hippocampus_dseg:2"}
)
LONG_RUNS, LONG_SEEDS = 100, 10
HEADLINES = (
    Headline(
        key="simulated_60x15_t_startup_10_used",
        what="share of the full grid's fits that a search with a race needs: 60 candidates x 15 splits, simulated",
        at_most=0.4,
    ),
    Headline(
        key="simulated_20x10_t_startup_10_used",
        what="share of fits that a race needs: 20 candidates x 10 splits, simulated",
        at_most=0.55,
    ),
    Headline(
        key="phantom_20x10_startup_10_used",
        what="share of fits that a race needs: 20 candidates x 10 splits, really trained on phantoms",
    ),
    Headline(
        key="phantom_20x10_startup_10_as_good",
        what="share of really trained races that find the full grid's winner, or one as good",
        at_least=0.9,
    ),
)
Table = npt.NDArray[np.float64]  # scores [candidate x split], higher is better


@dataclass(frozen=True)
class Raced:
    """One race over a table: the share of its fits that ran, and whether the winner is the full table's, or as good."""

    used: float
    same: bool
    as_good: bool


def main(runs: int, seeds: int) -> None:
    """Measure, and print a table."""
    figures: dict[str, float] = {}
    print(f"{'':<44}{'fits used':>12}{'same winner':>14}{'or as good':>12}")
    for candidates, splits in SIMULATED if runs else ():
        tables = [simulate(seed, candidates, splits) for seed in range(runs)]
        for rule, p in (("t", race.p_worse), ("wilcoxon", wilcoxon_p)):
            for startup in (candidates, 10):
                with patch.object(race, "p_worse", p):
                    raced = [replay(table, startup) for table in tables]
                figures |= show(f"simulated_{candidates}x{splits}_{rule}_startup_{startup}", raced)
    root = os.environ.get("SOFTSEG_TEST_DATA")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for name in ("phantom", "hippocampus") if root else ("phantom",):
            raced = [replay(trained(pool, name, seed, root), 10) for seed in range(seeds)]
            figures |= show(f"{name}_20x10_startup_10", raced) if raced else {}
    record("racing", figures, HEADLINES, short=0 < runs < LONG_RUNS or 0 < seeds < LONG_SEEDS)


def trained(pool: ProcessPoolExecutor, name: str, seed: int, root: str | None) -> Table:
    """Scores of a grid of losses and learning rates, really trained; candidates in an order that depends on the seed."""
    data: DataSet = Phantom(subjects=12, size=(24, 24), num_slices=3, seed=seed)
    preprocess, network, epochs = Preprocess(dim=2), UNet(filters=(4, 8)), 5
    if name == "hippocampus":
        data, network, epochs = HIPPOCAMPUS, UNet(filters=(4, 8), norm="instance"), 3
        preprocess = Preprocess(dim=3, spacing_mm=(2, 2, 2), crop=(24, 32, 24), label_resampling="area")
    cases = data.cases(Path(root) if root else None)[:12]
    grid = list(product(LOSSES, RATES))
    order = np.random.default_rng(seed).permutation(len(grid))
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(Path(folder), cases, data, preprocess)
        splits = MonteCarlo(count=SPLITS).make({case.subject: case.site for case in cases}, seed)
        tasks = [
            FitTask(
                study="racing", seed=seed, candidate=f"c{row}", objective="dice_dml", split=split, store=str(store),
                recipe=Recipe(network=network, loss=loss, optim=Optim(lr=rate, epochs=epochs, batch_size=4)),
                store_fingerprint=fingerprint(cases, data, preprocess),
                folder=str(Path(folder) / f"{row}-{split.index}"),
            )
            for (row, (loss, rate)), split in product(enumerate(grid[i] for i in order), splits)
        ]  # fmt: skip
        return np.array(list(pool.map(best_score, tasks))).reshape(len(grid), SPLITS)


def best_score(task: FitTask) -> float:
    """The objective on validation at the best epoch of a fit, which is all that a race looks at."""
    Path(task.folder).mkdir()
    torch.set_num_threads(task.threads)
    training = RunningFit(task, Worker())
    training.run()
    return training.progress.best_score


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
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    main(options.runs, options.seeds)
