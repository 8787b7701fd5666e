"""What fits predict together: each case by the fits that tested it and by no other, once, and again when there are more."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from softseg_dist import MCDropout, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Resources, Scale, Study, UNet
from softseg_dist.data.store import Store, build_store
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.finalists import ENSEMBLE, MEMBERS, measure_ensembles
from softseg_dist.engine.local import LocalBackend
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.session import Outcome
from softseg_dist.numerics.metrics import METRICS
from softseg_dist.record.ledger import CandidateRecord, Ledger, json_of
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.training.fit import fit
from softseg_dist.training.inference import predict_sample
from softseg_dist.training.model import Model, load_weights
from softseg_dist.training.task import FitTask, weights_path

RECIPE = Recipe(network=UNet(filters=(4, 8), dropout=0.1), optim=Optim(lr=5e-3, epochs=1, batch_size=8))
NUM_SPLITS = 4


def measured(made: RunContext) -> None:
    outcome = Outcome(finished=NUM_SPLITS, failed=0, unfinished=0, interrupted=False)
    measure_ensembles(made, "a", outcome)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """A run with four finished fits of one candidate, of which the last one is not recorded yet."""
    folder = tmp_path_factory.mktemp("run")
    data, preprocess = Phantom(subjects=5, size=(16, 16), num_slices=2, raters=2), Preprocess(dim=2)
    study = Study(
        name="s", question="?", data=data, preprocess=preprocess, splits=MonteCarlo(count=NUM_SPLITS),
        candidates={"a": RECIPE}, uncertainty=(MCDropout(),),
    )  # fmt: skip
    path = build_store(folder / "stores", data.cases(None), data, preprocess)
    store, ledger = Store.open(path), Ledger(folder)
    splits = study.splits.make({case.subject: case.site for case in store.cases}, 0)
    ledger.open_study(study, splits, store.fingerprint)
    ledger.write_candidate(CandidateRecord(name="a", origin="fixed", number=0, recipe=json_of(RECIPE)))
    for split in splits:
        task = FitTask(
            study="s", seed=0, candidate="a", recipe=RECIPE, split=split, objective="dice_dml", store=str(path),
            store_fingerprint=store.fingerprint, folder=ledger.fit_folder("a", split),
        )  # fmt: skip
        result = fit(task)
        if split.index < NUM_SPLITS - 1:
            ledger.write_result(result)
        else:
            late = result
    made = RunContext(study, splits, Prepared(str(path)), ledger, WorkingCopy(folder), Resources(), LocalBackend(), Progress())
    measured(made)
    first = pd.read_parquet(folder / ENSEMBLE)
    (folder / ENSEMBLE).rename(folder / "first.parquet")
    ledger.write_result(late)
    measured(made)
    assert len(pd.read_parquet(folder / ENSEMBLE)) >= len(first)
    return made


def splits_by_subject(made: RunContext, table: str) -> dict[str, list[int]]:
    """The splits that a table may know of and that test each subject at least twice together."""
    known = made.ledger.splits()[: NUM_SPLITS - 1 if table == "first.parquet" else NUM_SPLITS]
    by_subject = {case.subject: [s.index for s in known if case.subject in s.test] for case in made.prepared.store.cases}
    return {subject: splits for subject, splits in by_subject.items() if len(splits) > 1}


@pytest.mark.parametrize("table", ["first.parquet", ENSEMBLE])
def test_a_case_is_predicted_by_all_fits_that_tested_it_and_by_no_other(made: RunContext, table: str) -> None:
    rows = pd.read_parquet(made.copy.folder / table)
    expected = splits_by_subject(made, table)
    assert set(rows.subject) == set(expected) != set()
    assert (set(rows.split), set(rows.subset), set(rows.candidate)) == ({-1}, {"test"}, {"a"})
    members = rows[rows.metric == MEMBERS].set_index("subject").value
    assert {subject: len(splits) for subject, splits in expected.items()} == members.to_dict()
    model = Model(RECIPE, 1, 1, (8, 8))
    for case in made.prepared.store.cases:
        if case.subject not in expected:
            continue
        maps, sample = [], made.prepared.store.sample(case.index)
        for split in expected[case.subject]:
            load_weights(model, weights_path(made.copy.folder / f"fits/a/{split:03d}"))
            maps.append(predict_sample(model, sample))
        value = rows[(rows.case == case.name) & (rows.metric == "ensemble_dice_dml")].value.item()
        scale = Scale(sample.voxel_mm3, (1.0,), sample.spacing_mm)
        expected = METRICS["dice_dml"](np.mean(maps, axis=0), sample.raters.mean(axis=1), scale)
        assert value == pytest.approx(expected[0], abs=1e-6)


def test_what_is_measured_is_not_measured_again(made: RunContext) -> None:
    before = (made.copy.folder / ENSEMBLE).stat().st_mtime_ns
    measured(made)
    assert (made.copy.folder / ENSEMBLE).stat().st_mtime_ns == before
