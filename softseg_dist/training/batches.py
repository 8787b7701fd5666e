"""From the store to training batches: which items belong to a split, in which order they come, and their augmented targets.

Legend: B batch, C image channels, K classes, *S space. What a target needs of a whole case is made once and kept for all its items.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softseg_dist.data.preprocess import Sample
from softseg_dist.data.store import Store, local_store
from softseg_dist.frozen import grouped
from softseg_dist.numerics.augmentation import Drawn, apply, draw_all, join, moves, pairs
from softseg_dist.numerics.labels import STAPLE_FUSIONS, LabelMode, prepare_target
from softseg_dist.numerics.patches import Window
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.transforms import Frame, Pairing
from softseg_dist.study import Recipe
from softseg_dist.training.task import FitTask

# Targets that a process keeps. Beyond it drops those that were used longest ago, and makes them again when they are needed.
KEPT_BYTES = 2**30
MOST_VOXELS = 10_000  # of a class that patches may be centred on: more would not make patches differ more

_kept: OrderedDict[tuple[str, int, LabelMode, str], Tensor] = OrderedDict()
_keeping = threading.Lock()


@lru_cache(maxsize=2)
def open_store(path: str, fingerprint: str) -> Store:
    """The store, mapped once per process: fits that follow each other in a warm process share it."""
    return Store.open(local_store(path), fingerprint)


def cases_of(store: Store, subjects: Sequence[str]) -> list[int]:
    """Indices of all cases of `subjects`, in the store's order."""
    wanted = set(subjects)
    return [case.index for case in store.cases if case.subject in wanted]


@dataclass(frozen=True)
class Batches:
    """All training items of one fit. What is drawn, and how it is augmented, depends on (`FitTask.seeds`, epoch, item) alone.

    If the recipe has a patch, an item is seen through one, which every epoch cuts elsewhere.
    """

    store: Store
    recipe: Recipe
    items: tuple[tuple[int, int], ...]  # (case, item of the case), as often as an epoch takes a patch of it
    seed: int

    @classmethod
    def of(cls, task: FitTask, store: Store) -> Batches:
        """The training items of a task's split."""
        times = range(1 if task.recipe.patch is None else task.recipe.patch.per_item)
        cases = cases_of(store, task.split.train)
        items = tuple((c, i) for c in cases for i in range(store.cases[c].num_items) for _ in times)
        return cls(store, task.recipe, items, seed_of(*task.seeds))

    @property
    def steps_per_epoch(self) -> int:
        """The last batch may be smaller; nothing is dropped or repeated."""
        return -(-len(self.items) // self.recipe.optim.batch_size)

    @property
    def num_steps(self) -> int:
        """Of all epochs."""
        return self.recipe.optim.epochs * self.steps_per_epoch

    def order(self, epoch: int) -> list[int]:
        """The items in the order in which `epoch` sees them: each exactly once."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(len(self.items), generator=generator).tolist()

    def batch(self, epoch: int, members: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
        """Augmented images [B C *S] and targets [B K *S] of the items `members`, as `epoch` sees them.

        Where the recipe joins items in pairs, each is joined with its `partner` after both are augmented, rounded and smoothed.
        """
        image, target = self._augmented(epoch, members, device)
        if pairs(self.recipe.augment):
            partners = [self.partner(epoch, member) for member in members]
            partner_image, partner_target = self._augmented(epoch, partners, device)
            for spacing_mm, rows in self._by_spacing(members).items():
                part = image[rows], target[rows], partner_image[rows], partner_target[rows]
                seeds = [self.augment_seed(epoch, members[row]) for row in rows]
                drawn = draw_all(self.recipe.augment, seeds, Frame.of(image, spacing_mm), (Pairing,))
                image[rows], target[rows] = join(*part, drawn)
        return image, target

    def partner(self, epoch: int, member: int) -> int:
        """The item that `epoch` joins `member` with: any other one, or itself if there is no other."""
        draw = seed_of(self.seed, "partner", epoch, member)
        return (member + 1 + draw % max(1, len(self.items) - 1)) % len(self.items)

    def mean_label(self) -> Tensor:
        """Share of foreground per class [K] over all training items, each whole and once, before augmentation and smoothing."""
        members = range(0, len(self.items), 1 if self.recipe.patch is None else self.recipe.patch.per_item)
        mean = torch.nanmean if self.store.has_ignored else torch.mean
        means = [mean(self._item(0, member)[1].flatten(1), dim=1) for member in members]
        known = [of_item for of_item in means if not of_item.isnan().any()]  # but for items to ignore as a whole
        return reduce(torch.add, known) / len(known)

    def _augmented(self, epoch: int, members: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
        """Images and targets of `members`, each augmented and smoothed by itself in its own spacing, not joined yet."""
        image, target = (maps.to(device) for maps in self.read(epoch, members))
        groups, parts = self._by_spacing(members), []
        for spacing_mm, rows in groups.items():
            frame, seeds = Frame.of(image, spacing_mm), [self.augment_seed(epoch, members[row]) for row in rows]
            parts.append(self.augmented(image[rows], target[rows], draw_all(self.recipe.augment, seeds, frame), frame))
        place = torch.tensor([row for rows in groups.values() for row in rows], device=device).argsort()
        images, targets = zip(*parts, strict=True)
        return torch.cat(images)[place], torch.cat(targets)[place]

    def augmented(self, image: Tensor, target: Tensor, drawn: Drawn, frame: Frame) -> tuple[Tensor, Tensor]:
        """What was read of items of one spacing as the network sees it: augmented as `drawn`, cut to the patch, smoothed."""
        if self.store.has_ignored:  # as one more map, which is moved like the others
            ignored = target.isnan().any(1, keepdim=True)
            target = torch.cat([target.nan_to_num(), ignored.to(target.dtype)], dim=1)
        image, target = apply(image, target, drawn, self.recipe.label, frame)
        if self.recipe.patch is not None:
            image, target = self.recipe.patch.middle(image), self.recipe.patch.middle(target)
        if self.store.has_ignored:
            target, ignored = target[:, :-1], target[:, -1:] > 0
        if self.recipe.smoothing is not None:
            target = self.recipe.smoothing(target, image, frame.spacing_mm)
        return image, target.masked_fill(ignored, torch.nan) if self.store.has_ignored else target

    def known(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What a loss compares: both are 0 where the target is NaN, in voxels to ignore, so that no gradient comes from there."""
        if not self.store.has_ignored:
            return prediction, target
        ignored = target.isnan()
        return prediction.masked_fill(ignored, 0), target.masked_fill(ignored, 0)

    def read(self, epoch: int, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and targets of `members` as they are before augmentation: whole, or as much as `window` says."""
        read = [self._item(epoch, member, self.window(epoch, member)) for member in members]
        images, targets = zip(*read, strict=True)
        return torch.from_numpy(np.stack(images)), torch.stack(targets)

    def window(self, epoch: int, member: int) -> Window | None:
        """What is read of an item: its patch, with what augmentation may bring in from around it; None is all.

        Without a patch an item is in the middle of its window, which is larger where another case is.
        """
        whole = self.store.cases[self.items[member][0]].size
        if (patch := self.recipe.patch) is None:
            return Window.around(whole, self.store.size) if self.store.sizes_differ else None
        generator = torch.Generator().manual_seed(seed_of(self.seed, "patch", epoch, member))
        window = patch.draw(generator, whole, labelled_voxels(self.store, *self.items[member]))
        return window.grown(patch.margin) if moves(self.recipe.augment) else window

    @property
    def read_size(self) -> tuple[int, ...]:
        """How much is read of every item."""
        if (patch := self.recipe.patch) is None:
            return self.store.size
        return Window((0,) * len(patch.size), patch.size).grown(patch.margin).size if moves(self.recipe.augment) else patch.size

    def augment_seed(self, epoch: int, member: int) -> int:
        """What is drawn to augment an item in this epoch follows from it."""
        return seed_of(self.seed, "augment", epoch, member)

    def rater_seed(self, epoch: int, member: int) -> int:
        """Which rater an item has in this epoch follows from it, if the recipe draws one."""
        return seed_of(self.seed, "rater", epoch, member)

    def _by_spacing(self, members: Sequence[int]) -> dict[tuple[float, ...], list[int]]:
        """Rows of a batch by voxel size, one group unless a study keeps each case's own: a rotation must be one in mm."""
        return grouped((self.store.sample(self.items[member][0]).spacing_mm, row) for row, member in enumerate(members))

    def _item(self, epoch: int, member: int, window: Window | None = None) -> tuple[np.ndarray, Tensor]:
        case, item = self.items[member]
        image = self.store.sample(case).image[item]
        target = item_target(self.store, self.recipe, case, item, self.rater_seed(epoch, member), window)
        return image if window is None else window.of(image, lowest(self.store, case, item)), target


def item_target(store: Store, recipe: Recipe, case: int, item: int, draw: int, window: Window | None = None) -> Tensor:
    """The target [K *S] of an item, or of a window of it, as `labels.prepare_target` makes it; `draw` is its seed in this epoch.

    Beyond the image's border nothing is labelled. STAPLE sees all items of the case together, once for all fits of this process. Do
    not change the result in place.
    """
    if recipe.fusion in STAPLE_FUSIONS:
        whole = _case_target(store, case, recipe.label, recipe.fusion)[item]
        return whole if window is None else _copied(whole.numpy(), window)
    sample = store.sample(case)
    raters = _copied(sample.raters[item], window)
    nearest = None if sample.nearest is None else _copied(sample.nearest[item], window)
    return prepare_target(raters, nearest, recipe.label, recipe.fusion, sample.rater_names, draw)


@lru_cache(maxsize=2**12)
def lowest(store: Store, case: int, item: int) -> NDArray[np.float32]:
    """The minimum of each channel [C] of an item, which continues it beyond its border."""
    image = store.sample(case).image[item]
    return image.min(axis=tuple(range(1, image.ndim)))


@lru_cache(maxsize=2**12)
def labelled_voxels(store: Store, case: int, item: int) -> tuple[NDArray[np.int32], ...]:
    """Where some rater has labelled each class, if only in part: flat indices into *S, of `MOST_VOXELS` of them if there are more.

    Whatever the fusion and the label mode: every candidate sees the same patches.
    """
    found = [np.flatnonzero(labelled).astype(np.int32) for labelled in (store.sample(case).raters[item] > 0).any(axis=0)]
    # A random choice, always the same, as every n-th voxel would be in few planes.
    return tuple(v if len(v) <= MOST_VOXELS else np.random.default_rng(0).choice(v, MOST_VOXELS, replace=False) for v in found)


def case_target(sample: Sample, mode: LabelMode, fusion: str, draw: int | None = None) -> Tensor:
    """The targets [N K *S] of all items of a case before augmentation; see `labels.prepare_target`."""
    raters = _copied(sample.raters).movedim(0, 2)  # [R K N *S]
    nearest = None if sample.nearest is None else _copied(sample.nearest).movedim(0, 2)
    return prepare_target(raters, nearest, mode, fusion, sample.rater_names, draw).movedim(1, 0)


def _case_target(store: Store, case: int, mode: LabelMode, fusion: str) -> Tensor:
    """The `case_target` of a case, made once."""
    key = store.fingerprint, case, mode, fusion
    with _keeping:  # fits that run side by side wait for each other's targets, as they need the same ones
        if key not in _kept:
            _kept[key] = case_target(store.sample(case), mode, fusion).contiguous()
            while sum(target.nbytes for target in _kept.values()) > KEPT_BYTES and len(_kept) > 1:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]


def _copied(values: np.ndarray, window: Window | None = None) -> Tensor:
    """A tensor of `values`, which are read-only views of the store, or of a window of them."""
    return torch.from_numpy(np.array(values if window is None else window.of(values)))
