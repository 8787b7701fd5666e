"""Where the soft map of a new image comes from: one model, or all fits of its candidate; and how unsure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from softseg_dist.data.preprocess import Sample
from softseg_dist.errors import UserError
from softseg_dist.judging.uncertainty import Spread
from softseg_dist.numerics.augmentation import Augmentation
from softseg_dist.numerics.sampling import TTA, MCDropout, Uncertainty, can_be_undone, drops
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.training.inference import ensemble_maps, predict_sample, sample_maps
from softseg_dist.training.model import Model
from softseg_dist.training.saved_model import ModelCard
from softseg_dist.training.task import FitResult, weights_path

AUGMENTATION: TypeAdapter[Augmentation] = TypeAdapter(Augmentation)


@dataclass(frozen=True)
class MapSource:
    """Where the soft map of a sample comes from: the mean of `members`, the weights of an ensemble, or else the model.

    With the map comes the entropy of the mean of the members, if `unsure`, or of the mean of what `method` draws, if there is one.
    """

    model: Model
    study: str
    members: Sequence[Path] = ()
    unsure: bool = False
    method: Uncertainty | None = None

    def __call__(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """Soft map [N K *S] and its entropy in bits, both float32; the same each time."""
        device = next(self.model.parameters()).device.type
        if self.members:
            spread = Spread.of(ensemble_maps(self.model, self.members, sample, device))
            return spread.mean.astype(np.float32), spread.entropy.astype(np.float32) if self.unsure else None
        soft = predict_sample(self.model, sample, device)
        if self.method is None:
            return soft, None
        spread = Spread.of(sample_maps(self.model, sample, self.method, seed_of(self.study, sample.name), device))
        return soft, spread.entropy.astype(np.float32)


def weights_of_fits(folder: Path, card: ModelCard) -> tuple[Path, ...]:
    """The weights of all finished fits of a model's candidate, in the run folder around the model."""
    fits = folder.parent / "fits" / card.candidate
    try:
        results = [FitResult.model_validate_json(p.read_bytes()) for p in fits.glob("*.json") if p.stem.isdecimal()]
    except ValidationError as error:
        raise UserError(f"{fits}: a record of a fit cannot be read ({error.title}); run the study again") from error
    finished = sorted(result.split for result in results if result.state == "finished")
    members = tuple(weights_path(fits / f"{split:03d}") for split in finished)
    missing = [str(path) for path in members if not path.is_file()]
    if missing or len(members) < 2:
        found = f"{missing[0]} is missing" if missing else f"{fits} has {len(members)}"
        raise UserError(
            f"--ensemble needs the weights of two or more finished fits, but {found}; give a whole run folder"
        )
    return members


def method_of(card: ModelCard, model: Model, samples: int | None) -> Uncertainty:
    """How to draw several maps from one model: by dropout if it has any, else by what can be undone of its own augmentation.

    Raises UserError if it has neither.
    """
    asked = {} if samples is None else {"samples": samples}
    if drops(model):
        return MCDropout(**asked)
    if augment := _undoable(card):
        return TTA(transforms=augment, **asked)
    raise UserError(
        "--uncertainty: this model has no dropout, and was trained without an augmentation that can be undone, so it gives "
        "one answer only; ask all fits of its run folder with --ensemble"
    )


def _undoable(card: ModelCard) -> tuple[Augmentation, ...]:
    found = []
    for about in card.recipe.get("augment", ()):
        try:
            transform = AUGMENTATION.validate_python(about)
        except ValidationError:  # a class of the study file, which is run for a network only
            continue
        if can_be_undone(transform) and not transform.idle:
            found.append(transform)
    return tuple(found)
