"""The batches of `Batches`, made on a device: the host draws, the device gathers and augments, and neither waits for the other.

Training items before augmentation are in the device's own memory if all fit; else they are sent batch by batch.

Legend: T targets of the store (one of every item, or one of every item and rater), R rows of a batch, C image channels, K classes,
*S space, D its number of axes, *W what is read of an item.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from softseg_dist.data.store import Store
from softseg_dist.numerics.augmentation import draw_all, join, pairs
from softseg_dist.numerics.labels import rater_of
from softseg_dist.numerics.transforms import Frame, Pairing
from softseg_dist.study import Recipe
from softseg_dist.training.batches import Batches, item_target, lowest

SHARE = 0.5  # of the memory that is free: the rest is for training, and for other fits on the device
MOST_KEPT = 4  # tensors: images and targets of two stores, or images of one and targets of three kinds

Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of tensors by their names."""

Inputs = Mapping[str, Tensor]
"""The tensors themselves, as the device reads them in a step."""

_kept: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
_keeping = threading.Lock()


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
        self.joining = draw_all(batches.recipe.augment, [0], self.pair_frame, (Pairing,))

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
        for index, (_, parameters) in enumerate(draw_all(self.recipe.augment, own, self.pair_frame, (Pairing,))):
            into[f"join{index}"].copy_(parameters)

    def batch(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Augmented images [B C *S] and targets [B K *S]."""
        drawn = [(transform, inputs[f"change{i}"]) for i, (transform, _) in enumerate(self.changing)]
        image, target = self.batches.augmented(*self.source.read(inputs), drawn, self.frame)
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
        note = "augmentation: voxels differ in size from case to case, so batches are made outside of the step"
        return ReadyBatches(batches, device), (note,)
    try:
        return DeviceBatches(batches, Resident(batches, device), device), ()
    except _NoRoom:
        note = "images: they take too much of the device's memory, so every batch is sent there"
        return DeviceBatches(batches, Streamed(batches), device), (note,)


class Resident:
    """All items of the store in the device's memory: the host only says which ones, and from where on."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        store, recipe = batches.store, batches.recipe
        self.batches = batches
        self.is_cut = recipe.patch is not None or store.sizes_differ
        self.num_targets = [len(case.rater_names) if recipe.fusion == "random_rater" else 1 for case in store.cases]
        self.first_item = list(accumulate((case.num_items for case in store.cases), initial=0))
        counts = [case.num_items * num for case, num in zip(store.cases, self.num_targets, strict=True)]
        self.first_target = list(accumulate(counts, initial=0))
        of_items = [case.size for case in store.cases for _ in range(case.num_items)]
        of_targets = [case.size for case, count in zip(store.cases, counts, strict=True) for _ in range(count)]
        images, targets = ("images", store.fingerprint), ("targets", store.fingerprint, recipe.label, recipe.fusion)
        each = (image for case in store.cases for image in torch.from_numpy(np.array(store.sample(case.index).image)))
        self.images = _Rows(images, store.channels, of_items, device, each)
        if self.is_cut:
            items = [(case.index, item) for case in store.cases for item in range(case.num_items)]
            self.lowest = torch.from_numpy(np.stack([lowest(store, *item) for item in items])).to(device)
        self.targets = _Rows(targets, len(store.classes), of_targets, device, _targets_of(store, recipe))

    def fields(self, rows: int) -> Fields:
        """Rows of images and targets, and where windows start."""
        chosen = {"item": ((rows,), torch.int64), "target": ((rows,), torch.int64)}
        return chosen | ({"start": ((rows, self.batches.store.dim), torch.int64)} if self.is_cut else {})

    def write(self, into: dict[str, Tensor], epoch: int, members: Sequence[int]) -> None:
        """Which items, which raters' targets, and which parts of them."""
        items = [self.batches.items[member] for member in members]
        into["item"].copy_(torch.tensor([self.first_item[case] + item for case, item in items]))
        into["target"].copy_(torch.tensor([self._target_row(epoch, member) for member in members]))
        if "start" in into:
            windows = [self.batches.window(epoch, member) for member in members]
            into["start"].copy_(torch.tensor([window.start for window in windows if window is not None]))

    def _target_row(self, epoch: int, member: int) -> int:
        case, item = self.batches.items[member]
        num = self.num_targets[case]
        return self.first_target[case] + item * num + rater_of(self.batches.rater_seed(epoch, member), num)

    def read(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The rows, or the parts of them in their windows."""
        if "start" not in inputs:
            return self.images.whole(inputs["item"]), self.targets.whole(inputs["target"])
        place, inside = _places(inputs["start"], self.images.sizes[inputs["item"]], self.batches.read_size)
        beyond = self.lowest[inputs["item"]].reshape(-1, self.images.channels, *[1] * (place.ndim - 2))
        image = torch.where(inside, self.images.at(inputs["item"], place), beyond)
        return image, self.targets.at(inputs["target"], place).masked_fill(~inside, 0)


class Streamed:
    """Items are read from the store by the host, and sent."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def fields(self, rows: int) -> Fields:
        """The images and targets themselves."""
        store, size = self.batches.store, self.batches.read_size
        shapes = {"image": (rows, store.channels, *size), "target": (rows, len(store.classes), *size)}
        return {name: (shape, torch.float32) for name, shape in shapes.items()}

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


class _Rows:
    """Maps [C *S] of several `sizes` *S, one behind the other in one flat buffer; `maps` are read if it is not there yet."""

    def __init__(
        self, key: tuple[str, ...], channels: int, sizes: Sequence[tuple[int, ...]], device: torch.device, maps: Iterable[Tensor]
    ) -> None:
        counts = [channels * math.prod(size) for size in sizes]

        def fill(buffer: Tensor) -> None:
            for part, values in zip(buffer.split(counts), maps, strict=True):
                part.copy_(values.flatten())

        self.channels = channels
        self.buffer = _keep(key, sum(counts), device, fill)
        self.sizes = torch.tensor(sizes, device=device)
        self.starts = torch.tensor([0, *accumulate(counts)][:-1], device=device)
        self.one_size = sizes[0] if len(set(sizes)) == 1 else None

    def whole(self, rows: Tensor) -> Tensor:
        """The maps [R C *S] of rows [R], all of one size."""
        assert self.one_size is not None, "maps of several sizes are read in windows"
        return self.buffer.view(-1, self.channels, *self.one_size).index_select(0, rows)

    def at(self, rows: Tensor, place: Tensor) -> Tensor:
        """The values [R C *W] of rows [R] at places [R 1 *W] of each."""
        along = [1] * (place.ndim - 2)
        channel = torch.arange(self.channels, device=rows.device) * self.sizes[rows].prod(1)[:, None]
        return self.buffer[(self.starts[rows][:, None] + channel).view(*channel.shape, *along) + place]


def _targets_of(store: Store, recipe: Recipe) -> Iterator[Tensor]:
    """[K *S] of every item of the store, or of each of its raters if the recipe draws one."""
    for case in store.cases:
        drawn = recipe.fusion == "random_rater"
        fusions = [f"rater:{name}" for name in case.rater_names] if drawn else [recipe.fusion]
        recipes = [recipe.replace(fusion=fusion) for fusion in fusions]
        for item in range(case.num_items):
            yield from (item_target(store, one, case.index, item, draw=0) for one in recipes)


def _places(start: Tensor, whole: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Windows of `size` *W that begin at `start` [R D]: flat indices into *S of `whole` voxels [R D] as [R 1 *W], the nearest ones
    for what lies outside of it, and whether they lie inside [R 1 *W]."""
    place, inside = start.new_zeros(()), start.new_ones((), dtype=torch.bool)
    for axis, width in enumerate(size):
        along = [-1 if axis == other else 1 for other in range(len(size))]
        first, n = (of_rows[:, axis].reshape(-1, 1, *[1] * len(size)) for of_rows in (start, whole))
        at = first + torch.arange(width, device=start.device).view(along)
        place = place * n + at.clamp(min=0).minimum(n - 1)
        inside = inside & (at >= 0) & (at < n)
    return place, inside


class _NoRoom(Exception):
    """Maps take too much of a device's memory."""


def _keep(kind: tuple[str, ...], count: int, device: torch.device, fill: Callable[[Tensor], None]) -> Tensor:
    """`count` values that `fill` fills in, kept for the fits that follow in this process. Raises _NoRoom for too much memory."""
    key, num_bytes = (*kind, str(device)), count * torch.float32.itemsize
    with _keeping:
        while key not in _kept and _kept and num_bytes > SHARE * _free_bytes(device):
            _kept.popitem(last=False)  # what was used longest ago; a fit that uses it keeps it for itself
        if key not in _kept:
            if num_bytes > SHARE * _free_bytes(device):
                raise _NoRoom
            buffer = torch.empty(count, device=device)
            fill(buffer)
            _kept[key] = buffer
        _kept.move_to_end(key)
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
        return _kept[key]


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
