"""Machines with a GPU that have torch, monai, numpy, scipy, nibabel, pyarrow and pydantic, and no other dependency of the package.

Training imports no more than these, but for safetensors, in which a fit writes its weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


def do_without_safetensors() -> None:
    """Where safetensors is not installed, let torch write and read the weights: the same tensors in another format."""
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError:
        package, functions = ModuleType("safetensors"), ModuleType("safetensors.torch")
        vars(functions).update(save_file=torch.save, load_file=_load_file)
        vars(package).update(torch=functions)
        sys.modules.update({"safetensors": package, "safetensors.torch": functions})


def _load_file(path: str | Path) -> dict[str, Tensor]:
    """Read what `torch.save` wrote. From an open file: torch takes a path that ends in .safetensors for that format."""
    with Path(path).open("rb") as file:
        weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    return weights
