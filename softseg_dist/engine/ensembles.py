"""What the fits of a candidate predict together: an ensemble over splits, from the weights that they left behind.

Repeated splits test a subject several times. Each of these fits has not seen it in training, and so their mean is a fair
prediction of it, and their spread says how sure training on other people would leave us.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from softseg_dist.engine.final_model import Trained
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.session import Outcome
from softseg_dist.errors import UserError
from softseg_dist.judging import results
from softseg_dist.judging.rows import Row
from softseg_dist.judging.uncertainty import Spread, uncertainty_rows
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.study import Recipe, Resources
from softseg_dist.training.inference import ensemble_maps
from softseg_dist.training.model import Model
from softseg_dist.training.task import weights_path

TABLE = "ensemble.parquet"  # in the run folder; rows as in the results table, with split -1
METHOD = "ensemble"  # what the names of its rows begin with
MEMBERS = f"{METHOD}_members"  # how many fits have predicted a case together


def measure_ensembles(
    made: Trained, copy: WorkingCopy, winner: str, outcome: Outcome, resources: Resources, progress: Progress
) -> None:
    """Measure every case that two or more fits of the winner have tested, as predicted by them all, and so for the control.

    Writes `ensemble.parquet` when the search is complete, if the study asks for uncertainty. Runs in the driver and trains
    nothing; costs nothing if the table holds these cases already, predicted by as many fits.
    Raises UserError if the weights of a finished fit are gone.
    """
    if not made.study.uncertainty or outcome.interrupted or outcome.unfinished:
        return
    names = [name for name in dict.fromkeys((winner, made.study.control)) if name]
    copy.pull(TABLE, *(f"fits/{name}/*/best.safetensors" for name in names))
    cases = {
        (name, case.name): weights
        for name in names
        for of_subject in [_members(made, name)]
        for case in made.store.cases
        if len(weights := of_subject.get(case.subject, [])) > 1
    }
    if not cases:
        progress.note(
            "no subject is tested in two splits, so there is no ensemble to measure; MonteCarlo splits do that"
        )
        return
    if _held(made.folder / TABLE) == {key: len(weights) for key, weights in cases.items()}:
        return
    progress.note(f"measuring what the fits of {' and '.join(names)} predict together")
    device = "cuda" if torch.cuda.is_available() and resources.gpus_per_fit != 0 else "cpu"
    rows = [row for name in names for row in _rows(made, name, cases, device)]
    results.write_rows(rows, made.folder / TABLE)
    copy.push(TABLE)


def _members(made: Trained, candidate: str) -> dict[str, list[Path]]:
    """The weights of all finished fits of a candidate by the subjects that they tested."""
    splits = {split.index: split for split in made.ledger.splits()}
    members: dict[str, list[Path]] = {}
    for (name, index), result in sorted(made.ledger.results().items()):
        if name == candidate and result.state == "finished":
            weights = weights_path(made.folder / "fits" / candidate / splits[index].name)
            if not weights.exists():
                raise UserError(
                    f"{weights}: the weights of a finished fit are gone; remove {weights.parent}.json, run again"
                )
            for subject in splits[index].test:
                members.setdefault(subject, []).append(weights)
    return members


def _rows(made: Trained, candidate: str, cases: dict[tuple[str, str], list[Path]], device: str) -> list[results.Row]:
    store = made.store
    recipe = Recipe.model_validate(made.ledger.candidates()[candidate].recipe)
    model = Model.of(recipe, store.channels, len(store.classes), store.dim).on(device)
    rows = []
    for case in store.cases:
        if not (weights := cases.get((candidate, case.name))):
            continue
        sample = store.sample(case.index)
        spread = Spread.of(ensemble_maps(model, weights, sample, device))
        measured = uncertainty_rows(METHOD, spread, sample.raters, store.classes)
        measured += [Row(name, "mean", None, MEMBERS, float(len(weights))) for name in store.classes]
        rows += results.rows_of_case(measured, made.study.name, candidate, -1, "test", sample)
    return rows


def _held(path: Path) -> dict[tuple[str, str], int]:
    """How many fits have predicted each (candidate, case) of the table that is there."""
    if not path.exists():
        return {}
    table = pd.read_parquet(path, columns=["candidate", "case", "metric", "value"])
    counted = table[table["metric"] == MEMBERS]
    keys = zip(counted["candidate"].astype(str), counted["case"].astype(str), strict=True)
    return dict(zip(keys, counted["value"].astype(int), strict=True))
