"""How often do tests reject when there is nothing to find, and when there is? Simulated studies with known components.

Run:     python tests/benchmarks/bench_size.py [--studies 1000]
Targets: at the 5 % level the crossed test rejects 3 to 7.5 % of studies of equal candidates in every setting
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import Headline, record

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from simulated_studies import SETTINGS, Setting, simulate

from softseg_dist.numerics.statistics import corrected_t_test, crossed_test, wilcoxon_test

LEVEL = 0.05
TRAIN_SHARE = 0.6
LONG = 1000  # studies
HEADLINES = (
    Headline(
        key="size_crossed_least",
        what="share of equal candidates that the primary test distinguishes at the 5 % level: least of 8 settings",
        at_least=0.03,
    ),
    Headline(key="size_crossed_most", what="the same share: most of 8 settings", at_most=0.075),
    Headline(key="size_Wilcoxon_most", what="Wilcoxon over splits, the paper's test: most of 8 settings"),
)
POWER = 0.6  # of the tests together: the effect is this many standard deviations of the subjects or of the splits
TESTS: dict[str, Callable[[np.ndarray, float], float]] = {
    "crossed": lambda table, _: crossed_test(table).p,
    "Wilcoxon": lambda table, _: wilcoxon_test(np.nanmean(table, axis=0)).p,
    "corrected t": lambda table, ratio: corrected_t_test(np.nanmean(table, axis=0), ratio).p,
}


def main(studies: int) -> None:
    """Simulate, and print a table."""
    names = "".join(f"{name:>13}" for name in TESTS)
    print(f"{'share of studies with p < .05':<46}|{'equal candidates':>39} | {'effect of .6':>38}")
    print(f"{'subjects  splits  tested  sd of s, f, e':<46}|{names} |{names}")
    figures: dict[str, float] = {}
    for number, setting in enumerate(SETTINGS):
        null, power = (rejected(setting, effect, studies, number) for effect in (0.0, POWER))
        shown = "".join(f"{value:>13.3f}" for value in null), "".join(f"{value:>13.3f}" for value in power)
        row = f"{setting.subjects:>8}{setting.splits:>8}{setting.tested:>8}  {setting.sd}"
        print(f"{row:<46}|{shown[0]} |{shown[1]}", flush=True)
        figures |= {f"size_{name}_{number}": value for name, value in zip(TESTS, null, strict=True)}
        figures |= {f"power_{name}_{number}": value for name, value in zip(TESTS, power, strict=True)}
    for name in TESTS:
        sizes = [figures[f"size_{name}_{number}"] for number in range(len(SETTINGS))]
        figures |= {f"size_{name}_least": min(sizes), f"size_{name}_most": max(sizes)}
    record("size", figures, HEADLINES, short=studies < LONG)


def rejected(setting: Setting, effect: float, studies: int, seed: int) -> list[float]:
    """The share of studies that each test rejects."""
    generator = np.random.default_rng(seed)
    ratio = setting.tested / (TRAIN_SHARE * setting.subjects)
    tables = [simulate(generator, *setting, effect=effect) for _ in range(studies)]
    return [float(np.mean([test(table, ratio) < LEVEL for table in tables])) for test in TESTS.values()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=LONG)
    main(parser.parse_args().studies)
