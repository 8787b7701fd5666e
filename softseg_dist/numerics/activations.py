"""Final activations: logits become a prediction in [0, 1]; they are never part of a loss.

Legend: B batch, K classes, *S space (2 or 3 axes). `logits` [B num_logits *S] are unbounded, a `prediction` [B K *S] is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, distributed, nn

from softseg_dist.frozen import Frozen

SMALLEST_SHARE = 1e-4  # a class with a smaller share of the voxels starts as if it had this one
NORMRELU_BIAS = 0.1  # above 0: otherwise the output would start dead, 0 everywhere and without gradient
MOMENTUM = 0.1  # weight of the newest maximum in the running one, as in torch's batch norm


class Activation(Frozen, ABC):
    """A function from logits to a prediction: called directly, or built as a module, which may have state."""

    @abstractmethod
    def __call__(self, logits: Tensor) -> Tensor:
        """The prediction [B K *S] in [0, 1] of `logits` [B num_logits *S], as in training; keeps no state."""

    @abstractmethod
    def initial_bias(self, mean_label: Tensor) -> Tensor:
        """The initial bias [num_logits] of the last layer, given each class's mean training label [K] in [0, 1].

        It makes activations start from comparable predictions: else a short training would compare initialisations.
        """

    def num_logits(self, classes: int) -> int:
        """The number of channels that the network must return for `classes` classes."""
        return classes

    def build(self, classes: int) -> nn.Module:
        """The activation as the last module of a network for `classes` classes; its state is saved with the weights."""
        return _Stateless(self)


class _Stateless(nn.Module):
    """An activation without state, as a module."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, logits: Tensor) -> Tensor:
        return self.activation(logits)


class Sigmoid(Activation):
    """p = 1 / (1 + exp(-x)), class by class; classes may overlap. Reaches neither 0 nor 1."""

    short: ClassVar[str] = "sigmoid"

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def initial_bias(self, mean_label: Tensor) -> Tensor:
        """The logit of the mean label [K], so that the first predictions have the right volume.

        >>> Sigmoid().initial_bias(torch.tensor([0.5, 0.2])).sigmoid()
        tensor([0.5000, 0.2000])
        """
        return torch.logit(mean_label, eps=SMALLEST_SHARE)


class Softmax(Activation):
    """p_k = exp(x_k) / sum_j exp(x_j) over background and classes; logit 0 is the background, which is not in the output.

    Classes are mutually exclusive: at every voxel the predictions of all classes add up to at most 1.
    """

    short: ClassVar[str] = "softmax"

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=1)[:, 1:]

    def initial_bias(self, mean_label: Tensor) -> Tensor:
        """The log share of background and of every class [K+1]; its softmax is the shares.

        >>> Softmax().initial_bias(torch.tensor([0.2, 0.1])).softmax(0)
        tensor([0.7000, 0.2000, 0.1000])
        """
        background = 1 - mean_label.sum(dim=0, keepdim=True)
        shares = torch.cat([background, mean_label]).clamp_min(SMALLEST_SHARE)
        return torch.log(shares / shares.sum())

    def num_logits(self, classes: int) -> int:
        """`classes` + 1: the background has a logit of its own."""
        return classes + 1


class NormReLU(Activation):
    """p = r / M with r = max(x, 0) and M a maximum of r; p = 0 where M = 0. The final activation of SoftSeg.

    `over` is what M is taken over.
    "sample": the space of one sample and class. Independent of the batch, but every image with a positive logit gets a
      peak of 1, an empty one too.
    "batch": the whole tensor on this worker, as in ivadomed. The result depends on batch size and number of workers; at
      inference give it the items of exactly one case.
    "global": the whole tensor over all workers of torch.distributed; equal to "batch" on one worker and at inference.
    "running": in training as "global"; at inference an exponential average of the M of training, stored with the
      weights. Predictions above 1 are clipped to 1.

    `share`: with several classes the result is divided by its sum over the classes where that exceeds 0, as in ivadomed, and the
    classes of every voxel with a positive logit add up to 1, however small it is. With "batch" and "global" M then cancels,
    p_k = r_k / sum_j r_j: no other voxel, sample or worker matters but by rounding. With one class it changes nothing.

    If all logits are <= 0 the prediction is 0 everywhere, without gradient: the sample is dead (see `dead_samples`). The
    gradient also flows through M, shared evenly among voxels that tie for the maximum.

    Source: Gros et al., Med Image Anal 71 (2021) 102038, doi 10.1016/j.media.2021.102038. The variants are ours.

    >>> NormReLU()(torch.tensor([[[[-1.0, 1.0], [2.0, 4.0]]]]))
    tensor([[[[0.0000, 0.2500],
              [0.5000, 1.0000]]]])
    """

    short: ClassVar[str] = "normrelu"
    over: Literal["sample", "batch", "global", "running"] = "sample"
    share: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """The prediction [B K *S] in [0, 1] of `logits` [B K *S]; "global" and "running" synchronise all workers."""
        rectified = torch.relu(logits)
        if self.over == "sample":
            maximum = rectified.amax(dim=tuple(range(2, rectified.ndim)), keepdim=True)
        elif self.over == "batch":
            maximum = rectified.amax() if len(rectified) else rectified.new_zeros(())
        else:
            maximum, _ = _MaximumOfAllWorkers.apply(rectified)
        return self.normalized(rectified, maximum)

    def normalized(self, rectified: Tensor, maximum: Tensor) -> Tensor:
        """The prediction [B K *S] of max(logits, 0) [B K *S] and M, which may be smaller: at most 1."""
        prediction = rectified / torch.where(maximum > 0, maximum, torch.inf)  # 0 where M = 0
        if self.over == "running":
            prediction = prediction.clamp(max=1)
        if not self.share or prediction.shape[1] == 1:
            return prediction
        total = prediction.sum(dim=1, keepdim=True)
        return prediction / torch.where(total > 0, total, 1)

    def initial_bias(self, mean_label: Tensor) -> Tensor:
        """Slightly above 0 for every class [K], independent of its mean label: not dead at the start."""
        return torch.full_like(mean_label, NORMRELU_BIAS)

    def build(self, classes: int) -> nn.Module:
        """The activation as a module; in "running" its buffer `maximum` is saved with the weights."""
        return _NormReLUModule(self) if self.over in ("global", "running") else _Stateless(self)


def _num_workers() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _NormReLUModule(nn.Module):
    """NormReLU without a reduction over workers at inference, where they see different cases."""

    maximum: Tensor

    def __init__(self, activation: NormReLU) -> None:
        super().__init__()
        self.activation = activation
        if activation.over == "running":
            self.register_buffer("maximum", torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        rectified = torch.relu(logits)
        if self.training:
            maximum, newest = _MaximumOfAllWorkers.apply(rectified)
            if self.activation.over == "running":
                self._update(newest.to(self.maximum.dtype))
            return self.activation.normalized(rectified, maximum)
        maximum = self.maximum.to(rectified.dtype) if self.activation.over == "running" else rectified.amax()
        return self.activation.normalized(rectified, maximum)

    @torch.no_grad()
    def _update(self, newest: Tensor) -> None:
        averaged = torch.lerp(self.maximum, newest, MOMENTUM)
        self.maximum.copy_(torch.where(self.maximum > 0, averaged, newest))  # the first one is taken as it is


class _MaximumOfAllWorkers(torch.autograd.Function):
    """max over all workers, with the gradient of one `amax` over the tensors of all workers put together.

    Returns it once per sample [B 1 ...], and once without a gradient. Every worker's loss depends on M, so the worker with the
    maximum needs the sum of all gradients; ties share it. That sum is taken per sample in float64, so that it does not depend
    on which worker has which sample. A worker may have no sample.
    """

    @staticmethod
    def forward(ctx: Any, rectified: Tensor) -> tuple[Tensor, Tensor]:
        maximum = rectified.detach().amax() if len(rectified) else rectified.new_zeros(())
        if _num_workers() > 1:
            distributed.all_reduce(maximum, op=distributed.ReduceOp.MAX)
        ctx.save_for_backward(rectified, maximum)
        ctx.mark_non_differentiable(maximum)
        return maximum.expand(len(rectified), *[1] * (rectified.ndim - 1)).clone(), maximum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        rectified, maximum = ctx.saved_tensors
        is_maximum = rectified == maximum
        total = torch.stack([grad_outputs[0].double().sum(), is_maximum.sum().double()])
        if _num_workers() > 1:
            distributed.all_reduce(total)
        return is_maximum * (total[0] / total[1]).to(rectified.dtype)


def dead_samples(prediction: Tensor) -> Tensor:
    """The number of samples of `prediction` [B K *S] that are 0 at every voxel of every class, on the tensor's device.

    >>> int(dead_samples(torch.tensor([[[0.0, 0.0]], [[0.0, 0.1]]])))
    1
    """
    return (prediction == 0).flatten(1).all(dim=1).sum()
