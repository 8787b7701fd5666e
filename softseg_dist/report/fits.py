"""How the fits of a run went: epochs, convergence, failures, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.run_folder import RunData


@dataclass(frozen=True)
class Training:
    """How the fits of one candidate went. `dead_share` is a mean over fits, None if not recorded; `duration_s` a median."""

    name: str
    finished: int
    failed: int
    missing: int
    not_converged: int
    best_epoch: float
    epochs: float
    dead_share: float | None
    parameters: int | None
    duration_s: float


def training_of(run: RunData, name: str) -> Training:
    """How the fits of one candidate went."""
    fits = [fit for fit in run.fits if fit.candidate == name]
    finished = [fit for fit in fits if fit.state == "finished"]
    dead = [fit.dead_share for fit in finished if fit.dead_share is not None]
    return Training(
        name=name,
        finished=len(finished),
        failed=len(fits) - len(finished),
        missing=len(run.splits) - len(fits),
        not_converged=sum(fit.converged is False for fit in finished),
        best_epoch=_median([fit.best_epoch for fit in finished if fit.best_epoch is not None]),
        epochs=_median([fit.epochs for fit in finished]),
        dead_share=float(np.mean(dead)) if dead else None,
        parameters=next((fit.parameters for fit in finished if fit.parameters is not None), None),
        duration_s=_median([fit.duration_s for fit in finished]),
    )


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else NAN
