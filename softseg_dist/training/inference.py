"""Inference: the soft map of a prepared case, or several of them, by one model or by all fits of its candidate.

Legend: N items (slices in 2D, 1 in 3D), K classes, *S space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from softseg_dist.data.preprocess import Sample
from softseg_dist.errors import UserError
from softseg_dist.judging.uncertainty import Spread
from softseg_dist.numerics.patches import filled_up
from softseg_dist.numerics.sampling import TTA, UNDOABLE, MCDropout, Uncertainty, active_dropout
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.transforms import Augmentation
from softseg_dist.places import Place
from softseg_dist.sealed import key_of, read_json
from softseg_dist.training.gpu.capture import apart_from_captures
from softseg_dist.training.model import Model, load_weights
from softseg_dist.training.saved_model import ModelCard
from softseg_dist.training.task import FitResult, is_fit_name, vouched, weights_path

ITEMS_AT_ONCE = 16  # whole items in a batch; bounds memory; the result does not depend on it


@torch.inference_mode()
def predict_sample(model: Model, sample: Sample, device: str = "cpu") -> np.ndarray:
    """Soft map [N K *S] float32 of a case. The activation gets all its items at once: a maximum over the batch is the case's."""
    model.eval()
    return _on_cpu(_soft_map(model, _image(sample, device)))


@torch.inference_mode()
def sample_maps(model: Model, sample: Sample, method: Uncertainty, seed: int, device: str = "cpu") -> Iterator[np.ndarray]:
    """The soft maps [N K *S] float32 that `method` draws of one case, one by one; the same for the same `seed`."""
    model.eval()
    image, predict = _image(sample, device), partial(_soft_map, model)
    for number in range(method.samples):
        yield _on_cpu(method(model, predict, image, sample.spacing_mm, seed_of(seed, number)))


def ensemble_maps(model: Model, members: Sequence[Path], sample: Sample, device: str = "cpu") -> Iterator[np.ndarray]:
    """The soft maps [N K *S] float32 of one case, one for each weights file of `members`; each is loaded into `model`."""
    for weights in members:
        load_weights(model, weights)
        yield predict_sample(model, sample, device)


def _soft_map(model: Model, image: Tensor) -> Tensor:
    def network(part: Tensor) -> Tensor:
        return model.logits(part.clone())  # a network may change its input in place, and patches overlap

    with apart_from_captures(image.device):
        image, place = filled_up(image, model.least_size)
        if model.patch is not None:
            return model.activation(model.patch.stitch(network, image)[place])
        return model.activation(torch.cat([network(part) for part in image.split(ITEMS_AT_ONCE)])[place])


def _image(sample: Sample, device: str) -> Tensor:
    return torch.from_numpy(np.require(sample.image, requirements=("C", "W"))).to(device)


def _on_cpu(maps: Tensor) -> np.ndarray:
    return maps.float().cpu().numpy()


@dataclass(frozen=True)
class MapSource:
    """Predicts the soft map of a sample: the mean over the weights files of an ensemble, `members`, or that of the model.

    The second result is an entropy: of the mean of an ensemble `with_entropy`, or of the samples of a `method`; else None.
    """

    model: Model
    study: str
    members: Sequence[Path] = ()
    with_entropy: bool = False
    method: Uncertainty | None = None

    def __call__(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """Soft map [N K *S] and its entropy in bits, both float32; the same each time."""
        device = next(self.model.parameters()).device.type
        if self.members:
            spread = Spread.of(ensemble_maps(self.model, self.members, sample, device))
            return spread.mean.astype(np.float32), spread.entropy.astype(np.float32) if self.with_entropy else None
        soft = predict_sample(self.model, sample, device)
        if self.method is None:
            return soft, None
        spread = Spread.of(sample_maps(self.model, sample, self.method, seed_of(self.study, sample.name), device))
        return soft, spread.entropy.astype(np.float32)


def weights_of_fits(folder: Path, card: ModelCard) -> tuple[Path, ...]:
    """The weights of all finished fits of a model's candidate in its run folder. Raises UserError if fewer than two are there."""
    run = Place.at(folder.parent)
    names, key = [f"fits/{card.candidate}/{name}" for name in (run / f"fits/{card.candidate}").names()], key_of(run)
    results = [FitResult.model_validate(read_json(run, name, key)) for name in names if is_fit_name(Path(name).stem)]
    finished = sorted((result for result in results if result.state == "finished"), key=lambda result: result.slot)
    if len(finished) < 2:
        found = f"{folder.parent} has {len(finished)} of {card.candidate}"
        raise UserError(f"--ensemble needs the weights of two or more finished fits, but {found}; give a whole run folder")
    return tuple(vouched(result, weights_path(folder.parent / "fits" / result.key)) for result in finished)


def method_of(card: ModelCard, model: Model, samples: int | None) -> Uncertainty:
    """The method for one model: dropout if it has any, else the invertible part of its augmentation, else a UserError."""
    settings = {} if samples is None else {"samples": samples}
    if active_dropout(model):
        return MCDropout(**settings)
    if augment := _invertible(card):
        return TTA(transforms=augment, **settings)
    why = "this model has no dropout, and was trained without an augmentation that can be undone, so it gives one prediction"
    raise UserError(f"--uncertainty: {why} only; use all fits of its run folder with --ensemble")


def _invertible(card: ModelCard) -> tuple[Augmentation, ...]:
    found = []
    for description in card.recipe.get("augment", ()):
        try:
            transform = Augmentation.model_validate(description)
        except ValidationError:  # a class of the study file, which is executed for a network only
            continue
        if isinstance(transform, UNDOABLE) and not transform.idle:
            found.append(transform)
    return tuple(found)
