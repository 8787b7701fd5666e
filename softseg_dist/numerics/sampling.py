"""Several soft maps of a case from one model, to measure its uncertainty: by Monte Carlo dropout or test-time augmentation.

Legend: N items, C image channels, K classes, *S space (2 or 3 axes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

from pydantic import Field, field_validator
from torch import Tensor, nn

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen
from softseg_dist.numerics.augmentation import augment_case
from softseg_dist.numerics.dropout import DROPOUTS
from softseg_dist.numerics.seeds import seeded
from softseg_dist.numerics.transforms import Augmentation, Intensity, Invertible

Predict = Callable[[Tensor], Tensor]
"""The inference of one model: the image of a case [N C *S] to its soft map [N K *S]."""


class Uncertainty(Frozen, ABC):
    """A method that draws `samples` soft maps of a case from a model, one per call. `short` is the prefix of its rows."""

    samples: Annotated[int, Field(ge=2)]

    def check(self, model: nn.Module) -> None:
        """Raises UserError, before training, if all samples of `model` would be equal. Accepts every model by default."""

    @abstractmethod
    def __call__(self, model: nn.Module, predict: Predict, image: Tensor, spacing_mm: Sequence[float], seed: int) -> Tensor:
        """One soft map [N K *S] of `image` [N C *S]; `predict` runs `model`. The same for the same `seed`."""


class MCDropout(Uncertainty):
    """Monte Carlo dropout: dropout stays active at inference. Measures uncertainty about the weights (epistemic).

    Source: Gal and Ghahramani, ICML 2016, arXiv 1506.02142.
    """

    short: ClassVar[str] = "mc_dropout"
    samples: Annotated[int, Field(ge=2)] = 20

    def check(self, model: nn.Module) -> None:
        if not active_dropout(model):
            raise UserError(f"{self} needs a network with dropout, and this one has none: set it, as in UNet(dropout=0.2)")

    def __call__(self, model: nn.Module, predict: Predict, image: Tensor, spacing_mm: Sequence[float], seed: int) -> Tensor:
        layers = active_dropout(model)
        try:
            for layer in layers:
                layer.train()
            with seeded(seed):
                return predict(image)
        finally:
            for layer in layers:
                layer.eval()


def active_dropout(model: nn.Module) -> list[nn.Module]:
    """The dropout layers of `model` with a probability above 0."""
    return [layer for layer in model.modules() if isinstance(layer, DROPOUTS) and layer.p > 0]


UNDOABLE = (Invertible, Intensity)  # a prediction on the transformed image can be mapped back: by the inverse, or as it is


class TTA(Uncertainty):
    """Test-time augmentation: the soft map of the image after `transforms`, mapped back to the image (see `augment_case`).

    Measures uncertainty about the image (aleatoric): how the prediction changes with pose and contrast. Take the `transforms` of
    training; spatial ones need a known inverse: `Flip` and `Affine`.

    Source: Wang et al., Neurocomputing 338 (2019), doi 10.1016/j.neucom.2019.01.103.
    """

    short: ClassVar[str] = "tta"
    transforms: Annotated[tuple[Augmentation, ...], Field(min_length=1)]
    samples: Annotated[int, Field(ge=2)] = 8

    @field_validator("transforms")
    @classmethod
    def _can_be_undone(cls, value: tuple[Augmentation, ...]) -> tuple[Augmentation, ...]:
        for transform in value:
            if not isinstance(transform, UNDOABLE):
                raise ValueError(f"TTA cannot undo {transform}, which has no inverse: use Flip, Affine, or intensity transforms")
        return value

    def __call__(self, model: nn.Module, predict: Predict, image: Tensor, spacing_mm: Sequence[float], seed: int) -> Tensor:
        changed, undo = augment_case(image, self.transforms, seed, spacing_mm)
        return undo(predict(changed))
