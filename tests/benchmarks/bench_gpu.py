"""What does a GPU give? Images per second of a training step, how busy it is, what compiling costs; and is Dice the same?

Run:     python tests/benchmarks/bench_gpu.py                 everything
         python tests/benchmarks/bench_gpu.py unet64 cost     some parts: unet64, unet32, monai, unet3d, dice, cost
         python tests/benchmarks/bench_gpu.py --short unet32  fewer repeats, 1 and 4 fits at once: a minute or two per network
Needs:   a CUDA device, and torch (2.11 or newer), monai, numpy, scipy, nibabel, pyarrow, pydantic: a copy of the tree will do.
         Without a device all parts run once on the CPU, at tiny sizes, and no figure comes of it
Targets: so many times the images per second of eager float32 (without TF32), the fastest way, with affine (2D: and elastic)
         augmentation inside, Adaptive Wing, NormReLU, Adam: 6.5 (2D, 64 filters, batch 16), 5 (2D, 32 filters, batch 8),
         3.6 (MONAI's BasicUNet, 2D, batch 16), 14 (3D, 96 x 96 x 96, batch 2); the GPU waits for the host in less than 5 % of
         the time; after equal steps, soft Dice on validation in bfloat16 is within .005 of eager float32, over 6 splits
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.backends import cudnn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package need not be installed
from gpu_fits import EagerFit, EngineFit, score, seconds_to_first_step
from gpu_steps import Say, Steps
from gpu_work import FULL, SHORT, TINY, Scale, Work
from record import Headline, record

MOST_DICE = 0.005
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
Measured = tuple[dict[str, float], list[Headline]]
Part = Callable[[Path, Scale, Say], Measured]


def main(names: Sequence[str]) -> int:
    """Measure the parts that are named, or all; 1 if one of the package's ways has failed."""
    on_gpu, short = torch.cuda.is_available(), "--short" in names
    names = [name for name in names if name != "--short"]
    scale = TINY if not on_gpu else SHORT if short else FULL
    say: Say = partial(print, flush=True) if on_gpu else _keep_quiet
    parts: dict[str, Part] = {work.key: partial(steps, work) for work in scale.works} | {"dice": dice, "cost": cost}
    if unknown := set(names) - parts.keys():
        sys.exit(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    failed = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in names or parts:
            figures, headlines = parts[name](Path(folder), scale, say)
            failed += figures.get("failed", 0)
            if on_gpu:
                record(f"gpu_{name}", figures, headlines, short)
                _judge(figures, headlines)
    if not on_gpu:
        print("no CUDA device: nothing was measured; all parts have run once on the CPU, at tiny sizes")
    return int(failed > 0)


def steps(work: Work, folder: Path, scale: Scale, say: Say) -> Measured:
    """One training step, each way."""
    table = Steps(work, folder, scale, say)
    table.measure()
    return table.figures(), table.headlines()


def dice(folder: Path, scale: Scale, say: Say) -> Measured:
    """Equal fits, the usual way in float32 and the package's in bfloat16, trained to the end: soft Dice on validation."""
    usual = scale.comparison.tasks(folder, precision="float32", compile="off")
    ours = scale.comparison.tasks(folder, precision="bfloat16", compile="off")
    scores: list[tuple[float, float]] = []
    say(f"\n{scale.comparison.epochs} epochs of a phantom study\n{'split':<8}{'float32':>10}{'bfloat16':>10}{'difference':>12}")
    for task, other in zip(usual, ours, strict=True):
        with cudnn.flags(enabled=True, allow_tf32=False):
            eager = EagerFit(task, scale.device)
            for _ in range(scale.comparison.epochs):
                eager.train_epoch()
        engine = EngineFit(other, scale.device)
        for _ in range(scale.comparison.epochs):
            engine.train_epoch()
        scores.append((score(eager, task, scale.device), score(engine, other, scale.device)))
        say("{:<8}{:>10.4f}{:>10.4f}{:>12.4f}".format(task.split.name, *scores[-1], scores[-1][1] - scores[-1][0]))
    differences = [after - before for before, after in scores]
    figures = {
        "float32": statistics.mean(before for before, _ in scores),
        "bfloat16": statistics.mean(after for _, after in scores),
        "mean_difference": abs(statistics.mean(differences)),
        "largest_difference": max(map(abs, differences)),
    }
    what = "soft Dice on validation, bfloat16 graph against eager float32"
    return figures, [
        Headline(key="mean_difference", what=f"{what}: mean over splits", at_most=MOST_DICE),
        Headline(key="largest_difference", what=f"{what}: largest of a split", at_most=MOST_DICE),
    ]


def cost(folder: Path, scale: Scale, say: Say) -> Measured:
    """Seconds until a fit has made its first step: compiled for the first time, and when that has been done before.

    Torch keeps what it compiles; this part has a folder of its own for it.
    """
    work, compiled = scale.works[0], list(scale.ways.values())[-1]
    tasks = [work.task(folder / "cost", index, **compiled) for index in range(3)]
    plain = work.task(folder / "cost", len(tasks), **compiled | {"compile": "off"})
    times = [*_in_a_process(tasks[:2], scale.device), *_in_a_process([tasks[2], plain], scale.device)]
    labels = {
        "first_s": "compiled for the first time",
        "next_s": "the next fit of that process",
        "next_process_s": "the first fit of another process",
        "plain_s": "the next fit of that process, not compiled",
    }
    say(f"\n{work.title}: seconds until a fit has made its first step")
    for name, seconds in zip(labels.values(), times, strict=True):
        say(f"{name:<46}{seconds:>10.1f}")
    return dict(zip(labels, times, strict=True)), [
        Headline(key=key, what=f"seconds until a fit's first step: {name}", unit="s") for key, name in labels.items()
    ]


def _in_a_process(tasks: Sequence[object], device: str) -> list[float]:
    """One fit after the other, in a process of their own that has compiled nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_forget_caches) as process:
        return [process.submit(seconds_to_first_step, task, device).result() for task in tasks]


def _forget_caches() -> None:
    """Have compiled kernels kept where the fits of this process keep them, not where those of its parent do."""
    for name in CACHES:
        os.environ.pop(name, None)


def _judge(figures: dict[str, float], headlines: Sequence[Headline]) -> None:
    for headline in headlines:
        if (met := headline.met(value := figures[headline.key])) is not None:
            print(f"{headline.what}: {headline.formatted(value)}, target {headline.target}: {'met' if met else 'not met'}")


def _keep_quiet(line: str) -> None:
    """Do not print the figures of a tiny size on a CPU: they mean nothing."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
