"""What does augmentation cost beside MONAI's and TorchIO's? Image and soft label of 16 slices of 96 x 96, on one thread each.

Run:     python tests/benchmarks/bench_peer_augmentation.py --peer    (without: no TorchIO, which is installed from PyPI)
Targets: affine of a batch 10 times as fast as MONAI's, 20 times as fast as TorchIO's

Times are processor times, the median of turns that the sides take one after the other. What differs: ours interpolates once where
affine and elastic meet, MONAI too, TorchIO twice; ours scales noise to millimetres and draws per sample from a seed of its own;
TorchIO works in 3D, on volumes of one slice, and bends by SimpleITK's B-splines with uniform displacements.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from augmentation_sides import BATCH, Job, monai, ours, torchio
from peers import Side, add_peer_options, environment, take_turns, version
from record import Headline, record

BATCHES = {"ours": 40, "monai": 8, "torchio": 4}  # of a turn: some tenths of a second
WORK = {"affine": False, "affine_elastic": True}
HEADLINES = (
    Headline(
        key="affine_against_monai",
        what="affine augmentation of image and label, 16 slices of 96 x 96, one thread, against MONAI's transforms",
        unit="times as fast",
        at_least=10,
    ),
    Headline(
        key="affine_against_torchio",
        what="affine augmentation of image and label, 16 slices of 96 x 96, one thread, against TorchIO's transforms",
        unit="times as fast",
        at_least=20,
    ),
    Headline(
        key="affine_elastic_against_monai", what="affine and elastic augmentation of them against MONAI's", unit="times as fast"
    ),
    Headline(
        key="affine_elastic_against_torchio", what="affine and elastic augmentation of them against TorchIO's", unit="times as fast"
    ),
)


def main(peer: bool, envs: Path, rounds: int) -> None:
    """Measure, and print a table."""
    peers = {"monai": monai} | ({"torchio": torchio} if peer else {})
    pythons = {"torchio": environment(envs, "torchio")} if peer else {}
    here = Path(sys.executable)
    versions = ", ".join(f"{name} {version(pythons.get(name, here), name)}" for name in peers)
    print(f"{f'16 slices of 96 x 96; {versions}':<52}{'ms':>8}{'memory MB':>11}{'ratio':>8}")
    figures: dict[str, float] = {}
    for work, elastic in WORK.items():
        sides = {
            name: Side(side, Job(elastic=elastic, batches=BATCHES[name]).model_dump_json(), pythons.get(name, here))
            for name, side in {"ours": ours, **peers}.items()
        }
        take_turns(sides, rounds)
        for name, side in sides.items():
            ratio, ms = sides["ours"].per_processor_s / side.per_processor_s, 1e3 * BATCH / side.per_processor_s
            print(f"{f'{work}, {name}':<52}{ms:>8.1f}{side.memory_mb:>11.0f}{ratio:>8.1f}", flush=True)
            figures |= {f"{work}_{name}_ms": ms, f"{work}_{name}_mb": side.memory_mb}
            figures |= {f"{work}_against_{name}": ratio} if name != "ours" else {}
    if not peer:
        print("without TorchIO: --peer installs and runs it")
    record("peer_augmentation", figures, HEADLINES, short=not peer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_peer_options(parser)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    main(options.peer, options.envs, options.rounds)
