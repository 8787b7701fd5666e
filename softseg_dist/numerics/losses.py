"""Every loss that a study file can name: importing this module is enough to read any of them back from JSON.

`voxel_losses` compare voxel with voxel, `overlap_losses` objects as a whole; `loss` says what a loss is, and adds several up.
"""

from __future__ import annotations

from softseg_dist.numerics.loss import Loss, Sum
from softseg_dist.numerics.overlap_losses import (
    BatchDice,
    Dice,
    DiceSemimetric,
    FocalTversky,
    GeneralizedDice,
    JaccardMetric,
    Tversky,
    TverskySemimetric,
)
from softseg_dist.numerics.voxel_losses import BCE, L1, AdaptiveWing, Brier, Focal, Huber

__all__ = [
    "BCE", "L1", "AdaptiveWing", "BatchDice", "Brier", "Dice", "DiceSemimetric", "Focal", "FocalTversky", "GeneralizedDice",
    "Huber", "JaccardMetric", "Loss", "Sum", "Tversky", "TverskySemimetric",
]  # fmt: skip
