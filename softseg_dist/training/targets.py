"""The target of a training item before augmentation. What depends on a whole case is made once and kept for all its items.

Legend: N items of a case, R raters, K classes, *S space.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softseg_dist.data.store import Store
from softseg_dist.numerics.labels import STAPLE_FUSIONS, LabelMode, prepare_target
from softseg_dist.numerics.patches import Window
from softseg_dist.study import Recipe

# Targets that a process keeps. Beyond it drops those that were used longest ago, and makes them again when they are needed.
KEPT_BYTES = 2**30
MOST_VOXELS = 10_000  # of a class that patches may be centred on: more would not make patches differ more

_kept: OrderedDict[tuple[str, int, LabelMode, str], Tensor] = OrderedDict()
_keeping = threading.Lock()


def item_target(store: Store, recipe: Recipe, case: int, item: int, draw: int, window: Window | None = None) -> Tensor:
    """The target [K *S] of an item, or of a window of it, as `labels.prepare_target` makes it.

    `draw` is the seed of this item in this epoch. Beyond the image's border nothing is labelled.

    STAPLE sees all items of the case together, once for all fits of this process. Do not change the result in place.
    """
    if recipe.fusion in STAPLE_FUSIONS:
        whole = _case_target(store, case, recipe.label, recipe.fusion)[item]
        return whole if window is None else _copied(whole.numpy(), window)
    sample = store.sample(case)
    raters = _copied(sample.raters[item], window)
    nearest = None if sample.nearest is None else _copied(sample.nearest[item], window)
    return prepare_target(raters, nearest, recipe.label, recipe.fusion, sample.rater_names, draw)


@lru_cache(maxsize=2**12)
def labelled_voxels(store: Store, case: int, item: int) -> tuple[NDArray[np.int32], ...]:
    """Where some rater has labelled each class, if only in part: flat indices into *S, of `MOST_VOXELS` of them if there are more.

    Whatever the fusion and the label mode: every candidate sees the same patches.
    """
    found = [np.flatnonzero(labelled).astype(np.int32) for labelled in store.sample(case).raters[item].any(axis=0)]
    # A random choice, always the same, as every n-th voxel would be in few planes.
    return tuple(v if len(v) <= MOST_VOXELS else np.random.default_rng(0).choice(v, MOST_VOXELS, replace=False) for v in found)


def _case_target(store: Store, case: int, mode: LabelMode, fusion: str) -> Tensor:
    """The targets [N K *S] of all items of a case."""
    key = store.fingerprint, case, mode, fusion
    with _keeping:  # fits that run side by side wait for each other's targets, as they need the same ones
        if key not in _kept:
            sample = store.sample(case)
            nearest = None if sample.nearest is None else _copied(sample.nearest)
            _kept[key] = prepare_target(_copied(sample.raters), nearest, mode, fusion, sample.rater_names, axis=1)
            while sum(target.nbytes for target in _kept.values()) > KEPT_BYTES and len(_kept) > 1:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]


def _copied(values: np.ndarray, window: Window | None = None) -> Tensor:
    """A tensor of `values`, which are read-only views of the store, or of a window of them."""
    return torch.from_numpy(np.array(values if window is None else window.of(values, "constant")))
