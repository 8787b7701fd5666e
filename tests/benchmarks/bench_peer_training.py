"""How many images a second does a fit learn from, and how many does MONAI's own pipeline? The same network on the same slices.

Run:    python tests/benchmarks/bench_peer_training.py [--rounds 5]
Target: at least 2 times MONAI's images per second on the same cores, whichever of its loaders is the faster one

Ours is `fit`, as a study calls it; MONAI's side is the loop of its 2D tutorials: CacheDataset, dictionary transforms per sample,
DataLoader, DiceLoss, Adam. Both train its BasicUNet on batches of 16 slices of 96 x 96 with the same affine, flip, noise and gamma.
What differs: our labels are those of four raters, fused for every batch, while MONAI gets them fused; our sums over a batch are the
same on any number of workers, to the last bit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peers import Side, take_turns
from record import Headline, record
from training_sides import Job, monai, ours

from softseg_dist import Phantom, Preprocess
from softseg_dist.data.store import build_store, fingerprint

DATA, PREPROCESS = Phantom(subjects=8, size=(96, 96)), Preprocess(dim=2)
NETWORKS = {"default": (32, 32, 64, 128, 256, 32), "half": (16, 16, 32, 64, 128, 16)}
THREADS = (1, 2)
ROUNDS = 5  # single ones on two threads differ by a fifth
HEADLINES = tuple(
    Headline(
        key=f"ratio_{name}_{threads}",
        what=f"training MONAI's BasicUNet ({words} widths) on 96 x 96 slices, {threads} thread{'s' * (threads > 1)}, "
        "against MONAI's own pipeline",
        unit="times the images per second",
        at_least=2,
    )
    for name, words in (("default", "default"), ("half", "half the"))
    for threads in THREADS
)


def main(rounds: int) -> None:
    """Measure, and print a table."""
    figures: dict[str, float] = {}
    print(f"{'images per second':<52}{'best':>8}{'per CPU s':>11}{'memory MB':>11}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        cases = DATA.cases(None)
        store = build_store(Path(folder), cases, DATA, PREPROCESS)
        for name, features in NETWORKS.items():
            for threads in THREADS:
                job = Job(
                    store=str(store),
                    store_fingerprint=fingerprint(cases, DATA, PREPROCESS),
                    subjects=tuple(case.subject for case in cases),
                    features=features,
                    threads=threads,
                )
                figures |= compare(job, name, rounds)
    print("ratio: against the fastest of MONAI's on as many threads; per CPU s: of processor time, loaders included")
    record("peer_training", figures, HEADLINES, short=rounds < ROUNDS)


def compare(job: Job, name: str, rounds: int) -> dict[str, float]:
    """Rates and memory of all ways to train `job`, and the ratio of ours to the peer's best."""
    in_float32 = job.replace(optim=job.optim.replace(precision="float32"))
    ways = {"ours": (ours, job), "ours in float32": (ours, in_float32), "monai": (monai, job)}
    if job.threads > 1:
        ways["monai, 2 loader workers"] = monai, job.replace(workers=2)
    sides = {way: Side(work, of.model_dump_json(), threads=job.threads) for way, (work, of) in ways.items()}
    take_turns(sides, rounds)
    best = max(side.per_s for way, side in sides.items() if way.startswith("monai"))
    figures: dict[str, float] = {}
    for way, side in sides.items():
        words, key = f"{way}, {name} widths, {job.threads} threads", way.replace(", ", "_").replace(" ", "_")
        print(
            f"{words:<52}{side.per_s:>8.1f}{side.per_processor_s:>11.1f}{side.memory_mb:>11.0f}{side.per_s / best:>8.2f}",
            flush=True,
        )
        figures |= {f"{key}_{name}_{job.threads}_per_s": side.per_s, f"{key}_{name}_{job.threads}_mb": side.memory_mb}
        figures[f"{key}_{name}_{job.threads}_per_processor_s"] = side.per_processor_s
    return figures | {f"ratio_{name}_{job.threads}": sides["ours"].per_s / best}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    main(parser.parse_args().rounds)
