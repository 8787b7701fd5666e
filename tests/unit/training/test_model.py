"""A model's layout in memory: channels last, but for layers that a CPU cannot compute so."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from softseg_dist import Network, Recipe
from softseg_dist.training.model import Model


class Strided(Network):
    """A residual block as MONAI's DynUNet has it: the way around is a strided 1x1 convolution."""

    channels: int = 8

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        first = nn.Conv2d(in_channels, self.channels, 3, padding=1)
        around = nn.Conv2d(self.channels, 16, 1, stride=2, bias=False)
        return nn.Sequential(first, around, nn.Upsample(scale_factor=2), nn.Conv2d(16, out_channels, 1))

    def last_bias(self, module: nn.Module, num_logits: int) -> nn.Parameter:
        assert isinstance(module, nn.Sequential)
        return module[-1].bias


def train() -> None:
    """Learn from images of a size with which oneDNN of torch 2.13 would end this process."""
    torch.manual_seed(0)
    model = Model(Recipe(network=Strided()), 1, 1, (8, 8))
    adam = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.rand(2, 1, 48, 48)).sum().backward()
        adam.step()


@pytest.mark.engine
def test_a_strided_convolution_of_few_channels_does_not_end_the_process() -> None:
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_only_layers_that_would_crash_lose_the_faster_layout() -> None:
    few, many = (Model(Recipe(network=Strided(channels=channels)), 1, 1, (8, 8)) for channels in (8, 16))
    image = torch.rand(2, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    for model, plain in ((few, True), (many, False)):
        first, around = model.network[:2]
        assert first(image).is_contiguous(memory_format=torch.channels_last)
        assert around(first(image)).is_contiguous(memory_format=torch.contiguous_format) is plain
    assert list(few.state_dict()) == list(many.state_dict())


if __name__ == "__main__":
    train()
