"""The three sides of `bench_peer_augmentation.py`, whose turn is some batches: ours, MONAI's and TorchIO's transforms.

All turn, scale, shift and, if asked, bend 16 slices of 96 x 96 with their soft labels in the same ranges, by linear interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from peers import Turns
from pydantic import BaseModel
from torch import Tensor

BATCH, SIZE, SPACING_MM = 16, 96, 0.5
DEGREES, SCALE, SHIFT = 20.0, 0.1, 0.03
CONTROL_MM, BEND_MM = 8.0, 1.0  # distance of control points, standard deviation of their displacement along each axis
T = TypeVar("T")


class Job(BaseModel, frozen=True):
    """What a turn does."""

    elastic: bool
    batches: int


def slices() -> tuple[Tensor, Tensor]:
    """Images and labels [B 1 *S]."""
    image, label = torch.rand(2, BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return image, label


def ours(job_json: str, turns: Turns) -> None:
    """One map for the whole batch."""
    from softseg_dist import Affine, Elastic, Frame
    from softseg_dist.numerics.augmentation import apply, draw_all
    from softseg_dist.training.host_step import kept_heap

    job, (image, label) = Job.model_validate_json(job_json), slices()
    affine = Affine(degrees=DEGREES, scale=SCALE, shift=SHIFT)
    transforms = (affine, Elastic(spacing_mm=CONTROL_MM, std_mm=BEND_MM)) if job.elastic else (affine,)
    spacing_mm = (SPACING_MM, SPACING_MM)

    def augment() -> object:
        frame = Frame.of(image, spacing_mm)
        return apply(image, label, draw_all(transforms, range(BATCH), frame), "soft", frame)

    with kept_heap():  # as in a fit
        serve(job, turns, augment)


def monai(job_json: str, turns: Turns) -> None:
    """Its dictionary transforms, sample by sample, as its data sets call them."""
    from monai.transforms import Rand2DElasticd, RandAffined
    from monai.utils import set_determinism

    job = Job.model_validate_json(job_json)
    keys, padding = ("image", "label"), ("border", "zeros")
    radians, shift = math.radians(DEGREES), [SHIFT * SIZE] * 2
    set_determinism(0)
    move = (
        Rand2DElasticd(
            keys, CONTROL_MM / SPACING_MM, (0, 2 * BEND_MM / SPACING_MM), prob=1, rotate_range=radians,
            scale_range=[SCALE] * 2, translate_range=shift, mode="bilinear", padding_mode=padding,
        )
        if job.elastic
        else RandAffined(
            keys, prob=1, rotate_range=radians, scale_range=[SCALE] * 2, translate_range=shift, mode="bilinear",
            padding_mode=padding,
        )
    )  # fmt: skip
    samples = [{"image": image, "label": label} for image, label in zip(*slices(), strict=True)]
    serve(job, turns, lambda: collate([move(sample) for sample in samples]))


def torchio(job_json: str, turns: Turns) -> None:
    """Its transforms, subject by subject; a slice is a volume of one slice, as it knows no other."""
    import torchio as tio

    job = Job.model_validate_json(job_json)
    shift_mm = SHIFT * SIZE * SPACING_MM
    names = {"image_interpolation": "linear", "label_interpolation": "linear"}
    move = tio.RandomAffine(
        scales=(1 - SCALE, 1 + SCALE, 1 - SCALE, 1 + SCALE, 1, 1),
        degrees=(0, 0, 0, 0, -DEGREES, DEGREES),
        translation=(-shift_mm, shift_mm, -shift_mm, shift_mm, 0, 0),
        **names,
    )
    if job.elastic:
        points = math.ceil((SIZE - 1) * SPACING_MM / CONTROL_MM) + 3
        bend = tio.RandomElasticDeformation((points, points, 5), (2 * BEND_MM, 2 * BEND_MM, 0), locked_borders=1, **names)
        move = tio.Compose([move, bend])
    grid = torch.diag(torch.tensor([SPACING_MM, SPACING_MM, 1.0, 1.0])).numpy()
    subjects = [
        tio.Subject(
            image=tio.ScalarImage(tensor=image[..., None], affine=grid), label=tio.LabelMap(tensor=label[..., None], affine=grid)
        )
        for image, label in zip(*slices(), strict=True)
    ]

    def batch() -> list[Tensor]:
        moved = [move(subject) for subject in subjects]
        return collate([{"image": one.image.data, "label": one.label.data} for one in moved])

    serve(job, turns, batch)


def serve(job: Job, turns: Turns, batch: Callable[[], T]) -> None:
    """Take turns of so many batches, on one thread."""
    torch.set_num_threads(1)
    while True:
        turns.wait()
        for _ in range(job.batches):
            batch()
        turns.report(BATCH * job.batches)


def collate(samples: list[dict[str, Tensor]]) -> list[Tensor]:
    """Images and labels as batches."""
    return [torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in ("image", "label")]
