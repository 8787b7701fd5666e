"""What does the death of a process cost a study? Workers, lanes' holders and drivers are killed with -9 at random moments.

Run:     python tests/benchmarks/bench_faults.py --kills 20 [--seed 0]    (without: a short run, 2 kills)
Targets: no finished fit lost, none repeated from its beginning, every result equal to that of an undisturbed fit,
         nothing reserved afterwards. Half of the kills hit fits of one worker, half fits of two workers on a lane.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

from record import Headline, record

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from faults import Figures, Kind, besiege, lasting_ray

LONG = 20  # kills
HEADLINES = (
    Headline(key="lost", what="finished fits lost by kills of fits, workers and drivers", at_most=0),
    Headline(key="repeated", what="fits that had to start again after such kills", at_most=0),
    Headline(key="different", what="results that differ from those of undisturbed fits", at_most=0),
    Headline(key="reserved", what="resources left reserved after such kills", at_most=0),
)
KINDS: dict[int, tuple[Kind, ...]] = {1: ("worker", "driver"), 2: ("worker", "holder", "worker", "driver")}


def main(kills: int, seed: int) -> None:
    """Measure, and print a table."""
    rows: list[tuple[str, Figures]] = []
    with tempfile.TemporaryDirectory() as folder, lasting_ray() as address:
        for workers, kinds in KINDS.items():
            num = kills // 2 if workers == 1 else kills - kills // 2
            figures = besiege(Path(folder), address, workers, list(islice(cycle(kinds), num)), seed + workers)
            rows.append((f"{workers} worker{'s' * (workers > 1)} per fit", figures))
    print(f"{'':<20}{'kills':>7}{'lost':>7}{'repeated':>10}{'went on':>9}{'different':>11}{'reserved':>10}{'studies':>9}")
    for name, of in rows:
        print(
            f"{name:<20}{of.kills:>7}{of.lost:>7}{of.repeated:>10}{of.continued:>9}{of.different:>11}{of.reserved:>10}{of.studies:>9}"
        )
    figures: dict[str, float] = {}
    for workers, (name, of) in zip(KINDS, rows, strict=True):
        figures |= {f"{key}_{workers}": value for key, value in vars(of).items() if isinstance(value, int)}
        for kind in sorted({kind for kind, _ in of.resume_s}):
            seconds = [s for k, s in of.resume_s if k == kind]
            median, worst = statistics.median(seconds), max(seconds)
            print(f"{name}, {kind} killed {len(seconds)} times: trains again after {median:.1f} s (median), {worst:.1f} s (most)")
            figures |= {f"{kind}_{workers}_median_s": median, f"{kind}_{workers}_most_s": worst}
    figures |= {key: sum(getattr(of, key) for _, of in rows) for key in (headline.key for headline in HEADLINES)}
    record("faults", figures, HEADLINES, short=kills < LONG)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.kills, options.seed)
