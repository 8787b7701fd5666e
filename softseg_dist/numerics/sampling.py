"""Where several soft maps of a case come from if there is one model: ask it with some values dropped, or about a changed image.

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
"""From the image of a case [N C *S] to its soft map [N K *S], by one model, as at inference."""


class Uncertainty(Frozen, ABC):
    """A way to draw `samples` soft maps of a case from a model, which `uncertainty` then compares. Called once per sample.

    `short` is what the names of its rows in the results table begin with.
    """

    samples: Annotated[int, Field(ge=2)]

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raises UserError, before anything is trained, if no two samples of `model` would ever differ."""

    @abstractmethod
    def __call__(
        self, model: nn.Module, predict: Predict, image: Tensor, spacing_mm: Sequence[float], seed: int
    ) -> Tensor:
        """One soft map [N K *S] of `image` [N C *S]; `predict` asks `model`. The same for the same `seed`."""


class MCDropout(Uncertainty):
    """Monte Carlo dropout: dropout stays active at inference, everything else is as ever. About the weights (epistemic).

    Source: Gal and Ghahramani, ICML 2016, arXiv 1506.02142.
    """

    short: ClassVar[str] = "mc_dropout"
    samples: Annotated[int, Field(ge=2)] = 20

    def check(self, model: nn.Module) -> None:
        """Raises UserError if `model` drops nothing."""
        if not drops(model):
            raise UserError(
                f"{self} asks a network with dropout, and this one has none: set it, as in UNet(dropout=0.2)"
            )

    def __call__(
        self, model: nn.Module, predict: Predict, image: Tensor, spacing_mm: Sequence[float], seed: int
    ) -> Tensor:
        """The soft map [N K *S] of `image` [N C *S] with what `seed` drops."""
        layers = _dropout(model)
        try:
            for layer in layers:
                layer.train()
            with seeded(seed):
                return predict(image)
        finally:
            for layer in layers:
                layer.eval()


def drops(model: nn.Module) -> bool:
    """Whether `model` has dropout that drops anything."""
    return bool(_dropout(model))


def _dropout(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, DROPOUTS) and layer.p > 0]


def can_be_undone(transform: Augmentation) -> bool:
    """Whether a map of the changed image can be put back in its place: nothing was moved, or the way back is known."""
    return isinstance(transform, Invertible | Intensity)


class TTA(Uncertainty):
    """Test-time augmentation: the soft map of the image as changed by `transforms`, put back in its place (see `augment_case`).

    About the image (aleatoric): would another pose or contrast have given another answer? `transforms` are those of training;
    of the spatial ones those whose way back is known: `Flip` and `Affine`.

    Source: Wang et al., Neurocomputing 338 (2019), doi 10.1016/j.neucom.2019.01.103.
    """

    short: ClassVar[str] = "tta"
    transforms: Annotated[tuple[Augmentation, ...], Field(min_length=1)]
    samples: Annotated[int, Field(ge=2)] = 8

    @field_validator("transforms")
    @classmethod
    def _can_be_undone(cls, value: tuple[Augmentation, ...]) -> tuple[Augmentation, ...]:
        for transform in value:
            if not can_be_undone(transform):
                raise ValueError(
                    f"TTA cannot put back what {transform} has moved: take Flip, Affine, or intensity transforms"
                )
        return value

    def check(self, model: nn.Module) -> None:
        """Every model will do."""

    def __call__(
        self, model: nn.Module, predict: Predict, image: Tensor, spacing_mm: Sequence[float], seed: int
    ) -> Tensor:
        """The soft map [N K *S] of `image` [N C *S] as `seed` changes it."""
        changed, undo = augment_case(image, self.transforms, seed, spacing_mm)
        return undo(predict(changed))
