"""The batches of `Batches`, made on a device: the host draws, the device gathers and augments, and neither waits for the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softseg_dist.numerics.augmentation import apply, draw_all, draw_pairs, join, pairs
from softseg_dist.numerics.transforms import Frame
from softseg_dist.training.batches import Batches
from softseg_dist.training.gpu.feed import Fields, Inputs
from softseg_dist.training.gpu.resident import Source, source_of


class DeviceBatches:
    """What `Batches.batch` gives, in two halves: `write` on the host and `batch` on the device.

    All cases have one voxel size. A batch of items that are joined in pairs has their partners behind them.
    """

    def __init__(self, batches: Batches, source: Source, device: torch.device) -> None:
        self.batches, self.recipe, self.source = batches, batches.recipe, source
        store, patch = batches.store, batches.recipe.patch
        spacing_mm = store.sample(batches.items[0][0]).spacing_mm
        sizes = batches.read_size, store.size if patch is None else patch.size
        self.frame = Frame(store.channels, sizes[0], spacing_mm, device)
        self.draw_frame, self.pair_frame = (Frame(store.channels, size, spacing_mm, torch.device("cpu")) for size in sizes)
        self.in_pairs = pairs(batches.recipe.augment)
        self.changing = draw_all(batches.recipe.augment, [0], self.draw_frame)
        self.joining = draw_pairs(batches.recipe.augment, [0], self.pair_frame)

    def fields(self, size: int) -> Fields:
        """Inputs of a batch of `size` items."""
        rows = 2 * size if self.in_pairs else size
        one_by_one = {f"change{i}": ((rows, *p.shape[1:]), p.dtype) for i, (_, p) in enumerate(self.changing)}
        in_pairs = {f"join{i}": ((size, *p.shape[1:]), p.dtype) for i, (_, p) in enumerate(self.joining)}
        return {**self.source.fields(rows), **one_by_one, **in_pairs}

    def write(self, into: dict[str, Tensor], epoch: int, members: Sequence[int]) -> None:
        """Draw everything that is random about the items `members` as `epoch` sees them."""
        partners = [self.batches.partner(epoch, member) for member in members] if self.in_pairs else []
        rows = [*members, *partners]
        self.source.write(into, epoch, rows)
        seeds = [self.batches.augment_seed(epoch, row) for row in rows]
        for index, (_, parameters) in enumerate(draw_all(self.recipe.augment, seeds, self.draw_frame)):
            into[f"change{index}"].copy_(parameters)
        own = seeds[: len(members)]
        for index, (_, parameters) in enumerate(draw_pairs(self.recipe.augment, own, self.pair_frame)):
            into[f"join{index}"].copy_(parameters)

    def batch(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Augmented images [B C *S] and targets [B K *S]."""
        drawn = [(transform, inputs[f"change{i}"]) for i, (transform, _) in enumerate(self.changing)]
        image, target = apply(*self.source.read(inputs), drawn, self.recipe.label, self.frame)
        if self.recipe.patch is not None:
            image, target = self.recipe.patch.middle(image), self.recipe.patch.middle(target)
        if self.recipe.smoothing is not None:
            target = self.recipe.smoothing(target, image, self.frame.spacing_mm)
        if not self.in_pairs:
            return image, target
        size = len(image) // 2
        joined = [(transform, inputs[f"join{i}"]) for i, (transform, _) in enumerate(self.joining)]
        return join(image[:size], target[:size], image[size:], target[size:], joined)


class ReadyBatches:
    """`Batches.batch`, from the host: for cases of several voxel sizes, which share no one way to be augmented."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of items, always in the same place

    def fields(self, size: int) -> Fields:
        """Nothing but how many they are."""
        return {"items": ((size,), torch.int64)}

    def write(self, into: dict[str, Tensor], epoch: int, members: Sequence[int]) -> None:
        """Make the batch, behind what the device is about to do."""
        made = self.batches.batch(epoch, members, str(self.device))
        for place, values in zip(self._made.setdefault(len(members), made), made, strict=True):
            place.copy_(values)

    def batch(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What was made."""
        return self._made[len(inputs["items"])]


def device_batches(batches: Batches, device: torch.device) -> tuple[DeviceBatches | ReadyBatches, tuple[str, ...]]:
    """The batches of a fit on `device`, and a note on what could not be had."""
    cases = {case for case, _ in batches.items}
    if len({batches.store.sample(case).spacing_mm for case in cases}) > 1:
        return ReadyBatches(batches, device), (
            "augmentation: voxels differ in size from case to case, so batches are made outside of the step",
        )
    source, notes = source_of(batches, device)
    return DeviceBatches(batches, source, device), notes
