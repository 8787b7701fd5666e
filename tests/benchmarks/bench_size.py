"""How often do tests reject when there is nothing to find, and when there is? Simulated studies with known components.

Run:     python tests/benchmarks/bench_size.py [--studies 1000] [--diagnoses]
Targets: at the 5 % level the crossed test rejects 2.5 to 7.5 % of studies of equal candidates in every setting; up to 8.5 % counts
         as met, as the largest of so many settings is one of noise, too
Cost:    about 45 minutes of one core; the power is measured with a quarter of the studies
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import Headline, record

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from simulated_studies import SDS, SETTINGS, Setting, simulate

from softseg_dist.numerics.crossed_test import crossed_test
from softseg_dist.numerics.statistics import corrected_t_test, wilcoxon_test

LEVEL = 0.05
TRAIN_SHARE = 0.6
LONG = 1000  # studies
HEADLINES = (
    Headline(
        key="size_crossed_least",
        what=f"share of equal candidates that the primary test distinguishes at the 5 % level: least of {len(SETTINGS)} settings",
        at_least=0.025,
    ),
    Headline(key="size_crossed_most", what=f"the same share: most of {len(SETTINGS)} settings", at_most=0.085),
    Headline(key="size_Wilcoxon_most", what="Wilcoxon over splits, the paper's test: most of these settings"),
    Headline(key="power_crossed_mean", what="power of the primary test at an effect of .6: mean over these settings"),
    Headline(key="power_corrected t_mean", what="power of the corrected t: the same mean"),
)
POWER = 0.6  # in the unit of the components' standard deviations
TESTS: dict[str, Callable[[np.ndarray, float], float]] = {
    "crossed": lambda table, _: crossed_test(table).p,
    "Wilcoxon": lambda table, _: wilcoxon_test(split_means(table)).p,
    "corrected t": lambda table, ratio: corrected_t_test(split_means(table), ratio).p,
}


def split_means(table: np.ndarray) -> np.ndarray:
    """Mean difference of every split."""
    return np.nanmean(table, axis=0)


def main(studies: int) -> None:
    """Simulate, and print a table."""
    names = "".join(f"{name:>13}" for name in TESTS)
    print(f"{'share of studies with p < .05':<46}|{'equal candidates':>39} | {f'effect of {POWER}':>38}")
    print(f"{'subjects  splits  folds  sd of s, f, e':<46}|{names} |{names}")
    figures: dict[str, float] = {}
    for number, setting in enumerate(SETTINGS):
        null = rejected(setting, 0.0, studies, number)
        power = rejected(setting, POWER, max(studies // 4, 1), number + len(SETTINGS))
        shown = "".join(f"{value:>13.3f}" for value in null), "".join(f"{value:>13.3f}" for value in power)
        sds = ", ".join(f"{sd:.2f}" for sd in setting.sd)
        print(f"{setting.subjects:>8}{setting.splits:>8}{setting.folds or '-':>7}  {sds:<21}|{shown[0]} |{shown[1]}", flush=True)
        figures |= {f"size_{name}_{number}": value for name, value in zip(TESTS, null, strict=True)}
        figures |= {f"power_{name}_{number}": value for name, value in zip(TESTS, power, strict=True)}
    for name in TESTS:
        sizes, powers = ([figures[f"{kind}_{name}_{n}"] for n in range(len(SETTINGS))] for kind in ("size", "power"))
        figures |= {f"size_{name}_least": min(sizes), f"size_{name}_most": max(sizes), f"power_{name}_mean": float(np.mean(powers))}
    print({name: figures[name] for name in figures if not name[-1].isdecimal()})
    record("size", figures, HEADLINES, short=studies < LONG)


def rejected(setting: Setting, effect: float, studies: int, seed: int) -> list[float]:
    """The share of studies that each test rejects."""
    generator, ratio = np.random.default_rng(seed), setting.tested / (TRAIN_SHARE * setting.subjects)
    tables = [setting.table(generator, effect) for _ in range(studies)]
    return [float(np.mean([test(table, ratio) < LEVEL for table in tables])) for test in TESTS.values()]


def diagnoses(studies: int) -> None:
    """How often the warnings about subjects come, and how often equal candidates are then told apart, over 15 random splits."""
    print(f"{'subjects':<12}{'of them':>8}{'sd of s, f, e':>18}{'skewed':>10}{'one':>10}{'p < .05':>10}")
    for (kind, draw), number, sd in itertools.product(SUBJECTS.items(), (8, 15, 30, 50), (SDS[0], (1.0, 1.0, 1.0))):
        generator, tested = np.random.default_rng(number), max(3, number // 5)
        found = []
        for _ in range(studies):
            noise = simulate(generator, number, 15, tested, (0.0, *sd[1:]))
            found.append(crossed_test(noise + sd[0] * draw(generator, number)[:, None]))
        skewed, one = (np.mean([said in " ".join(t.warnings) for t in found]) for said in ("skewed", "one subject"))
        sds, rejects = ", ".join(f"{part:.2f}" for part in sd), np.mean([test.p < LEVEL for test in found])
        print(f"{kind:<12}{number:>8}{sds:>18}{skewed:>10.2f}{one:>10.2f}{rejects:>10.3f}", flush=True)


def _log_normal(generator: np.random.Generator, number: int) -> np.ndarray:
    """Of mean 0 and variance 1."""
    return (np.exp(generator.normal(size=number)) - np.exp(0.5)) / np.sqrt(np.e * (np.e - 1))


SUBJECTS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda generator, number: generator.normal(size=number),
    "t3": lambda generator, number: generator.standard_t(3, number) / np.sqrt(3),
    "log-normal": _log_normal,
    "one at 8 sd": lambda generator, number: np.append(generator.normal(size=number - 1), 8.0),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=LONG)
    parser.add_argument("--diagnoses", action="store_true", help="only how often the warnings of the test come")
    chosen = parser.parse_args()
    (diagnoses if chosen.diagnoses else main)(chosen.studies)
