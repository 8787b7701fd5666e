"""Machines with a GPU that have torch, monai, numpy, scipy, nibabel, pyarrow and pydantic, and nothing else that the package needs.

What trains imports no more than that, but for safetensors, in which a fit writes weights.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import torch


def do_without_safetensors() -> None:
    """Where safetensors is not installed, torch writes and reads the weights instead: the same tensors in another format."""
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError:
        package, functions = ModuleType("safetensors"), ModuleType("safetensors.torch")
        vars(functions).update(save_file=torch.save, load_file=partial(torch.load, weights_only=True))
        sys.modules.update({"safetensors": package, "safetensors.torch": functions})
