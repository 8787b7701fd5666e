"""Networks: images [B C *S] become logits [B num_logits *S], which the activation turns into a prediction.

Legend: B batch, C image channels, *S space (2 or 3 axes). Weights are drawn from torch's global generator: seed it
before `build` to start from the same weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen


class Network(Frozen, ABC):
    """The description of a network, which is built where it is trained. A subclass implements `build`; the rest has defaults."""

    @abstractmethod
    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        """A new module: images [B in_channels *S] to logits [B out_channels *S], with `dim` axes in *S (2 or 3)."""

    def last_bias(self, module: nn.Module, num_logits: int) -> nn.Parameter | None:
        """The bias [num_logits] that the last layer of `module`, which `build` made, adds to the logits; None without one.

        Training starts with it at `Activation.initial_bias`. The last layer is the convolution or linear layer with
        `num_logits` output channels that `module.modules()` gives last. Override this where that is another layer.
        """
        layers = [layer for layer in module.modules() if _num_outputs(layer) == num_logits]
        return layers[-1].bias if layers else None  # type: ignore[return-value]  # torch declares what modules hold as Tensor | Module


class UNet(Network):
    """U-Net: (conv 3 - norm - dropout - ReLU) x 2 per level, max pooling down, up-sampling and concatenation up, last conv.

    `filters` gives the channels of every level, finest first, so its length is the depth. `norm` is "batch" or "instance" (with
    learned scale and offset; convolutions before it have no bias, which it would remove). `dropout` is the share of values set to
    0. `upsample`: "interp" is a 1x1 convolution and linear interpolation, "deconv" a strided transposed convolution. Sizes need not
    be even: upsampled maps are padded by replication. `order`: "relu-norm-dropout" makes blocks (conv 3 with bias - ReLU - norm -
    dropout of whole channels) x 2 instead, and `last_kernel` is the size of the last convolution: SoftSeg had that order and 3.

    Source: Ronneberger et al., MICCAI 2015, doi 10.1007/978-3-319-24574-4_28; blocks of MONAI's BasicUNet.
    """

    short: ClassVar[str] = "unet"
    filters: tuple[Annotated[int, Field(ge=2, le=4096)], ...] = Field((16, 32, 64, 128), min_length=2)
    norm: Literal["batch", "instance"] = "batch"
    dropout: float = Field(0.0, ge=0, lt=1)
    upsample: Literal["interp", "deconv"] = "interp"
    order: Literal["norm-dropout-relu", "relu-norm-dropout"] = "norm-dropout-relu"
    last_kernel: Literal[1, 3] = 1

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        """A new U-Net, which raises UserError if an image is too small for its depth."""
        return _UNetModule(self, in_channels, out_channels, dim)


class _UNetModule(nn.Module):
    """MONAI's BasicUNet with any depth of at least 2 and any filters."""

    def __init__(self, config: UNet, in_channels: int, out_channels: int, dim: int) -> None:
        # Importing monai takes seconds, which a study file that only names a network need not wait for.
        from monai.networks.blocks import ADN, Convolution
        from monai.networks.layers.factories import Conv
        from monai.networks.nets.basic_unet import Down, TwoConv, UpCat

        super().__init__()
        filters = config.filters
        norm = (config.norm, {"affine": True})
        relu_first = config.order == "relu-norm-dropout"
        blocks = {"act": ("relu", {"inplace": True}), "norm": norm, "bias": relu_first, "dropout": config.dropout}
        upsample = {"interp": "nontrainable", "deconv": "deconv"}[config.upsample]
        levels = list(pairwise(filters))
        self.first = TwoConv(dim, in_channels, filters[0], **blocks)
        self.down = nn.ModuleList(Down(dim, fine, coarse, **blocks) for fine, coarse in levels)
        ups = (UpCat(dim, coarse, fine, fine, **blocks, upsample=upsample) for fine, coarse in reversed(levels))
        self.up = nn.ModuleList(map(_UpsampleAndConcatenate, ups))
        for block in [module for module in self.modules() if relu_first and isinstance(module, Convolution)]:
            block.adn = ADN("AND", block.out_channels, blocks["act"], norm, dim, config.dropout, dropout_dim=dim)
        self.last = Conv["conv", dim](filters[0], out_channels, kernel_size=config.last_kernel, padding=config.last_kernel // 2)

    def forward(self, image: Tensor) -> Tensor:
        size, shrink = image.shape[2:], 2 ** len(self.down)
        # A single voxel at the coarsest level has no variance for the normalisation.
        if min(size) < shrink or max(size) < 2 * shrink:
            least = f"at least {shrink} voxels along every axis and {2 * shrink} along one, got {' x '.join(map(str, size))}"
            to_do = "give it fewer filters or a larger crop or patch"
            raise UserError(f"a U-Net of {len(self.down) + 1} levels needs images of {least}: {to_do}")
        maps = [self.first(image)]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in self.up:
            x = up(x, maps.pop())
        return self.last(x)


CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d


def _num_outputs(layer: nn.Module) -> int | None:
    """The output channels of a convolution or linear layer; None for any other module."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else None


class _UpsampleAndConcatenate(nn.Module):
    """MONAI's `UpCat` without its copies, by padding where nothing is missing, and type checks, which a compiler stops at."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.upsample, self.convs = block.upsample, block.convs

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upsample(x)
        missing = [n for axis in reversed(range(2, x.ndim)) for n in (0, skip.shape[axis] - x.shape[axis])]
        return self.convs(torch.cat([skip, pad(x, missing, "replicate") if any(missing) else x], dim=1))
