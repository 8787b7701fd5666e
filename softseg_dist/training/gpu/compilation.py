"""Kernels made for a network: where they are kept, so that a study pays for them once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = ".compiled"  # in the run folder
MOST_NETWORKS = 256  # that a process compiles; torch's own limit of 8 is meant for one network that keeps changing


def compiled(network: nn.Module, fit_folder: str) -> Callable[[Tensor], Tensor]:
    """`network` as one that is compiled when it is first called, and again for every other size of batch."""
    keep_compiled(fit_folder)
    torch._dynamo.config.recompile_limit = MOST_NETWORKS
    function: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False)
    return function


def keep_compiled(fit_folder: str) -> None:
    """Have this process keep what it compiles in the run folder of a fit, unless the user chose another place.

    A fit whose run folder is not on this machine works in a scratch folder, and leaves it to torch, which keeps it in a temporary
    folder of this machine.
    """
    folder = Path(fit_folder).absolute()  # <run folder>/fits/<candidate>/<split>
    if folder.parents[1].name == "fits":
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.parents[2] / FOLDER))
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder.parents[2] / FOLDER / "triton"))
