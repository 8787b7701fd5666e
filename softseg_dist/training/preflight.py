"""Can these recipes be trained on this store at all, and asked how sure they are? Raters, and one item through everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store
from softseg_dist.errors import UserError
from softseg_dist.numerics.labels import needs_several, one_rater_only
from softseg_dist.numerics.sampling import Uncertainty
from softseg_dist.study import Recipe
from softseg_dist.training.batches import Batches, cases_of
from softseg_dist.training.inference import sample_maps
from softseg_dist.training.model import Model


def check_recipes(recipes: Mapping[str, Recipe], store: Store, split: Split) -> None:
    """Raises UserError that names the candidate and the cause if a recipe lacks raters or fails on its first training item."""
    first = next(c for c in cases_of(store, split.train) if store.cases[c].num_items)
    for name, recipe in recipes.items():
        _check_raters(name, recipe.fusion, store)
        try:
            _try(recipe, store, first)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            seen = "" if recipe.patch is None else f"patches of size {recipe.patch.size} from "
            raise UserError(
                f"candidate {name} cannot be trained on {seen}images of size {store.size}: {cause:.300}"
            ) from error


def _check_raters(name: str, fusion: str, store: Store) -> None:
    """A case may have fewer raters than others; what a fusion names must be in each, and one that fuses needs several in some."""
    if needs_several(fusion) and all(len(case.rater_names) == 1 for case in store.cases):
        raise UserError(f"candidate {name}: {one_rater_only(fusion)}")
    kind, _, rater = fusion.partition(":")
    for case in store.cases:
        if kind == "rater" and rater not in case.rater_names:
            raise UserError(
                f"candidate {name}: fusion {fusion!r} needs this rater in every case, but {case.name} has "
                f"{', '.join(case.rater_names)}; choose another fusion or leave the case out"
            )


def check_uncertainty(recipes: Mapping[str, Recipe], methods: Sequence[Uncertainty], store: Store) -> None:
    """Raises UserError that names the candidate and the cause if a method cannot be used with its network or on these images."""
    if not methods:
        return
    first = next(case.index for case in store.cases if case.num_items)
    sample = store.sample(first)
    for name, recipe in recipes.items():
        model = Model.of(recipe, store.channels, len(store.classes), store.dim)
        check_methods(name, model, methods)
        for method in methods:
            try:
                next(sample_maps(model, replace(sample, image=sample.image[:1]), method, seed=0))
            except UserError as error:
                raise UserError(f"candidate {name}: {method}: {error}") from error


def check_methods(candidate: str, model: nn.Module, methods: Sequence[Uncertainty]) -> None:
    """Raises UserError that names the candidate if no two samples of its model would ever differ."""
    for method in methods:
        try:
            method.check(model)
        except UserError as error:
            raise UserError(f"candidate {candidate}: {error}") from error


def _try(recipe: Recipe, store: Store, case: int) -> None:
    batches = Batches(store, recipe, ((case, 0),), seed=0)
    image, target = batches.batch(epoch=0, members=[0], device="cpu")
    model = Model.of(recipe, store.channels, len(store.classes), store.dim)
    prediction = model.eval()(image)  # eval: batch norm has no variance over one item of one voxel
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    loss = recipe.loss
    of_sample = loss.per_sample(prediction, target)
    if not isinstance(of_sample, torch.Tensor) or of_sample.shape != (1,):
        raise ValueError(f"per_sample of {loss} must return a tensor of one loss per sample, got {of_sample!r:.80}")
    averaged, count = loss.averaged(prediction, target), loss.num_averaged(len(store.classes))
    if averaged.shape != (1, count):
        raise ValueError(f"{loss} must average {count} numbers of each sample, got shape {tuple(averaged.shape)}")
    loss(prediction, target).backward()
