"""What a search, its racing and tuning, and an opened holdout leave in a run folder of `synthetic_run`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sealed_files import put, put_table, value_of


def give_up(folder: Path, candidate: str, after: int, incumbent: str) -> None:
    """Take all splits but the first `after` from a candidate, as a race would have."""
    record = {"type": "RaceRecord", "candidate": candidate, "incumbent": incumbent}
    put(folder / "fits" / candidate / "race.json", record | {"after": after, "difference": -0.05, "p": 0.01})
    for path in (folder / "fits" / candidate).glob("[0-9]*.json"):
        if int(path.stem) >= after:
            path.unlink()
    table = pd.read_parquet(folder / "results.parquet")
    put_table(table[(table["candidate"] != candidate) | (table["split"] < after)], folder / "results.parquet")


def tune(folder: Path, candidate: str, rates: dict[float, float], chosen: float) -> None:
    """One trial of one fit per learning rate, with its score on validation; the candidate's recipe gets the `chosen` one."""
    path = folder / "fits" / candidate / "candidate.json"
    record = value_of(path)
    for number, (rate, score) in enumerate(rates.items()):
        name = f"{candidate}~{number}"
        recipe = record["recipe"] | {"optim": record["recipe"]["optim"] | {"lr": rate}}
        trial = {"type": "CandidateRecord", "name": name, "origin": "tuning", "number": number, "recipe": recipe}
        put(folder / "fits" / name / "candidate.json", trial)
        fit = {"type": "FitResult", "candidate": name, "split": 0, "state": "finished", "score": score}
        put(folder / "fits" / name / "000.json", fit | {"duration_s": 5.0})
    tuned = record["recipe"] | {"optim": record["recipe"]["optim"] | {"lr": chosen}}
    put(path, record | {"recipe": tuned})
    table = pd.read_parquet(folder / "results.parquet")
    rows = table[(table["candidate"] == candidate) & (table["split"] == 0)]
    parts = [rows.assign(candidate=f"{candidate}~{number}") for number in range(len(rates))]
    put_table(pd.concat([table, *parts], ignore_index=True), folder / "results.parquet")


def hold_out(folder: Path, winner: str, control: str | None, gain: float, opened: int = 1, num_subjects: int = 8) -> None:
    """Hold out subjects, and open them `opened` times: there the winner is better than the control by `gain`."""
    generator = np.random.default_rng(1)
    names = [f"9{i:02d}" for i in range(num_subjects)]
    looks = [{"at": f"2026-11-{20 + i}T10:00:00+00:00", "winner": winner, "control": control} for i in range(opened)]
    put(folder / "holdout.json", {"type": "HoldoutRecord", "subjects": names, "opened": looks})
    if not opened:
        return
    level = {name: generator.normal(0.8, 0.03) for name in names}
    table = pd.read_parquet(folder / "results.parquet")
    num_splits = int(table["split"].max()) + 1
    rows = [
        (candidate, split, name, level[name] + gain * (candidate == winner) + generator.normal(0, 0.01))
        for candidate in dict.fromkeys(filter(None, (winner, control)))
        for split in range(num_splits)
        for name in names
    ]
    frame = pd.DataFrame(rows, columns=["candidate", "split", "subject", "value"]).assign(case=lambda t: t["subject"], repeat=0)
    about = {"study": "s002_gray_matter", "subset": "holdout", "grid": "own", "class": "GM", "reference": "mean"}
    soft = frame.assign(**about, metric="dice_dml", threshold=np.nan)
    hard = [soft.assign(metric="dice", threshold=tau) for tau in (0.4, 0.5)]
    put_table(pd.concat([soft, *hard], ignore_index=True), folder / "holdout.parquet")


def nest(folder: Path, gain: float, num_outer: int = 5, control: str | None = "hard-sigmoid-dice") -> None:
    """The folder of a nested study whose winners are better than the control by `gain` on outer test subjects."""
    generator = np.random.default_rng(2)
    names = [f"{i:03d}" for i in range(20)]
    level = {name: generator.normal(0.8, 0.03) for name in names}
    rows = [
        (candidate, split, name, level[name] + gain * (candidate == "winner") + generator.normal(0, 0.01))
        for split in range(num_outer)
        for name in generator.choice(names, 6, replace=False)
        for candidate in filter(None, ("winner", control))
    ]
    frame = pd.DataFrame(rows, columns=["candidate", "split", "subject", "value"]).assign(case=lambda t: t["subject"], repeat=0)
    about = {"study": "nested", "subset": "test", "grid": "own", "class": "GM", "reference": "mean", "metric": "dice_dml"}
    outer = [
        {
            "split": split,
            "run": f"outer/{split:03d}",
            "winner": ("soft-normrelu-dice", "soft-sigmoid-dice")[split % 2],
            "validation_score": 0.84,
            "holdout_score": 0.82,
            "control_holdout_score": None if control is None else 0.8,
        }
        for split in range(num_outer)
    ]
    record = {"study": "nested", "objective": "dice_dml", "control": control, "planned": num_outer + 1, "outer": outer}
    put(folder / "study.json", {"name": "nested", "question": "Is it < or >?", "nested": {"type": "MonteCarlo"}})
    put(folder / "outer.json", record)
    put_table(frame.assign(**about, threshold=np.nan), folder / "outer.parquet")
