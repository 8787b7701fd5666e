"""One picture of many cases: is the label where it should be?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from softseg_dist.data.geometry import Float32
from softseg_dist.data.preprocess import Sample
from softseg_dist.errors import UserError

COLUMNS = 6
TILE_INCHES = 2.0
# Okabe and Ito: colour-blind readers can distinguish them.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00")


def montage(samples: Iterable[Sample], path: Path, classes: Sequence[str]) -> None:
    """Write a picture of `samples`, of which there is at least one.

    Each tile is the slice with the most label, as radiologists see it: axial ones from below (left is right), coronal ones from the
    front, sagittal ones from the left. The line is where the mean of the raters is 1/2, the dotted lines where it leaves 0 and
    reaches 1, a colour per class. Raises UserError if the file cannot be written.
    """
    tiles = [(sample, *_fullest(sample)) for sample in samples]
    columns = min(COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    figure = Figure(figsize=(columns * TILE_INCHES, rows * (TILE_INCHES + 0.25) + 0.4), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (sample, image, label) in zip(axes, tiles, strict=False):
        low, high = np.percentile(image, (0.5, 99.5))
        aspect = sample.spacing_mm[1] / sample.spacing_mm[0]
        axis.imshow(image.T[:, ::-1], cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect)
        for k, mask in enumerate(label):
            colour = COLOURS[k % len(COLOURS)]
            for levels, style in (((0.5,), "solid"), ((0.02, 0.98), "dotted")):
                if mask.min() < levels[0] < mask.max():
                    axis.contour(mask.T[:, ::-1], levels=levels, colors=colour, linewidths=0.6, linestyles=style)
        axis.set_title(sample.name, fontsize=6)
    for k, name in enumerate(classes):
        axes[0].plot([], [], color=COLOURS[k % len(COLOURS)], label=name)
    figure.legend(loc="outside lower center", ncols=max(len(classes), 1), fontsize=7, frameon=False)
    FigureCanvasAgg(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # a suffix that matplotlib does not know
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _fullest(sample: Sample) -> tuple[Float32, Float32]:
    """Image [*S] and mean label [K *S] of the slice with the most label (of the middle one if there is none); axial in 3D."""
    mean: NDArray[np.float32] = np.nan_to_num(sample.raters.mean(axis=1))  # [N K *S]
    image = sample.image[:, 0]
    if sample.placement.slices is None:
        image, mean = np.moveaxis(image[0], -1, 0), np.moveaxis(mean[0], -1, 0)
    amounts = mean.sum(axis=tuple(range(1, mean.ndim)), dtype=np.float64)
    index = int(amounts.argmax()) if amounts.any() else len(amounts) // 2
    return image[index], mean[index]
