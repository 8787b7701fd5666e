"""The target of a training item before augmentation. What depends on a whole case is made once and kept for all its items.

Legend: N items of a case, R raters, K classes, *S space.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from softseg_dist.data.store import Store
from softseg_dist.numerics.labels import LabelMode, needs_whole_case, prepare_target
from softseg_dist.study import Recipe

KEPT_BYTES = (
    2**30
)  # of targets that a process keeps; beyond, what was used longest ago is dropped and made anew when asked for

_kept: OrderedDict[tuple[str, int, LabelMode, str], Tensor] = OrderedDict()


def item_target(store: Store, recipe: Recipe, case: int, item: int, draw: int) -> Tensor:
    """The target [K *S] of an item, as `labels.prepare_target` makes it; `draw` is the seed of this item in this epoch.

    STAPLE sees all items of the case together, once for all fits of this process. Do not change the result in place.
    """
    if needs_whole_case(recipe.fusion):
        return _case_target(store, case, recipe.label, recipe.fusion)[item]
    sample = store.sample(case)
    nearest = None if sample.nearest is None else _copied(sample.nearest[item])
    return prepare_target(_copied(sample.raters[item]), nearest, recipe.label, recipe.fusion, sample.rater_names, draw)


def _case_target(store: Store, case: int, mode: LabelMode, fusion: str) -> Tensor:
    """The targets [N K *S] of all items of a case."""
    key = store.fingerprint, case, mode, fusion
    if key not in _kept:
        sample = store.sample(case)
        nearest = None if sample.nearest is None else _copied(sample.nearest)
        _kept[key] = prepare_target(_copied(sample.raters), nearest, mode, fusion, sample.rater_names, axis=1)
        while sum(target.nbytes for target in _kept.values()) > KEPT_BYTES and len(_kept) > 1:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def _copied(values: np.ndarray) -> Tensor:
    """A tensor of `values`, which are read-only views of the store."""
    return torch.from_numpy(np.array(values))
