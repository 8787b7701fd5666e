"""Do planted answers come back? Real training on small phantoms, from the data to the primary test.

Run:     python tests/benchmarks/bench_planted.py --null-studies 40    (without: a short run, 2 of them, 3 splits)
Targets: soft labels beat hard ones in Brier skill, the default score, and in absolute volume error against the known truth,
         p < .01 over 15 splits;
         of 40 studies of two candidates that differ in the seed alone, the test rejects at most 5 at the 5 % level
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from record import Headline, record

from softseg_dist import Brier, MonteCarlo, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.numerics.crossed_test import CrossedTest, crossed_test
from softseg_dist.numerics.metrics import TABLE
from softseg_dist.report.scores import soft_scores
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitTask, cases_path

LEVEL, PLANTED_LEVEL = 0.05, 0.01
LONG = 40  # null studies
HEADLINES = (
    Headline(
        key="planted_brier_skill_p",
        what="a planted gain of soft labels comes back, in Brier skill: p of the primary test over 15 splits",
        at_most=PLANTED_LEVEL,
    ),
    Headline(key="planted_volume_error_abs_p", what="the same gain in absolute volume error: p", at_most=PLANTED_LEVEL),
    Headline(
        key="null_rejected", what="of 40 really trained studies of two equal candidates, rejected at the 5 % level", at_most=5
    ),
)
BASE = Recipe(network=UNet(filters=(4, 8, 16)), loss=Brier(), optim=Optim(lr=2e-2, epochs=20, batch_size=8))
# The share of tissue in pixels of 2 mm, drawn at 0.5 mm: what rounding throws away is known, and clear images show it.
PLANTED = Phantom(subjects=100, size=(48, 48), num_slices=4, disagreement_mm=0.1, noise=0.02, sites=1, bias_field=0.05)
PLANTED_RECIPE = BASE.replace(network=UNet(filters=(8, 16)), optim=Optim(lr=1e-2, epochs=30, batch_size=8))
PLANTED_PREPROCESS = Preprocess(dim=2, spacing_mm=(2.0, 2.0), crop=(12, 12), label_resampling="area")
PLANTED_METRICS = ("brier_skill", "volume_error_abs")
NULL = Phantom(subjects=12, size=(24, 24), num_slices=3)
NULL_RECIPE = BASE.replace(optim=BASE.optim.replace(epochs=8))


def main(null_studies: int) -> None:
    """Train, and print a table."""
    figures: dict[str, float] = {}
    splits = 15 if null_studies >= LONG else 3
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        labels = {label: (PLANTED_RECIPE.replace(label=label), 0) for label in ("hard", "soft")}
        planted = compare(pool, PLANTED, PLANTED_PREPROCESS, labels, splits, PLANTED_METRICS, reference="truth")
        for metric, (test, means) in planted.items():
            print(f"{metric:<18}" + "".join(f"{name} {mean:.4f}  " for name, mean in means.items()), end="")
            print(f"difference {test.mean:+.4f} ({test.low:+.4f} to {test.high:+.4f}), p = {test.p:.1e}", flush=True)
            figures |= {f"planted_{metric}_difference": test.mean, f"planted_{metric}_p": test.p}
        missed = [m for m, (test, _) in planted.items() if not (test.mean * TABLE[m].sign > 0 and test.p < PLANTED_LEVEL)]
        p_values = []
        for study in range(null_studies):
            seeds = {name: (NULL_RECIPE, 2 * study + number) for number, name in enumerate(("one", "other"))}
            data = NULL.replace(seed=study)
            (test, _) = compare(pool, data, Preprocess(dim=2), seeds, 6, ("brier_skill",), reference="mean")["brier_skill"]
            p_values.append(test.p)
        rejected = sum(p < LEVEL for p in p_values)
        print(f"null studies: {rejected} of {null_studies} rejected at the 5 % level", flush=True)
        print("their p-values: " + ", ".join(f"{p:.2f}" for p in sorted(p_values)))
        listed = ", ".join(missed) or "none"
        print(f"planted answers that did not come back: {listed}" if splits == 15 else "too few splits to judge by")
        figures |= {"null_studies": null_studies, "null_rejected": rejected}
        record("planted", figures, HEADLINES, short=null_studies < LONG)


def compare(
    pool: ProcessPoolExecutor,
    data: Phantom,
    preprocess: Preprocess,
    candidates: Mapping[str, tuple[Recipe, int]],
    splits: int,
    metrics: Sequence[str],
    reference: str,
) -> dict[str, tuple[CrossedTest, dict[str, float]]]:
    """Train two candidates (recipe and seed) on all splits; per metric the test of second less first, and the means of both."""
    with tempfile.TemporaryDirectory() as folder:
        cases = data.cases(None)
        store = build_store(Path(folder), cases, data, preprocess)
        made = MonteCarlo(count=splits).make({case.subject: case.site for case in cases}, data.seed)
        tasks = [
            FitTask(
                study="planted", seed=seed, candidate=name, recipe=recipe, split=split, objective="brier_skill",
                store=str(store), store_fingerprint=fingerprint(cases, data, preprocess),
                folder=str(Path(folder) / f"{name}-{split.index}"),
            )
            for split, (name, (recipe, seed)) in product(made, candidates.items())
        ]  # fmt: skip
        results = list(pool.map(fit, tasks))
        assert all(result.state == "finished" for result in results), [r.reason for r in results if r.reason]
        rows = pd.concat([pd.read_parquet(cases_path(task.folder)) for task in tasks], ignore_index=True)
        test = rows[rows["subset"] == "test"]
    first, second = candidates
    found = {}
    for metric in metrics:
        scores = soft_scores(test, metric, reference)
        means = {name: float(np.nanmean(scores.of(name))) for name in candidates}
        found[metric] = (crossed_test(scores.difference(second, first)), means)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--null-studies", type=int, default=2)
    main(parser.parse_args().null_studies)
