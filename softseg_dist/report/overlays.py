"""Which cases a report shows, and what the winner predicts there: the best, the median and the worst of its test cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ValidationError

from softseg_dist.data.preprocess import Sample
from softseg_dist.data.store import Store
from softseg_dist.data.store_cache import local_store
from softseg_dist.errors import UserError
from softseg_dist.numerics.metrics import OBJECTIVES
from softseg_dist.report.pictures import Overlay
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.tables import Summary
from softseg_dist.training.evaluation import mean_reference
from softseg_dist.training.inference import predict_sample
from softseg_dist.training.model import Model, load_weights
from softseg_dist.training.task import weights_path


def choose_overlays(run: RunData, summary: Summary) -> tuple[Overlay, ...]:
    """One overlay for the best, the median and the worst test case of the winner; () if store or weights are not at hand.

    A case that was tested in several splits counts once per split; each is predicted by the model of its own split.
    """
    try:
        store = Store.open(local_store(run.run.get("store", "")), run.run.get("store_fingerprint"))
        recipe = next(c.recipe for c in run.candidates if c.name == summary.winner.name)
        model = Model.of_json(recipe, store.channels, len(store.classes), store.dim)
    except (
        UserError,
        ValidationError,
        OSError,
    ):  # moved or out of reach, or a network of a study file that is not loaded
        return ()
    ranked = _ranked_cases(run, summary)
    if not all(_weights(run, summary, split).exists() for split in ranked["split"]):
        return ()
    shown = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    return tuple(_overlay(label, ranked.iloc[at], run, summary, store, model) for label, at in shown.items())


def _ranked_cases(run: RunData, summary: Summary) -> pd.DataFrame:
    """The winner's test cases with columns split, case, value, the best first."""
    rows = run.results
    wanted = (
        (rows["candidate"] == summary.winner.name)
        & (rows["subset"] == "test")
        & (rows["reference"] == "mean")
        & (rows["metric"] == summary.objective)
        & rows["threshold"].isna()
    )
    means = rows[wanted].groupby(["split", "case"], observed=True)["value"].mean().dropna().reset_index()
    return means.sort_values(["value", "case", "split"], ascending=OBJECTIVES[summary.objective].sign < 0)


def _weights(run: RunData, summary: Summary, split: int) -> Path:
    return weights_path(run.folder / "fits" / summary.winner.name / f"{split:03d}")


def _overlay(label: str, row: pd.Series, run: RunData, summary: Summary, store: Store, model: Model) -> Overlay:
    load_weights(model, _weights(run, summary, row["split"]))
    index = next(case.index for case in store.cases if case.name == row["case"])
    sample = store.sample(index)
    image, truth, prediction = _slice(sample, mean_reference(sample), predict_sample(model, sample))
    k = int(truth.sum(axis=(1, 2)).argmax())
    return Overlay(
        case=f"{row['case']}, split {row['split']}",
        label=label,
        image=image,
        truth=truth[k],
        prediction=prediction[k],
        score=float(row["value"]),
        spacing_mm=(sample.spacing_mm[0], sample.spacing_mm[1]),
        class_name=store.classes[k] if len(store.classes) > 1 else "",
    )


def _slice(sample: Sample, truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image [X Y], truth and prediction [K X Y] of the axial slice with the largest labelled area."""
    if sample.image.ndim == 4:  # 2D: [N C X Y]
        at = int(truth.sum(axis=(1, 2, 3)).argmax())
        return sample.image[at, 0], truth[at], prediction[at]
    at = int(truth[0].sum(axis=(0, 1, 2)).argmax())
    return sample.image[0, 0, :, :, at], truth[0, ..., at], prediction[0, ..., at]
