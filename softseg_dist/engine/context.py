"""What one run is: its study, prepared data, record and display, and the backend that runs its fits.

`RunContext` goes from `run_study` to the search, the held-out subjects, the ensembles and the final model. Imports no Ray and no
MLflow, so that `softseg prepare` and `softseg run --local` start quickly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, local_store, shared_store
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.worker import Fit
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.search.candidate import is_tuning
from softseg_dist.sources import Sources
from softseg_dist.study import Recipe, Resources, Study
from softseg_dist.tracking.tracker import Tracker
from softseg_dist.training.fit import fit
from softseg_dist.training.model import Model
from softseg_dist.training.task import FitResult, FitTask, vouched, weights_path
from softseg_dist.words import count

if TYPE_CHECKING:
    from softseg_dist.engine.session import Session

RAY = "2.60"  # the minor version that the tests have run
SUBMITTED_BY = "SOFTSEG_SUBMITTED_BY"  # names, in a job's environment, the version of softseg_dist that submitted it


def check_ray() -> None:
    """Raise UserError if the installed Ray is not the tested one, or if this is a job that another softseg_dist submitted."""
    installed = version("ray")
    if not installed.startswith(f"{RAY}."):
        raise UserError(f'Ray {installed} is not supported: pip install "ray[default,tune,train]=={RAY}.*", or run with --local')
    submitter, ours = os.environ.get(SUBMITTED_BY), version("softseg_dist")
    if submitter not in (None, ours):
        raise UserError(f"submitted by softseg_dist {submitter}, but the cluster has {ours}; install one version in both places")


@dataclass(frozen=True)
class Prepared:
    """The store of a study, by the path or URI at which workers find it; `expected` is its fingerprint, where that is known."""

    uri: str
    expected: str | None = None

    @cached_property
    def store(self) -> Store:
        """The store, opened on this machine. Raises UserError if it is gone, or has another fingerprint."""
        return Store.open(local_store(self.uri), self.expected)

    @property
    def fingerprint(self) -> str:
        """That of the store."""
        return self.expected or self.store.fingerprint

    @cached_property
    def sites(self) -> Mapping[str, str]:
        """The site of each subject."""
        return {case.subject: case.site for case in self.store.cases}

    @cached_property
    def persons(self) -> Mapping[str, str]:
        """The subject of each case."""
        return {case.name: case.subject for case in self.store.cases}

    def resolved(self, study: Study) -> Study:
        """The study, with the numbers of the store where its file says spacing_mm="median"."""
        return study.replace(preprocess=self.store.preprocess) if study.preprocess.spacing_mm == "median" else study


def prepare(study: Study, data_root: Path | None, stores: str | Path, note: Callable[[str], None]) -> Prepared:
    """Build the study's store, or find it built; `note` gets lines about progress. Raises UserError on data that cannot be used."""
    cases = study.kept(study.data.cases(data_root))
    for warning in study.data.warnings(data_root):
        note(f"warning: {warning}")

    def say(done: int, total: int, name: str) -> None:
        if done % max(1, total // 10) == 0:
            note(f"prepared {done} of {total} cases, the last one {name}")

    preprocess = study.preprocess.resolved(cases)
    if preprocess != study.preprocess:
        note(f'spacing_mm="{study.preprocess.spacing_mm}" of {count(len(cases), "case")} is {preprocess.spacing_mm} mm')
    return Prepared(shared_store(stores, cases, study.data, preprocess, say))


class Backend(Protocol):
    """Where fits run: `engine.local.LocalBackend` or `engine.ray_tune.RayBackend`."""

    def held(self) -> AbstractContextManager[None]:
        """What the backend starts while the block runs stays until its end."""

    def run_fits(self, session: Session, context: RunContext) -> None:
        """Run the fits that the session gives, until it has ended."""


@dataclass(frozen=True)
class RunContext:
    """One run of a study. `copy` is the run folder on this machine; workers load the `sources` of the study.

    `splits` and the store of `prepared` are those of the ledger; `resources` are the study's with the changes of the command line.
    """

    study: Study
    splits: tuple[Split, ...]
    prepared: Prepared
    ledger: Ledger
    copy: WorkingCopy
    resources: Resources
    backend: Backend
    progress: Progress
    tracker: Tracker | None = None
    sources: Sources | None = None
    fit: Fit = fit

    @property
    def stop_file(self) -> Place:
        """The file that makes all running fits stop, once it is written."""
        return self.ledger.place / ".stop"

    @property
    def device(self) -> str:
        """The device for what runs in this process."""
        return "cuda" if torch.cuda.is_available() and self.resources.gpus_per_fit != 0 else "cpu"

    def fit_task(self, candidate: str, recipe: Recipe, split: Split, repeat: int = 0, attempt: int = 0) -> FitTask:
        """A fit of a candidate on a split, in the folder that belongs to it."""
        return FitTask(
            study=self.study.name,
            seed=self.study.seed,
            candidate=candidate,
            recipe=recipe,
            split=split,
            repeat=repeat,
            objective=self.study.objective,
            second_objective=self.study.second_objective,
            uncertainty=() if is_tuning(candidate) else self.study.uncertainty,
            validate_every=self.study.validate_every,
            store=self.prepared.uri,
            store_fingerprint=self.prepared.fingerprint,
            folder=self.ledger.fit_folder(candidate, split, repeat),
            threads=self.resources.cpus_per_fit,
            checkpoint_every_s=self.resources.checkpoint_every_s,
            time_limit_s=self.resources.time_limit_s,
            attempt=attempt,
        )

    def recipe_of(self, candidate: str) -> Recipe:
        """The recipe that the ledger has of a candidate."""
        return Recipe.model_validate(self.ledger.candidates()[candidate].recipe)

    def model_of(self, candidate: str) -> Model:
        """A candidate's network, without trained weights, on `device`."""
        store = self.prepared.store
        return Model(self.recipe_of(candidate), store.channels, len(store.classes), store.size).on(self.device)

    def fit_folder(self, result: FitResult) -> Path:
        """The folder of a fit in the copy of the run folder."""
        return self.copy.folder / "fits" / result.key

    def weights_of(self, result: FitResult) -> Path:
        """The weights of a finished fit. Raises Damaged if they are gone or not as they were."""
        return vouched(result, weights_path(self.fit_folder(result)))
