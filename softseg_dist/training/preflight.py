"""Can these recipes be trained on this store at all? One item through network, activation, loss and back, before any fit starts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store
from softseg_dist.errors import UserError
from softseg_dist.study import Recipe
from softseg_dist.training.batches import Batches, cases_of
from softseg_dist.training.model import Model


def check_recipes(recipes: Mapping[str, Recipe], store: Store, split: Split) -> None:
    """Raises UserError that names the candidate and the cause if a recipe fails on its first training item."""
    first = next(c for c in cases_of(store, split.train) if store.cases[c].num_items)
    for name, recipe in recipes.items():
        try:
            _try(recipe, store, first)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"candidate {name} cannot be trained on images of size {store.size}: {cause:.300}"
            ) from error


def _try(recipe: Recipe, store: Store, case: int) -> None:
    batches = Batches(store, recipe, ((case, 0),), seed=0)
    image, target = batches.batch(epoch=0, members=[0], device="cpu")
    model = Model(recipe.network, recipe.activation, store.channels, len(store.classes), store.dim)
    prediction = model.eval()(image)  # eval: batch norm has no variance over one item of one voxel
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    loss = recipe.loss(prediction, target)
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        raise ValueError(f"{recipe.loss} must return a scalar tensor, got {loss!r:.80}")
    loss.backward()
