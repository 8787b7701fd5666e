"""Where a device finds training items before augmentation: in its own memory if all fit, else they are sent batch by batch.

Legend: I items of the store, T targets (one of every item, or one of every item and rater), R rows of a batch, C image channels,
K classes, *S space, D its number of axes, *W what is read of an item.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from softseg_dist.data.store import Store
from softseg_dist.numerics.labels import rater_of
from softseg_dist.study import Recipe
from softseg_dist.training.batches import Batches
from softseg_dist.training.gpu.feed import Fields, Inputs
from softseg_dist.training.targets import item_target

SHARE = 0.5  # of the memory that is free: the rest is for training, and for other fits on the device
MOST_KEPT = 4  # tensors: images and targets of two stores, or images of one and targets of three kinds

_kept: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
_keeping = threading.Lock()


def source_of(batches: Batches, device: torch.device) -> tuple[Source, tuple[str, ...]]:
    """The best source that there is memory for, and a note if it is not the device's own."""
    store = batches.store
    rows = _TargetRows.of(store, batches.recipe.fusion)
    images = _keep(
        ("images", store.fingerprint, str(device)), _bytes(store, _num_items(store), store.channels), device,
        lambda: _images(store, device),
    )  # fmt: skip
    kind = batches.recipe.label, batches.recipe.fusion
    targets = _keep(
        ("targets", store.fingerprint, *kind, str(device)), _bytes(store, rows.count, len(store.classes)), device,
        lambda: _targets(store, batches.recipe, rows.count, device),
    )  # fmt: skip
    if images is None or targets is None:
        return Streamed(batches), ("images: they take too much of the device's memory, so every batch is sent there",)
    return Resident(batches, images, targets, rows), ()


class Resident:
    """All items of the store in the device's memory: the host only says which ones, and from where on."""

    def __init__(self, batches: Batches, images: Tensor, targets: Tensor, rows: _TargetRows) -> None:
        self.batches, self.images, self.targets, self.rows = batches, images, targets, rows
        self.first_item = _firsts([case.num_items for case in batches.store.cases])

    def fields(self, rows: int) -> Fields:
        """Rows of images and targets, and where patches start."""
        chosen = {"item": ((rows,), torch.int64), "target": ((rows,), torch.int64)}
        if self.batches.recipe.patch is None:
            return chosen
        return chosen | {"start": ((rows, self.batches.store.dim), torch.int64)}

    def write(self, into: dict[str, Tensor], epoch: int, members: Sequence[int]) -> None:
        """Which items, which raters' targets, and which parts of them."""
        items = [self.batches.items[member] for member in members]
        into["item"].copy_(torch.tensor([self.first_item[case] + item for case, item in items]))
        draws = [self.batches.rater_seed(epoch, member) for member in members]
        into["target"].copy_(torch.tensor([self.rows.row(*at, draw) for at, draw in zip(items, draws, strict=True)]))
        if "start" in into:
            windows = [self.batches.window(epoch, member) for member in members]
            into["start"].copy_(torch.tensor([window.start for window in windows if window is not None]))

    def read(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The rows, or of patches the parts in their windows."""
        if "start" not in inputs:
            return self.images.index_select(0, inputs["item"]), self.targets.index_select(0, inputs["target"])
        place, inside = _places(inputs["start"], self.images.shape[2:], self.batches.read_size)
        image, target = _at(self.images, inputs["item"], place), _at(self.targets, inputs["target"], place)
        return image, target.masked_fill(~inside, 0)


class Streamed:
    """Items are read from the store by the host, and sent."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def fields(self, rows: int) -> Fields:
        """The images and targets themselves."""
        store, size = self.batches.store, self.batches.read_size
        return {
            "image": ((rows, store.channels, *size), torch.float32),
            "target": ((rows, len(store.classes), *size), torch.float32),
        }

    def write(self, into: dict[str, Tensor], epoch: int, members: Sequence[int]) -> None:
        """Read them."""
        image, target = self.batches.read(epoch, members)
        into["image"].copy_(image)
        into["target"].copy_(target)

    def read(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What has arrived."""
        return inputs["image"], inputs["target"]


Source = Resident | Streamed
"""Gives a device the items of a batch: `read` returns images [R C *W] and targets [R K *W] on it."""


@dataclass(frozen=True)
class _TargetRows:
    """The rows of the targets of an item: one if raters are fused the same way in every epoch, else one for each rater."""

    first: tuple[int, ...]
    num_raters: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, store: Store, fusion: str) -> _TargetRows:
        raters = [len(case.rater_names) if fusion == "random_rater" else 1 for case in store.cases]
        counts = [case.num_items * several for case, several in zip(store.cases, raters, strict=True)]
        return cls(tuple(_firsts(counts)), tuple(raters), sum(counts))

    def row(self, case: int, item: int, draw: int) -> int:
        several = self.num_raters[case]
        return self.first[case] + item * several + rater_of(draw, several)


def _firsts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _num_items(store: Store) -> int:
    return sum(case.num_items for case in store.cases)


def _bytes(store: Store, count: int, maps: int) -> int:
    return 4 * count * maps * math.prod(store.size)


def _images(store: Store, device: torch.device) -> Tensor:
    """[I C *S]"""
    images = torch.empty(_num_items(store), store.channels, *store.size, device=device)
    counts = [case.num_items for case in store.cases]
    for case, part in zip(store.cases, images.split(counts), strict=True):
        part.copy_(torch.from_numpy(np.array(store.sample(case.index).image)))
    return images


def _targets(store: Store, recipe: Recipe, count: int, device: torch.device) -> Tensor:
    """[T K *S]"""
    targets = torch.empty(count, len(store.classes), *store.size, device=device)
    rows = iter(targets)
    for case in store.cases:
        drawn = recipe.fusion == "random_rater"
        fusions = [f"rater:{name}" for name in case.rater_names] if drawn else [recipe.fusion]
        recipes = [recipe.replace(fusion=fusion) for fusion in fusions]
        for item in range(case.num_items):
            for one in recipes:
                next(rows).copy_(item_target(store, one, case.index, item, draw=0))
    return targets


def _places(start: Tensor, whole: Sequence[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Windows of `size` *W that begin at `start` [R D]: flat indices into *S [R 1 *W], the nearest ones for what lies outside of
    it, and whether they lie inside [R 1 *W]."""
    place, inside = start.new_zeros(()), start.new_ones((), dtype=torch.bool)
    for axis, (n, width) in enumerate(zip(whole, size, strict=True)):
        along = [-1 if axis == other else 1 for other in range(len(size))]
        at = start[:, axis].reshape(-1, 1, *[1] * len(size)) + torch.arange(width, device=start.device).view(along)
        place = place * n + at.clamp(0, n - 1)
        inside = inside & (at >= 0) & (at < n)
    return place, inside


def _at(maps: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """The values [R C *W] of rows of `maps` [T C *S] at places [R 1 *W]."""
    values = maps.flatten(2)[row[:, None], :, place.flatten(1)]  # [R, number of places, C]
    return values.movedim(-1, 1).reshape(len(row), maps.shape[1], *place.shape[2:])


def _keep(key: tuple[str, ...], num_bytes: int, device: torch.device, make: Callable[[], Tensor]) -> Tensor | None:
    """What `make` gives, kept for the fits that follow in this process; None if it takes too much of the device's memory."""
    with _keeping:
        while key not in _kept and _kept and num_bytes > SHARE * _free_bytes(device):
            _kept.popitem(last=False)  # what was used longest ago; a fit that uses it keeps it for itself
        if key not in _kept:
            if num_bytes > SHARE * _free_bytes(device):
                return None
            _kept[key] = make()
        _kept.move_to_end(key)
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
        return _kept[key]


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
