"""From a model and a prepared case to its soft map, or to several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softseg_dist.data.preprocess import Sample
from softseg_dist.numerics.sampling import Uncertainty
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.training.model import Model, load_weights

ITEMS_AT_ONCE = 16  # of those that go whole; bounds memory; the result does not depend on it


@torch.inference_mode()
def predict_sample(model: Model, sample: Sample, device: str = "cpu") -> np.ndarray:
    """Soft map [N K *S] float32 of all items of one case.

    The activation sees all items of the case at once, so that a maximum that runs over "the batch" runs over the case, whatever
    else is predicted beside it. A model of patches gives the logits of an item patch by patch (see `Patch`).
    """
    model.eval()
    return _on_cpu(_soft_map(model, _image(sample, device)))


@torch.inference_mode()
def sample_maps(
    model: Model, sample: Sample, method: Uncertainty, seed: int, device: str = "cpu"
) -> Iterator[np.ndarray]:
    """The soft maps [N K *S] float32 that `method` draws of one case, one after the other; the same for the same `seed`."""
    model.eval()
    image, predict = _image(sample, device), partial(_soft_map, model)
    for number in range(method.samples):
        yield _on_cpu(method(model, predict, image, sample.spacing_mm, seed_of(seed, number)))


def ensemble_maps(model: Model, members: Sequence[Path], sample: Sample, device: str = "cpu") -> Iterator[np.ndarray]:
    """The soft maps [N K *S] float32 of one case by each of several weights of `model`, which are read one after the other."""
    for weights in members:
        load_weights(model, weights)
        yield predict_sample(model, sample, device)


def _soft_map(model: Model, image: Tensor) -> Tensor:
    if model.patch is not None:
        return model.activation(model.patch.stitch(model.logits, image))
    return model.activation(torch.cat([model.logits(part) for part in image.split(ITEMS_AT_ONCE)]))


def _image(sample: Sample, device: str) -> Tensor:
    return torch.from_numpy(np.array(sample.image)).to(device)


def _on_cpu(maps: Tensor) -> np.ndarray:
    on_cpu: np.ndarray = maps.float().cpu().numpy()
    return on_cpu
