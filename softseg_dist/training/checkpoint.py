"""The state of a fit that has not ended, saved whole and read back only by the same fit."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from softseg_dist.files import replace_file
from softseg_dist.training.task import FitTask, checkpoint_path


def save_checkpoint(task: FitTask, state: dict[str, Any]) -> None:
    """Replace the fit's checkpoint; a crash in the middle leaves the former one."""
    marked = {"identity": task.identity, **state}
    replace_file(checkpoint_path(task.folder), lambda partial: torch.save(marked, partial))


def load_checkpoint(task: FitTask) -> dict[str, Any] | None:
    """The state that `save_checkpoint` was given; None if there is nothing to go on from.

    A checkpoint of another task (the recipe was changed) or one that cannot be read is no checkpoint: starting again gives the
    same result, only later.
    """
    path = checkpoint_path(task.folder)
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        return None
    return state if state["identity"] == task.identity else None
