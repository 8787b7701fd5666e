"""The state of a fit that has not ended, saved whole and read back only by the same fit."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import nn, optim

from softseg_dist.training.files import replace_file
from softseg_dist.training.task import FitTask, checkpoint_path


def save_checkpoint(task: FitTask, model: nn.Module, optimizer: optim.Optimizer, progress: dict[str, Any]) -> None:
    """Replace the fit's checkpoint; a crash in the middle leaves the former one."""
    state = {
        "identity": task.identity,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": progress,
    }
    replace_file(checkpoint_path(task.folder), lambda partial: torch.save(state, partial))


def load_checkpoint(task: FitTask, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any] | None:
    """Restore model and optimizer and return the progress; None, with nothing changed, if there is nothing to go on from.

    A checkpoint of another task (the recipe was changed) or one that cannot be read is no checkpoint: starting again gives the
    same result, only later.
    """
    path = checkpoint_path(task.folder)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        return None
    if state["identity"] != task.identity:
        return None
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    progress: dict[str, Any] = state["progress"]
    return progress
