"""Slices of single test cases: image, soft truth, and predictions of control and winner with their signed errors, side by side.

`choose_overlays` predicts the winner's best, median and worst test case with the fits of its split, `overlay_figure` draws them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pydantic import ValidationError

from softseg_dist.data.preprocess import Sample
from softseg_dist.data.store import Store, local_store
from softseg_dist.errors import UserError
from softseg_dist.report.figures import INK, broken, new_figure
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import soft_rows
from softseg_dist.report.tables import Summary
from softseg_dist.sealed import Damaged
from softseg_dist.training.evaluation import mean_reference
from softseg_dist.training.inference import predict_sample
from softseg_dist.training.model import Model, load_weights
from softseg_dist.training.task import fit_name, vouched, weights_path
from softseg_dist.words import number

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overlay:
    """One slice to look at. `label` says which it is ("best", "median", "worst"), `score` is the case's objective for the winner.

    `image`, `truth` and, by candidate, `predictions` are [X Y] in canonical order (x to the right, y up), or have the two axes of
    slices across another; truth and predictions in [0, 1], of one class, whose name goes into `class_name` if there are several.
    `spacing_mm`: the size of a pixel along both axes.
    """

    case: str
    label: str
    image: npt.NDArray[np.floating]
    truth: npt.NDArray[np.floating]
    predictions: Mapping[str, npt.NDArray[np.floating]]
    score: float
    spacing_mm: tuple[float, float]
    class_name: str = ""


def overlay_figure(overlays: Sequence[Overlay]) -> Figure:
    """A row per case: image, then, enlarged, soft truth and of every candidate prediction and signed error (minus the truth)."""
    names = list(overlays[0].predictions)
    titles = ["image", "soft truth", *(title for name in names for title in (broken(name), "minus truth"))]
    width = 9 / 4 * len(titles) if len(titles) < 5 else 12
    with new_figure(width, (width - 1) / len(titles) * len(overlays) + 0.75) as figure:
        grid = figure.add_gridspec(len(overlays) + 1, len(titles), height_ratios=[1.0] * len(overlays) + [0.05])
        axes = np.array([[figure.add_subplot(grid[i, j]) for j in range(len(titles))] for i in range(len(overlays))])
        for row, overlay in zip(axes, overlays, strict=True):
            soft, error = _overlay_row(row, overlay)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, color=INK, loc="center", fontsize=8)
        figure.colorbar(soft, cax=figure.add_subplot(grid[-1, 1:3]), orientation="horizontal")
        figure.colorbar(error, cax=figure.add_subplot(grid[-1, 3]), orientation="horizontal")
    return figure


def _overlay_row(row: npt.NDArray[Any], overlay: Overlay) -> tuple[Any, Any]:
    zoom = _zoom(overlay)
    (x0, x1), (y0, y1) = ((s.start, s.stop) for s in zoom)
    ratio = overlay.spacing_mm[1] / overlay.spacing_mm[0]
    low, high = np.percentile(overlay.image, [1, 99])
    image: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": high, "origin": "lower", "aspect": ratio}
    row[0].imshow(overlay.image.T, **image)
    row[0].add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="#F0E442", linewidth=1))
    words = (overlay.label, overlay.case, overlay.class_name, f"score {number(overlay.score)}")
    row[0].set_ylabel("\n".join(word for word in words if word), rotation=0, ha="right", va="center", color=INK)
    soft: dict[str, Any] = {"cmap": "viridis", "norm": Normalize(0, 1)}
    error: dict[str, Any] = {"cmap": "PuOr_r", "norm": Normalize(-1, 1)}
    layers = [(overlay.truth, soft)]
    for prediction in overlay.predictions.values():
        layers += [(prediction, soft), (prediction - overlay.truth, error)]
    for axis, (values, look) in zip(row[1:], layers, strict=True):
        seen = np.clip(3 * np.abs(values[zoom].T), 0, 0.9)  # what is near 0 lets the image through
        axis.imshow(overlay.image[zoom].T, **image)
        axis.imshow(values[zoom].T, origin="lower", aspect=ratio, alpha=seen, interpolation="nearest", **look)
    for axis in row:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return ScalarMappable(**soft), ScalarMappable(**error)


def _zoom(overlay: Overlay) -> tuple[slice, slice]:
    """The box of what is to be seen, with a margin of half its size, inside the image; the whole image if nothing is."""
    seen = np.any([overlay.truth > 0.02, *(p >= 0.5 for p in overlay.predictions.values())], axis=0)
    if not seen.any():
        return slice(0, seen.shape[0]), slice(0, seen.shape[1])
    edges = [(int(w.min()), int(w.max()) + 1) for w in np.nonzero(seen)]
    side = max(12, round(1.6 * max(high - low for low, high in edges)))
    starts = [(low + high - side) // 2 for low, high in edges]
    box = [slice(max(0, s), min(size, s + side)) for s, size in zip(starts, seen.shape, strict=True)]
    return box[0], box[1]


def choose_overlays(run: RunData, summary: Summary) -> tuple[Overlay, ...]:
    """One overlay for the best, the median and the worst test case of the winner; () without a defined score, store or weights.

    Reference and winner are shown, or the winner alone where the other has no weights. A case that was tested by several fits
    counts once for each; each is predicted by the models of its own split and repeat.
    """
    rows = soft_rows(run.results, summary.objective.name)
    means = rows[rows["candidate"] == summary.winner.name].groupby(["split", "repeat", "case"], observed=True)["value"].mean()
    order = ["value", "case", "split", "repeat"]
    ranked = means.dropna().reset_index().sort_values(order, ascending=summary.objective.sign < 0)  # the best first
    slots = list(ranked[["split", "repeat"]].drop_duplicates().itertuples(index=False))
    pair = dict.fromkeys((summary.reference, summary.winner.name))
    fits = {(fit.candidate, *fit.slot): fit for fit in run.fits}
    names = [name for name in pair if all(_weights(run, name, *slot).exists() for slot in slots)]
    for path, fit in ((_weights(run, name, *slot), fits[name, *slot]) for name in names for slot in slots):
        vouched(fit, path)
    if ranked.empty or summary.winner.name not in names:
        return ()
    try:
        store = Store.open(local_store(run.run.get("store", "")), run.run.get("store_fingerprint"))
        recipes = {c.name: c.recipe for c in run.candidates}
        models = {name: Model.of_json(recipes[name], store.channels, len(store.classes), store.size) for name in names}
    except (UserError, ValidationError, OSError) as error:  # moved, out of reach, or a network of a study file that is not loaded
        if isinstance(error, Damaged):
            log.warning("%s; the report has no pictures", error)
        return ()
    shown = {len(ranked) // 2: "median", len(ranked) - 1: "worst", 0: "best"}  # of one or two cases none is shown twice
    return tuple(_overlay(label, ranked.iloc[at], run, store, models) for at, label in sorted(shown.items()))


def _weights(run: RunData, name: str, split: int, repeat: int) -> Path:
    return weights_path(run.folder / "fits" / name / fit_name(split, repeat))


def _overlay(label: str, row: pd.Series, run: RunData, store: Store, models: Mapping[str, Model]) -> Overlay:
    sample = store.sample(next(case.index for case in store.cases if case.name == row["case"]))
    predictions = {}
    for name, model in models.items():
        load_weights(model, _weights(run, name, row["split"], row["repeat"]))
        predictions[name] = _slice(sample, predict_sample(model, sample))
    truth = np.nan_to_num(_slice(sample, mean_reference(sample)))
    k = int(truth.sum(axis=(1, 2)).argmax())
    return Overlay(
        case=f"{row['case']}, split {row['split']}",
        label=label,
        image=_slice(sample, sample.image)[0],
        truth=truth[k],
        predictions={name: maps[k] for name, maps in predictions.items()},
        score=float(row["value"]),
        spacing_mm=(sample.spacing_mm[0], sample.spacing_mm[1]),
        class_name=store.classes[k] if len(store.classes) > 1 else "",
    )


def _slice(sample: Sample, maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of maps [N C *S] the slice with the largest labelled area, an axial one [C X Y] in 3D."""
    truth = np.nan_to_num(mean_reference(sample))
    if maps.ndim == 4:  # 2D
        return maps[int(truth.sum(axis=(1, 2, 3)).argmax())]
    return maps[0, ..., int(truth[0].sum(axis=(0, 1, 2)).argmax())]
