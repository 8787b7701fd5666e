"""A trained model as a folder: `model.safetensors`, the weights, and `model.json`, the card: all that prediction needs.

No pickle. The card is written last and holds the SHA-256 of the weights, so that a mismatched pair is detected.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import PositiveInt, ValidationError, model_validator

from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.source_files import sha256_of
from softseg_dist.errors import UserError, in_words
from softseg_dist.frozen import Frozen, canonical_json
from softseg_dist.places import Place, replace_file
from softseg_dist.sealed import sealed_json, unsealed_json
from softseg_dist.sources import Sources
from softseg_dist.training.model import Model, load_weights

FORMAT: Final = 2  # incremented when an older version could not read a card, or would misread it
RESTORE = "restore the folder from a copy, or train the model again"
CARD, WEIGHTS = "model.json", "model.safetensors"
INTENDED_USE = "Research use only; not a medical device. The licence of the training data may restrict it further."
OF_A_STUDY_FILE = re.compile(r'"type":"[^"\\]*:')  # "s009_mine:MyNetwork", in canonical JSON; ours have no colon


class ModelCard(Frozen):
    """The description of a model: its recipe, input, output and origin.

    `recipe` is JSON, so that a card can be read without the study file. `classes` are the maps of its output, in order; `channels`
    and `size` (the largest of an item, in voxels) those of training, after `preprocess`; `channel_names` as in `DataSet`;
    `spacings_mm` are the smallest and the largest voxel size of the study's files along X, Y and Z. `thresholds` maps each rule to
    the value chosen on validation. `validation_score` and `test_score` are the means of `objective` over the splits of the study,
    not of this model, which was trained on all `num_subjects` that are not held out. `study_source` has the texts of its code.
    `created` is an ISO date. `save_model` sets `weights_sha256`.
    """

    format: Literal[2] = FORMAT
    study: str
    question: str
    candidate: str
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    dim: Literal[2, 3]
    channels: PositiveInt
    channel_names: tuple[tuple[str, ...], ...] = ()
    size: tuple[PositiveInt, ...]
    preprocess: Preprocess
    spacings_mm: tuple[tuple[float, float], ...] = ()
    epochs: PositiveInt
    thresholds: dict[str, float]
    objective: str
    validation_score: float | None = None
    test_score: float | None = None
    num_subjects: PositiveInt
    store_fingerprint: str
    study_source: Sources | None = None
    versions: dict[str, str]
    created: str
    intended_use: str = INTENDED_USE
    weights_sha256: str = ""

    @model_validator(mode="after")
    def _one_dim(self) -> Self:
        if self.preprocess.dim != self.dim or len(self.size) != self.dim:
            raise ValueError(f"dim is {self.dim}, but size is {self.size} and preprocess.dim is {self.preprocess.dim}")
        return self

    @property
    def needs_study_file(self) -> bool:
        """True if network or activation are classes of the study file, whose sources must be loaded before `read_model`."""
        parts = [self.recipe.get("network"), self.recipe.get("activation")]
        return OF_A_STUDY_FILE.search(canonical_json(parts)) is not None


def save_model(folder: Path, card: ModelCard, weights: Path) -> None:
    """Write `folder`: a copy of the weights file, then the card. `read_model` refuses the pair that a crash in between leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, lambda partial: shutil.copyfile(weights, partial))
    sealed = card.replace(weights_sha256=sha256_of(folder / WEIGHTS))
    Place.at(folder / CARD).write(sealed_json(sealed.model_dump(mode="json")))


def read_card(folder: Path) -> ModelCard:
    """The card of a model folder; executes no study file. Raises UserError if it is missing, damaged or of another format."""
    path = folder / CARD
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no model: there is no {CARD}; give the folder of a model or of its run") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        raise _broken(path, "it is not JSON (cut off?)") from None
    if not isinstance(content, dict) or "format" not in content:
        raise _broken(path, "it is not the card of a model")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']!r}, this version reads {FORMAT}; use the version that wrote it")
    try:
        return ModelCard.model_validate(unsealed_json(text, path, to_do=RESTORE))
    except ValidationError as error:
        first = error.errors()[0]
        raise _broken(path, f"{'.'.join(map(str, first['loc'])) or 'card'}: {first['msg']}") from error


def checked_weights(folder: Path, card: ModelCard) -> Path:
    """The weights of a model folder. Raises UserError if they are missing, or not those of the card."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} holds no model: there is no {WEIGHTS}; copy the whole folder, or train it again")
    if sha256_of(path) != card.weights_sha256:
        raise _broken(path, f"it is not the file that {CARD} was written for (cut off, or replaced?)")
    return path


def read_model(folder: Path, card: ModelCard) -> Model:
    """The model of a folder, in evaluation mode on the CPU. If `card.needs_study_file`, load the study file first.

    Raises UserError if the weights are missing or not those of the card, or do not fit its recipe.
    """
    path = checked_weights(folder, card)
    try:
        model = Model.of_json(card.recipe, card.channels, len(card.classes), card.size)
    except ValidationError as error:
        raise _broken(folder / CARD, f"recipe: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:  # of a recipe that was never trained
        raise _broken(folder / CARD, f"recipe: {in_words(error):.200}") from error
    try:
        load_weights(model, path)
    except RuntimeError as error:  # torch lists every name and shape that differs, one per line
        reason = " ".join(str(error).split())
        raise _broken(path, f"its weights do not fit the recipe in {CARD}: {reason:.200}") from error
    return model.eval()


def _broken(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be used: {reason}; {RESTORE}")
