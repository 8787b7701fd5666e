"""One whole fit with default precision: augmentation, training, validation, evaluation on test cases, weights on disk.

python tests/gpu/whole_fit.py     on the GPU if there is one; else on the CPU, at a tiny size

The exit code is 0 if the fit finishes, a GPU trains it as one CUDA graph, and it learns: soft Dice of at least .7 on test cases.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package need not be installed
sys.path.insert(0, str(Path(__file__).parents[1]))
from bare_machine import do_without_safetensors

from softseg_dist import AdaptiveWing, Affine, Elastic, MonteCarlo, Noise, NormReLU, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitTask, Worker

LEAST_SCORE = 0.7


def make_task(folder: Path, on_gpu: bool) -> FitTask:
    """A fit on slices of a phantom."""
    data, preprocess = Phantom(subjects=24 if on_gpu else 6, raters=1), Preprocess(dim=2)
    cases = data.cases(None)
    store = build_store(folder, cases, data, preprocess)
    recipe = Recipe(
        network=UNet(filters=(16, 32, 64, 128) if on_gpu else (4, 8)),
        activation=NormReLU(),
        loss=AdaptiveWing(),
        augment=(Affine(), Elastic(), Noise()),
        optim=Optim(epochs=40 if on_gpu else 1, batch_size=16, patience=None),
    )
    (folder / "fit").mkdir()
    return FitTask(
        study="whole", seed=0, candidate="c", recipe=recipe, objective="dice_dml", folder=str(folder / "fit"),
        split=MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0],
        store=str(store), store_fingerprint=fingerprint(cases, data, preprocess),
    )  # fmt: skip


def main() -> int:
    """Train, print what came of it, and judge it where there is a GPU."""
    do_without_safetensors()
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), on_gpu)
        began_s = time.monotonic()
        result = fit(task, Worker(device="cuda" if on_gpu else "cpu"))
        duration_s = time.monotonic() - began_s
    for note in result.notes:
        print(note)
    memory = f", {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB" if on_gpu else ""
    print(f"{result.state} after {result.epochs} epochs in {duration_s:.1f} s ({result.engine}){memory}", result.reason)
    print(f"soft Dice: validation {result.score}, test {result.test_score}")
    good = not on_gpu or ("graph" in result.engine and (result.test_score or 0) >= LEAST_SCORE)
    return 0 if result.state == "finished" and good else 1


if __name__ == "__main__":
    sys.exit(main())
