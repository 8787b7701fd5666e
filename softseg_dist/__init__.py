"""softseg_dist: cross-validated studies of soft-label segmentation training on Ray.

The public names of a study file. They are resolved when first used (PEP 562), so that importing the package loads no torch,
ray or mlflow and the command line answers at once.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Nobody's usage is reported to anybody; read by Ray and MLflow when they are first imported, here or in a worker.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

if TYPE_CHECKING:
    from softseg_dist.data.layouts import Bids as Bids
    from softseg_dist.data.layouts import DataSet as DataSet
    from softseg_dist.data.phantom import Phantom as Phantom
    from softseg_dist.data.preprocess import Preprocess as Preprocess
    from softseg_dist.data.splits import KFold as KFold
    from softseg_dist.data.splits import MonteCarlo as MonteCarlo
    from softseg_dist.numerics.activations import Activation as Activation
    from softseg_dist.numerics.activations import NormReLU as NormReLU
    from softseg_dist.numerics.activations import Sigmoid as Sigmoid
    from softseg_dist.numerics.activations import Softmax as Softmax
    from softseg_dist.numerics.augmentation import Affine as Affine
    from softseg_dist.numerics.augmentation import Augmentation as Augmentation
    from softseg_dist.numerics.augmentation import BiasField as BiasField
    from softseg_dist.numerics.augmentation import Blur as Blur
    from softseg_dist.numerics.augmentation import Contrast as Contrast
    from softseg_dist.numerics.augmentation import Elastic as Elastic
    from softseg_dist.numerics.augmentation import Flip as Flip
    from softseg_dist.numerics.augmentation import Gamma as Gamma
    from softseg_dist.numerics.augmentation import LowResolution as LowResolution
    from softseg_dist.numerics.augmentation import Mixup as Mixup
    from softseg_dist.numerics.augmentation import Noise as Noise
    from softseg_dist.numerics.losses import BCE as BCE
    from softseg_dist.numerics.losses import L1 as L1
    from softseg_dist.numerics.losses import AdaptiveWing as AdaptiveWing
    from softseg_dist.numerics.losses import BatchDice as BatchDice
    from softseg_dist.numerics.losses import Brier as Brier
    from softseg_dist.numerics.losses import Dice as Dice
    from softseg_dist.numerics.losses import DiceSemimetric as DiceSemimetric
    from softseg_dist.numerics.losses import Focal as Focal
    from softseg_dist.numerics.losses import FocalTversky as FocalTversky
    from softseg_dist.numerics.losses import GeneralizedDice as GeneralizedDice
    from softseg_dist.numerics.losses import Huber as Huber
    from softseg_dist.numerics.losses import JaccardMetric as JaccardMetric
    from softseg_dist.numerics.losses import Loss as Loss
    from softseg_dist.numerics.losses import Sum as Sum
    from softseg_dist.numerics.losses import Tversky as Tversky
    from softseg_dist.numerics.losses import TverskySemimetric as TverskySemimetric
    from softseg_dist.numerics.networks import Network as Network
    from softseg_dist.numerics.networks import UNet as UNet
    from softseg_dist.numerics.patches import Patch as Patch
    from softseg_dist.numerics.sampling import TTA as TTA
    from softseg_dist.numerics.sampling import MCDropout as MCDropout
    from softseg_dist.numerics.sampling import Uncertainty as Uncertainty
    from softseg_dist.numerics.smoothing import SVLS as SVLS
    from softseg_dist.numerics.smoothing import GeoLS as GeoLS
    from softseg_dist.numerics.smoothing import Smoothing as Smoothing
    from softseg_dist.numerics.smoothing import UniformSmoothing as UniformSmoothing
    from softseg_dist.study import Optim as Optim
    from softseg_dist.study import Race as Race
    from softseg_dist.study import Recipe as Recipe
    from softseg_dist.study import Resources as Resources
    from softseg_dist.study import Search as Search
    from softseg_dist.study import Study as Study
    from softseg_dist.study import TuneEach as TuneEach
    from softseg_dist.study import factorial as factorial

_HOME = {
    "softseg_dist.data.layouts": ("Bids", "DataSet"),
    "softseg_dist.data.phantom": ("Phantom",),
    "softseg_dist.data.preprocess": ("Preprocess",),
    "softseg_dist.data.splits": ("KFold", "MonteCarlo"),
    "softseg_dist.numerics.activations": ("Activation", "NormReLU", "Sigmoid", "Softmax"),
    "softseg_dist.numerics.augmentation": (
        "Affine",
        "Augmentation",
        "BiasField",
        "Blur",
        "Contrast",
        "Elastic",
        "Flip",
        "Gamma",
        "LowResolution",
        "Mixup",
        "Noise",
    ),
    "softseg_dist.numerics.losses": (
        "BCE",
        "L1",
        "AdaptiveWing",
        "BatchDice",
        "Brier",
        "Dice",
        "DiceSemimetric",
        "Focal",
        "FocalTversky",
        "GeneralizedDice",
        "Huber",
        "JaccardMetric",
        "Loss",
        "Sum",
        "Tversky",
        "TverskySemimetric",
    ),
    "softseg_dist.numerics.networks": ("Network", "UNet"),
    "softseg_dist.numerics.patches": ("Patch",),
    "softseg_dist.numerics.sampling": ("TTA", "MCDropout", "Uncertainty"),
    "softseg_dist.numerics.smoothing": ("SVLS", "GeoLS", "Smoothing", "UniformSmoothing"),
    "softseg_dist.study": ("Optim", "Race", "Recipe", "Resources", "Search", "Study", "TuneEach", "factorial"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__version__ = "0.1.0"
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'softseg_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
