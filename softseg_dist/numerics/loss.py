"""What a loss is, and the weighted sum of several. The activation is never inside.

Legend: B batch, K classes, *S space (2 or 3 axes), M numbers to average. `prediction` and `target` are [B K *S] in
[0, 1]. Every loss follows from means over the samples of a batch, most from the mean of one value per sample. So a
batch may be split over workers: they add up their samples' numbers, and the loss of the total is the loss of the
whole batch, with its gradients. None waits for the device. Use float32 or float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from softseg_dist.frozen import Frozen


class Loss(Frozen, ABC):
    """A number to minimise. A subclass gives `per_sample`, and the loss is its mean; plain torch, no `.item()`.

    One whose sums run over all samples of a batch, such as `BatchDice`, gives `averaged`, `num_averaged` and
    `of_averages`, too: then it is the same for any number of workers.
    """

    @abstractmethod
    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of each sample of `prediction` and `target` [B K *S] in [0, 1], whatever the others are."""

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Numbers [B M] of each sample, whatever the others are; the loss follows from their means over the batch."""
        return self.per_sample(prediction, target).unsqueeze(1)

    def num_averaged(self, classes: int) -> int:
        """M, for `classes` classes."""
        return 1

    def of_averages(self, averages: Tensor, classes: int) -> Tensor:
        """The loss [...] of batches, given the means [... M] of what is `averaged`, for `classes` classes."""
        return averages[..., 0]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of the batch, a scalar."""
        assert prediction.shape == target.shape, f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}"
        return self.of_averages(self.averaged(prediction, target).mean(dim=0), prediction.shape[1])


class Sum(Loss):
    """sum_i w_i L_i: several losses at once, the first weight for the first term.

    Its minimum on soft targets is at p = y if that of every term is; else the terms pull against each other, and the
    weights say who wins. They need not add up to 1. A single term of weight 1 is that term.

    Raises ValueError if there are not as many weights as terms.

    >>> import torch
    >>> from softseg_dist import BCE, Dice
    >>> Sum(terms=(Dice(smooth=0), BCE()), weights=(1, 0.5))(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.6799)
    """

    short: ClassVar[str] = "sum"
    terms: tuple[Loss, ...] = Field(min_length=1)
    weights: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if len(self.weights) != len(self.terms):
            raise ValueError(f"a sum needs one weight for each of {len(self.terms)} terms, got {len(self.weights)}")
        return self

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        return self._weighted([term.per_sample(prediction, target) for term in self.terms])

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What all terms average, one after the other [B M]."""
        return torch.cat([term.averaged(prediction, target) for term in self.terms], dim=1)

    def num_averaged(self, classes: int) -> int:
        """The sum of all terms' M, for `classes` classes."""
        return sum(term.num_averaged(classes) for term in self.terms)

    def of_averages(self, averages: Tensor, classes: int) -> Tensor:
        """The loss [...] of batches, given the means [... M] of all terms."""
        of_terms = averages.split([term.num_averaged(classes) for term in self.terms], dim=-1)
        return self._weighted([term.of_averages(m, classes) for term, m in zip(self.terms, of_terms, strict=True)])

    def _weighted(self, losses: list[Tensor]) -> Tensor:
        return torch.stack([w * loss for w, loss in zip(self.weights, losses, strict=True)]).sum(dim=0)
