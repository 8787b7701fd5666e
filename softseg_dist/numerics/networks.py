"""Networks: images [B C *S] become logits [B num_logits *S], which the activation turns into a prediction.

Legend: B batch, C image channels, *S space (2 or 3 axes). Weights are drawn from torch's global generator: seed it
before `build` to start from the same weights.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen

Filters = tuple[Annotated[int, Field(ge=2)], ...]


class Network(Frozen, ABC):
    """A recipe for a module; the module itself is built where it is trained."""

    @abstractmethod
    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        """A new module: images [B in_channels *S] to logits [B out_channels *S], with `dim` axes in *S (2 or 3)."""

    @abstractmethod
    def last_bias(self, module: nn.Module) -> nn.Parameter:
        """The bias [out_channels] that is added last to the logits of `module`, which `build` made."""


class UNet(Network):
    """U-Net: (conv 3 - norm - dropout - ReLU) x 2 per level, max pooling down, up-sampling and concatenation up.

    `filters` gives the channels of every level, finest first, so its length is the depth. `norm` is "batch" or
    "instance" (with learned scale and offset; convolutions before it have no bias, which it would remove).
    `dropout` is the share of values set to 0. `upsample`: "interp" is a 1x1 convolution and linear interpolation,
    "deconv" a strided transposed convolution. Sizes need not be even: up-sampled maps are padded by replication.

    Source: Ronneberger et al., MICCAI 2015, doi 10.1007/978-3-319-24574-4_28; blocks of MONAI's BasicUNet.
    """

    short: ClassVar[str] = "unet"
    filters: Filters = Field((16, 32, 64, 128), min_length=2)
    norm: Literal["batch", "instance"] = "batch"
    dropout: float = Field(0.0, ge=0, lt=1)
    upsample: Literal["interp", "deconv"] = "interp"

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        """A new U-Net: images [B in_channels *S] to logits [B out_channels *S], with `dim` axes in *S (2 or 3).

        The module raises UserError if an image is too small for the depth.
        """
        return _UNetModule(self, in_channels, out_channels, dim)

    def last_bias(self, module: nn.Module) -> nn.Parameter:
        """The bias [out_channels] of the final 1x1 convolution of `module`."""
        assert isinstance(module, _UNetModule)
        assert isinstance(module.last.bias, nn.Parameter)
        return module.last.bias


class _UNetModule(nn.Module):
    """MONAI's BasicUNet with any depth of at least 2 and any filters."""

    def __init__(self, config: UNet, in_channels: int, out_channels: int, dim: int) -> None:
        # Importing monai takes seconds, and a study file that only names a network should not pay them.
        from monai.networks.layers.factories import Conv
        from monai.networks.nets.basic_unet import Down, TwoConv, UpCat

        super().__init__()
        filters = config.filters
        norm = (config.norm, {"affine": True})
        blocks = {"act": ("relu", {"inplace": True}), "norm": norm, "bias": False, "dropout": config.dropout}
        upsample = {"interp": "nontrainable", "deconv": "deconv"}[config.upsample]
        levels = list(pairwise(filters))
        self.first = TwoConv(dim, in_channels, filters[0], **blocks)
        self.down = nn.ModuleList(Down(dim, fine, coarse, **blocks) for fine, coarse in levels)
        self.up = nn.ModuleList(
            UpCat(dim, coarse, fine, fine, **blocks, upsample=upsample) for fine, coarse in reversed(levels)
        )
        self.last = Conv["conv", dim](filters[0], out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        self._check_size(tuple(image.shape[2:]))
        maps = [self.first(image)]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in self.up:
            x = up(x, maps.pop())
        return self.last(x)

    def _check_size(self, size: tuple[int, ...]) -> None:
        shrink = 2 ** len(self.down)
        # A single voxel at the coarsest level has no variance to normalise by.
        if min(size) < shrink or max(size) < 2 * shrink:
            raise UserError(
                f"a U-Net of {len(self.down) + 1} levels needs images of at least {shrink} voxels along every axis and "
                f"{2 * shrink} along one, got {' x '.join(map(str, size))}: give it fewer filters or a larger crop or patch"
            )


def lean(module: nn.Module) -> None:
    """Let MONAI's up-sampling blocks inside `module` cost no more than they must; parameters and their names stay.

    Theirs pad, and so copy, also where nothing is missing, and ask for types in a way that a compiler cannot follow, which would
    cut the network to pieces.
    """
    if (blocks := sys.modules.get("monai.networks.nets.basic_unet")) is None:  # then nothing inside is of it
        return
    for name, child in module.named_children():
        if type(child) is blocks.UpCat:
            setattr(module, name, _UpCat(child))
        else:
            lean(child)


class _UpCat(nn.Module):
    """Up-samples a coarse map, joins the finer one `beside` it, if there is one, and convolves both."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.upsample, self.convs = block.upsample, block.convs
        self.train(block.training)

    def forward(self, x: Tensor, beside: Tensor | None) -> Tensor:
        x = self.upsample(x)
        if beside is not None:
            missing = [n for axis in reversed(range(2, x.ndim)) for n in (0, beside.shape[axis] - x.shape[axis])]
            x = torch.cat([beside, pad(x, missing, "replicate") if any(missing) else x], dim=1)
        joined: Tensor = self.convs(x)
        return joined
