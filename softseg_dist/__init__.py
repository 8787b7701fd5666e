"""softseg_dist: cross-validated studies of soft-label segmentation training on Ray.

The public names of a study file. They are resolved when first used (PEP 562), so that importing the package loads no torch,
ray or mlflow and the command matrix answers at once.
"""

from __future__ import annotations

import importlib
import os
import pwd
from typing import Any

# Nobody's usage is reported to anybody; read by Ray and MLflow when they are first imported, here or in a worker.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` Ray would upload the folder and make environments
try:
    pwd.getpwuid(os.getuid())
except KeyError:  # in a container that runs as any user: Ray wants a home folder, torch a name, and neither needs to exist
    os.environ.setdefault("HOME", "/")
    os.environ.setdefault("LOGNAME", str(os.getuid()))

# Module -> its public names. The stub `__init__.pyi` is written from it: python tests/unit/test_public_names.py
PUBLIC = {
    "softseg_dist.api": ("Run", "evaluate", "load", "load_model", "run"),
    "softseg_dist.assessment": ("EvaluateOptions",),
    "softseg_dist.errors": ("UserError",),
    "softseg_dist.frozen": ("Frozen",),
    "softseg_dist.data.case_table": ("Table",),
    "softseg_dist.data.cases": ("Case", "CaseData", "DataSet", "ImageCase", "LabelledCase", "MaskFile", "Pool"),
    "softseg_dist.data.challenges": ("SCGM", "BraTS", "Decathlon", "MSSEG", "NnUNet"),
    "softseg_dist.data.files": ("Files",),
    "softseg_dist.data.geometry": ("Geometry",),
    "softseg_dist.data.layouts": ("Bids", "Each"),
    "softseg_dist.data.phantom": ("Phantom",),
    "softseg_dist.data.preprocess": ("Preprocess",),
    "softseg_dist.data.splits": ("GivenSplits", "KFold", "LeaveOneSiteOut", "MonteCarlo", "Split", "Splits"),
    "softseg_dist.numerics.activations": ("Activation", "NormReLU", "Sigmoid", "Softmax"),
    "softseg_dist.numerics.augmentation": ("Mixup",),
    "softseg_dist.numerics.intensity": ("BiasField", "Blur", "Contrast", "Gamma", "LowResolution", "Noise"),
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
    "softseg_dist.numerics.metrics": ("Metric", "Scale"),
    "softseg_dist.numerics.networks": ("Network", "UNet"),
    "softseg_dist.numerics.patches": ("Patch",),
    "softseg_dist.numerics.sampling": ("TTA", "MCDropout", "Uncertainty"),
    "softseg_dist.numerics.smoothing": ("SVLS", "GeoLS", "Smoothing", "UniformSmoothing"),
    "softseg_dist.numerics.spatial": ("Affine", "Elastic", "Flip"),
    "softseg_dist.numerics.transforms": ("AffineMap", "Augmentation", "Frame", "Intensity", "Invertible", "Pairing", "Spatial"),
    "softseg_dist.pipeline": ("RunOptions",),
    "softseg_dist.prediction": ("Predictor",),
    "softseg_dist.study": ("Optim", "Race", "Recipe", "Resources", "Search", "Study", "TuneEach", "factorial", "softseg_parity"),
}
_MODULE_OF = {name: module for module, names in PUBLIC.items() for name in names}
__version__ = "0.1.0"
NUMERICS = 6  # raised when results of the same study change: a study that was begun with another number is refused
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'softseg_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
