"""The two sides of `bench_peer_training.py`, whose turn is an epoch.

Both train MONAI's BasicUNet on the same prepared slices.
"""

from __future__ import annotations

import tempfile

import torch
from gpu_work import MonaiBasicUNet
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, RandAdjustContrastd, RandAffined, RandFlipd, RandGaussianNoised, ScaleIntensityd
from monai.utils import set_determinism
from peers import Turns
from torch import Tensor

from softseg_dist import Affine, Dice, Flip, Gamma, Noise, Optim, Recipe, Sigmoid
from softseg_dist.data.splits import Split
from softseg_dist.frozen import Frozen
from softseg_dist.training.batches import cases_of, item_target, open_store
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitTask, Worker

DEGREES, SCALE, SHIFT, NOISE, GAMMA = 20.0, 0.1, 0.03, 0.1, (0.7, 1.5)
KEYS = ("image", "label")


class Job(Frozen):
    """What is trained, and how. `workers` load data beside MONAI's training process; ours has none."""

    store: str
    store_fingerprint: str
    subjects: tuple[str, ...]
    features: tuple[int, ...]
    threads: int
    workers: int = 0
    optim: Optim = Optim(lr=1e-3, batch_size=16, epochs=200, patience=None, schedule="constant")

    def task(self, folder: str) -> FitTask:
        """A fit of all subjects, which validates nothing."""
        recipe = Recipe(
            network=MonaiBasicUNet(features=self.features),
            activation=Sigmoid(),
            loss=Dice(),
            augment=(Affine(degrees=DEGREES, scale=SCALE, shift=SHIFT), Flip(), Noise(std=NOISE), Gamma(range=GAMMA)),
            optim=self.optim,
        )
        return FitTask(
            study="peer", seed=0, candidate="ours", recipe=recipe, split=Split(index=0, train=self.subjects),
            objective="dice_dml", store=self.store, store_fingerprint=self.store_fingerprint, folder=folder,
            threads=self.threads,
        )  # fmt: skip

    def slices(self) -> list[dict[str, Tensor]]:
        """Every slice of the store and its soft label [C *S], in memory."""
        store, recipe = open_store(self.store, self.store_fingerprint), self.task("").recipe
        return [
            {
                "image": torch.from_numpy(store.sample(case).image[item].copy()),
                "label": item_target(store, recipe, case, item, draw=0),
            }
            for case in cases_of(store, self.subjects)
            for item in range(store.cases[case].num_items)
        ]


def ours(job_json: str, turns: Turns) -> None:
    """`fit`, as a study calls it; the end of an epoch is the end of a turn."""
    job = Job.model_validate_json(job_json)
    num_items = len(job.slices())

    def report(_: dict[str, float]) -> None:
        turns.report(num_items)
        turns.wait()

    with tempfile.TemporaryDirectory() as folder:
        turns.wait()
        fit(job.task(folder), Worker(report=report))


def monai(job_json: str, turns: Turns) -> None:
    """The loop of MONAI's tutorials of 2D segmentation: cached transforms, random ones per sample, its loader."""
    job = Job.model_validate_json(job_json)
    torch.set_num_threads(job.threads)
    set_determinism(0)
    shift = [SHIFT * n for n in job.slices()[0]["image"].shape[1:]]
    radians = torch.deg2rad(torch.tensor(DEGREES)).item()
    transform = Compose(
        [
            ScaleIntensityd(keys="image"),
            RandAffined(
                keys=KEYS,
                prob=1,
                rotate_range=radians,
                scale_range=[SCALE] * len(shift),
                translate_range=shift,
                mode="bilinear",
                padding_mode=("border", "zeros"),
            ),
            RandFlipd(keys=KEYS, prob=0.5, spatial_axis=0),
            RandGaussianNoised(keys="image", prob=1, std=NOISE),
            RandAdjustContrastd(keys="image", prob=1, gamma=GAMMA),
        ]
    )
    dataset = CacheDataset(job.slices(), transform, progress=False)
    loader = DataLoader(
        dataset, batch_size=job.optim.batch_size, shuffle=True, num_workers=job.workers, persistent_workers=job.workers > 0
    )
    model = BasicUNet(len(shift), 1, 1, features=job.features)
    loss_function, optimizer = DiceLoss(sigmoid=True), torch.optim.Adam(model.parameters(), job.optim.lr)
    model.train()
    while True:
        turns.wait()
        epoch_loss = 0.0
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_function(model(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item()
        turns.report(len(dataset))
