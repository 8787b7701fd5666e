"""A run folder as a study would leave it, made of random numbers with a known structure: for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sealed_files import put, put_table, vouch
from synthetic_measures import measured_rows

from softseg_dist.judging.thresholds import CURVE
from softseg_dist.report.page import write_page
from softseg_dist.report.pictures import Overlay
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.tables import summarise
from softseg_dist.training.task import left_in

CELLS = [f"{label}-{act}-{loss}" for label in ("hard", "soft") for act in ("sigmoid", "normrelu") for loss in ("dice", "wing")]
TYPES = {"sigmoid": "Sigmoid", "normrelu": "NormReLU", "dice": "Dice", "wing": "AdaptiveWing"}
GAIN = {"soft": 0.02, "normrelu": 0.006, "wing": -0.004}  # planted main effects on the objective
RATERS = ("rater1", "rater2")
Row = tuple[object, ...]  # of the table of results


def recipe(cell: str) -> dict[str, object]:
    """The JSON of the recipe of a factorial cell `label-activation-loss`."""
    label, activation, loss = cell.split("-")
    return {
        "type": "Recipe",
        "network": {"type": "UNet", "filters": [16, 32, 64], "norm": "batch"},
        "activation": {"type": TYPES[activation]} | ({"over": "sample"} if activation == "normrelu" else {}),
        "loss": {"type": TYPES[loss]} | ({"omega": 14.0} if loss == "wing" else {"smooth": 1.0}),
        "label": label,
        "fusion": "mean",
        "augment": [{"type": "Affine", "degrees": 20.0}, {"type": "Flip", "p": 0.5}],
        "optim": {"type": "Optim", "lr": 0.001, "epochs": 60, "batch_size": 16},
    }


def write_run(
    folder: Path,
    candidates: Sequence[str] = CELLS,
    control: str | None = "hard-sigmoid-dice",
    num_splits: int = 6,
    num_subjects: int = 30,
    num_tested: int = 6,
    proposed: Sequence[str] = (),
    classes: Sequence[str] = ("GM",),
    objective: str | Mapping[str, object] = "dice_dml",
    collected: bool = True,
    failed: Sequence[tuple[str, int]] = (),
    missing: Sequence[tuple[str, int]] = (),
    measured: Sequence[str] = (),
    sessions: int = 1,
    raters: Sequence[str] = RATERS,
    seed: int = 0,
) -> Path:
    """Write the folder of a run. `proposed` candidates come from a search; `failed` and `missing` are (candidate, split).

    The objective of a cell is a base plus its planted gains plus effects of subject, split and error. `measured` are
    kinds of `synthetic_measures`; every subject has `sessions` cases.
    """
    generator = np.random.default_rng(seed)
    subjects = [f"{i:03d}" for i in range(num_subjects)]
    splits = [_split(generator, subjects, index, num_tested) for index in range(num_splits)]
    study = {
        "type": "Study",
        "name": "s002_gray_matter",
        "question": "Does soft training beat binary training on spinal cord gray matter?",
        "data": {"type": "Bids", "folder": "gm_challenge"},
        "candidates": {name: recipe(name) for name in candidates},
        "control": control,
        "objective": objective,
        "search": {"type": "Search", "trials": len(proposed)} if proposed else None,
        "seed": 0,
    }
    put(folder / "study.json", study)
    put(folder / "splits.json", splits)
    level = {s: generator.normal(0, 0.04) for s in subjects}
    tables = []
    for number, name in enumerate([*candidates, *proposed]):
        gain = sum(GAIN.get(part, 0.0) for part in name.split("-")) + (generator.normal(0.04, 0.01) if name in proposed else 0)
        record = {"type": "CandidateRecord", "name": name, "number": number, "recipe": recipe(CELLS[-1]) | {"fusion": name}}
        fixed = {"origin": "fixed", "recipe": recipe(name)} if name in candidates else {"origin": "proposed"}
        put(folder / "fits" / name / "candidate.json", record | fixed)
        of_subject = {s: generator.normal(0, 0.008) for s in subjects}
        rows: list[Row] = []
        for split in splits:
            if (name, split["index"]) in missing:
                continue
            bad = (name, split["index"]) in failed
            thresholds = {"fixed": 0.5, "grid": 0.4, "dice_optimal": round(0.43 + generator.normal(0, 0.01), 4)}
            _write_fit(folder, name, split["index"], thresholds, bad, generator)
            if bad:
                continue
            shift = 0.83 + gain + generator.normal(0, 0.006)
            values = {s: shift + level[s] + of_subject[s] + generator.normal(0, 0.01) for s in split["test"]}
            scores = _scores(values, thresholds, classes, raters, generator)
            tested = _of_sessions(scores, measured, thresholds, raters, sessions, generator)
            chosen_by = {s: shift + level[s] + of_subject[s] for s in split["validation"]}
            of_fit = [(*row, name, split["index"], "test") for row in tested]
            of_fit += [(*row, name, split["index"], "validation") for row in _validation(chosen_by, classes)]
            if collected:
                rows += of_fit
            else:
                fit = folder / "fits" / name / f"{split['index']:03d}"
                put_table(_table(of_fit), fit / "cases.parquet")
                vouch(fit)
        if rows:
            tables.append(_table(rows))
    if collected:
        put_table(pd.concat(tables, ignore_index=True), folder / "results.parquet")
        put(folder / "run.json", _run(num_subjects, classes, raters, subjects))
    return folder


def _split(generator: np.random.Generator, subjects: list[str], index: int, num_tested: int) -> dict[str, object]:
    order = [str(s) for s in generator.permutation(subjects)]
    parts = {"test": order[:num_tested], "validation": order[num_tested : 2 * num_tested], "train": order[2 * num_tested :]}
    return {"type": "Split", "index": index, **parts}


def _write_fit(
    folder: Path, name: str, split: int, thresholds: dict[str, float], bad: bool, generator: np.random.Generator
) -> None:
    fit = {"type": "FitResult", "candidate": name, "split": split}
    if bad:
        put(folder / "fits" / name / f"{split:03d}.json", fit | {"state": "failed", "reason": "loss is NaN in epoch 7"})
        return
    best = int(generator.integers(38, 61))
    measured = {
        "state": "finished",
        "score": 0.85,
        "test_score": 0.84,
        "best_epoch": best,
        "epochs": 60,
        "converged": best <= 57,
        "dead_share": 0.01 if "normrelu" in name else None,
        "thresholds": thresholds,
        "parameters": 412_345,
        "duration_s": float(generator.uniform(20, 30)),
    }
    noise = generator.normal(0, 0.01, 60)
    history = [
        {"epoch": e + 1, "loss": float(0.6 * np.exp(-e / 15) + 0.1), "dice_dml": float(0.85 - 0.6 * np.exp(-e / 9) + noise[e])}
        for e in range(60)
    ]
    path = folder / "fits" / name / f"{split:03d}" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in history))
    put(folder / "fits" / name / f"{split:03d}.json", fit | measured | {"files": left_in(path.parent)})


def _scores(
    values: Mapping[str, float],
    thresholds: Mapping[str, float],
    classes: Sequence[str],
    raters: Sequence[str],
    generator: np.random.Generator,
) -> list[Row]:
    """Of each subject, class and reference: subject, class, reference, threshold, metric, value."""
    rows: list[Row] = []
    for subject, value in values.items():
        for k, class_name in enumerate(classes):
            score = value - 0.03 * k
            for reference in ("mean", *raters):
                lower = 0 if reference == "mean" else 0.05
                soft = {
                    "dice_dml": score - lower,
                    "dice_soft": score - lower - 0.02,
                    "brier": 0.02 + lower / 10,
                    "ece": 0.04 + abs(generator.normal(0, 0.01)),
                    "volume_error": 0.05 + generator.normal(0, 0.1),
                    "volume_error_abs": abs(generator.normal(0.08, 0.05)),
                }
                keys = (subject, class_name, reference)
                rows += [(*keys, None, metric, v) for metric, v in soft.items()]
                taus = {*thresholds.values(), *CURVE} if reference == "mean" else set(thresholds.values())
                rows += [(*keys, tau, "dice", score + 0.02 - lower - 0.3 * (tau - 0.42) ** 2) for tau in sorted(taus)]
    return rows


def _of_sessions(
    scores: Sequence[Row],
    measured: Sequence[str],
    thresholds: Mapping[str, float],
    raters: Sequence[str],
    sessions: int,
    generator: np.random.Generator,
) -> list[Row]:
    """The rows of every session with its case, those of `measured` after the scores."""
    tested: list[Row] = []
    rows: list[Row] = []
    of_measures = dict.fromkeys((subject, class_name) for subject, class_name, *_ in scores) if measured else {}
    for session in range(1, sessions + 1):
        suffix = f"_ses-{session}" if sessions > 1 else ""
        tested += [(*row, f"sub-{row[0]}{suffix}") for row in scores]
        for subject, class_name in of_measures:
            true_mm3 = 400 + 20.0 * int(subject) + 5 * session
            found = measured_rows(measured, thresholds, raters, true_mm3, generator)
            rows += [(subject, class_name, *row, f"sub-{subject}{suffix}") for row in found]
    return tested + rows


def _validation(values: Mapping[str, float], classes: Sequence[str]) -> list[Row]:
    """The rows of the objective on validation, of one case per subject."""
    return [
        (subject, class_name, "mean", None, "dice_dml", value - 0.03 * k, f"sub-{subject}")
        for subject, value in values.items()
        for k, class_name in enumerate(classes)
    ]


def _table(rows: Sequence[Row]) -> pd.DataFrame:
    """Of the rows of many fits at once: a table per fit takes longer than its rows."""
    columns = ["subject", "class", "reference", "threshold", "metric", "value", "case", "candidate", "split", "subset"]
    table = pd.DataFrame(rows, columns=columns).assign(study="s002_gray_matter", grid="own", repeat=np.int32(0))
    return table.astype({"threshold": "float64", "value": "float64", "split": np.int32, "repeat": np.int32})


def _run(num_subjects: int, classes: Sequence[str], raters: Sequence[str], subjects: Sequence[str]) -> dict[str, object]:
    return {
        "versions": {"softseg_dist": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "monai": "1.6.0"},
        "machine": {"cpus": 2, "memory_gb": 8, "python": "3.11.7", "system": "Linux"},
        "command": "softseg run studies/s002_gray_matter.py --data-root DATA",
        "store": "stores/0123456789abcdef.arrow",
        "store_fingerprint": "0123456789abcdef",
        "data": {
            "num_cases": num_subjects + 2,
            "num_subjects": num_subjects,
            "classes": list(classes),
            "raters": list(raters),
            "sites": {"A": num_subjects // 2, "B": num_subjects - num_subjects // 2},
            "site_of": {name: "A" if i < num_subjects // 2 else "B" for i, name in enumerate(subjects)},
            "size": [96, 96],
            "spacing_mm": [0.5, 0.5],
        },
        "study_fingerprint": "89abcdef0123",
        "seconds": 1312.4,
    }


def written_page(folder: Path, overlays: Sequence[Overlay] = ()) -> Path:
    """Write the page of a run folder; returns its path."""
    data = load_run(folder)
    return write_page(data, summarise(data), overlays)
