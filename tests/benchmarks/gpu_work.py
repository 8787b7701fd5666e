"""What the GPU benchmark trains: networks, sizes of images and batches, and the recipe around them; each also at a tiny size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from softseg_dist import AdaptiveWing, Affine, Elastic, MonteCarlo, Network, NormReLU, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.splits import Split
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.task import FitTask


class MonaiBasicUNet(Network):
    """MONAI's BasicUNet as it comes: five levels, instance norm, leaky ReLU, transposed convolutions. `features` are its own."""

    short: ClassVar[str] = "basicunet"
    features: tuple[int, ...] = (32, 32, 64, 128, 256, 32)

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        from monai.networks.nets import BasicUNet

        return BasicUNet(spatial_dims=dim, in_channels=in_channels, out_channels=out_channels, features=self.features)


@dataclass(frozen=True)
class Work:
    """A training step, on `cases` of so many 2D `slices`. `target`: that many times the rate of eager float32 is aimed at."""

    key: str
    title: str
    network: Network
    size: tuple[int, ...]
    batch_size: int
    cases: int
    target: float
    slices: int = 8

    @property
    def num_images(self) -> int:
        """In an epoch, all in full batches."""
        return self.cases * (self.slices if len(self.size) == 2 else 1)

    def tiny(self) -> Work:
        """As small as its network can be, for a CPU."""
        network = UNet(filters=(4, 8)) if isinstance(self.network, UNet) else self.network
        size = (16,) * 3 if len(self.size) == 3 else (32, 32)
        return replace(self, network=network, size=size, batch_size=2, cases=2, slices=1)

    def task(self, folder: Path, index: int = 0, **speed: Any) -> FitTask:
        """Fit number `index` on all cases; the store is in `folder`. `speed` are fields of `Optim`."""
        augment = (Affine(),) if len(self.size) == 3 else (Affine(), Elastic())
        optim = Optim(epochs=10_000, batch_size=self.batch_size, patience=None, **speed)  # it is never trained to its end
        data = Phantom(subjects=self.cases, dim=len(self.size), size=self.size, num_slices=self.slices, raters=1)
        everybody = tuple(case.subject for case in data.cases(None))
        recipe = _recipe(self.network, augment, optim)
        return _task(folder, data, recipe, Split(index=index, train=everybody), self.key)


WORKS = (
    Work("unet64", "2D U-Net, 64 to 512 filters", UNet(filters=(64, 128, 256, 512)), (128, 128), 16, 40, 6.5),
    Work("unet32", "2D U-Net, 32 to 256 filters", UNet(filters=(32, 64, 128, 256)), (128, 128), 8, 40, 5),
    Work("monai", "2D BasicUNet of MONAI", MonaiBasicUNet(), (128, 128), 16, 40, 3.6),
    Work("unet3d", "3D U-Net, 32 to 256 filters", UNet(filters=(32, 64, 128, 256)), (96, 96, 96), 2, 24, 14),
)


@dataclass(frozen=True)
class Comparison:
    """A small study whose fits are trained both ways to the end: is the outcome the same?"""

    subjects: int = 30
    splits: int = 6
    filters: tuple[int, ...] = (16, 32, 64, 128)
    epochs: int = 60

    def tasks(self, folder: Path, **speed: Any) -> list[FitTask]:
        """One fit per split. `speed` are fields of `Optim`."""
        data = Phantom(subjects=self.subjects)
        sites = {case.subject: case.site for case in data.cases(None)}
        optim = Optim(epochs=self.epochs, batch_size=16, patience=None, **speed)
        recipe = _recipe(UNet(filters=self.filters), (Affine(),), optim)
        splits = MonteCarlo(count=self.splits).make(sites, 0)
        return [_task(folder, data, recipe, split, "comparison") for split in splits]


@dataclass(frozen=True)
class Scale:
    """How much is done, and where. `ways` are fields of `Optim`; of each, so many fits as `at_once` has are timed at once."""

    device: str
    works: tuple[Work, ...]
    comparison: Comparison
    ways: Mapping[str, Mapping[str, str]]
    at_once: tuple[int, ...]
    least_s: float
    repeats: int
    busy_epochs: int


FULL = Scale(
    device="cuda",
    works=WORKS,
    comparison=Comparison(),
    ways={
        "float32": {"precision": "float32", "compile": "off"},
        "bfloat16": {"precision": "bfloat16", "compile": "off"},
        "compiled": {"precision": "bfloat16", "compile": "on"},
    },
    at_once=(1, 2, 5),
    least_s=1.0,
    repeats=5,
    busy_epochs=5,
)
SHORT = replace(
    FULL, ways={way: FULL.ways[way] for way in ("bfloat16", "float32")}, at_once=(1, 4), least_s=0.5, repeats=3, busy_epochs=2
)
"""Compiles nothing, which takes a minute for each network."""
TINY = Scale(
    device="cpu",
    works=tuple(work.tiny() for work in WORKS),
    comparison=Comparison(subjects=6, splits=1, filters=(4, 8), epochs=1),
    ways={"float32": {"precision": "float32", "compile": "off"}, "bfloat16": {"precision": "bfloat16", "compile": "off"}},
    at_once=(1, 2),
    least_s=0.0,
    repeats=1,
    busy_epochs=1,
)
"""Shows that everything runs; its figures mean nothing. Nothing is compiled, as that needs a C++ compiler."""


def _recipe(network: Network, augment: tuple[Any, ...], optim: Optim) -> Recipe:
    return Recipe(network=network, activation=NormReLU(), loss=AdaptiveWing(), augment=augment, optim=optim)


def _task(folder: Path, data: Phantom, recipe: Recipe, split: Split, name: str) -> FitTask:
    cases, preprocess = data.cases(None), Preprocess(dim=data.dim)
    run = folder / "run" / "fits" / name / split.name
    run.mkdir(parents=True, exist_ok=True)
    return FitTask(
        study="gpu", seed=0, candidate=name, recipe=recipe, split=split, objective="dice_soft", folder=str(run),
        store=str(build_store(folder, cases, data, preprocess)), store_fingerprint=fingerprint(cases, data, preprocess),
    )  # fmt: skip
