"""How much of a fit's time goes into looking at its epochs, and into judging the one that it keeps?

Run:     SOFTSEG_TEST_DATA=DATA python tests/benchmarks/bench_shares.py    (without the data: the quickstart only)
Targets: judging is less than a fifth of the quickstart's fits; validation less than a tenth of a fit of s003
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from record import Headline, record

from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.study_file import load_study
from softseg_dist.training import fit as training
from softseg_dist.training.task import FitTask

STUDIES = Path(__file__).parents[2] / "studies"
QUICKSTART, HIPPOCAMPUS = "s001_quickstart", "s003_hippocampus"
HEADLINES = (
    Headline(
        key=f"{QUICKSTART}_judging",
        what="judging of the kept epoch, of the time of a fit of the quickstart: all candidates in one split",
        at_most=0.2,
    ),
    Headline(key=f"{HIPPOCAMPUS}_validation", what="validation of epochs, of the time of a fit of s003 (soft)", at_most=0.1),
    Headline(key=f"{HIPPOCAMPUS}_judging", what="judging of the kept epoch, of the time of that fit"),
)


def main() -> None:
    """Train, and print a table."""
    root = os.environ.get("SOFTSEG_TEST_DATA")
    figures = shares(QUICKSTART, None, None)
    if root is None:
        print("s003 is left out: SOFTSEG_TEST_DATA names no folder that has hippocampus_msd")
    else:
        figures |= shares(HIPPOCAMPUS, ("soft",), Path(root))
    record("shares", figures, HEADLINES)


def shares(name: str, chosen: Sequence[str] | None, root: Path | None) -> dict[str, float]:
    """The shares of validation and judging in the time of the fits of one split, one after another in this process."""
    study = load_study(STUDIES / f"{name}.py").study
    cases = study.data.cases(root)
    splits = study.make_splits({case.subject: case.site for case in cases})
    spent = {"validation_score": 0.0, "evaluate": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(Path(folder), cases, study.data, study.preprocess)
        tasks = [
            FitTask(
                study=study.name, seed=study.seed, candidate=candidate, split=splits[0], objective=study.objective,
                recipe=study.candidates[candidate], folder=str(Path(folder) / candidate),
                store=str(store), store_fingerprint=fingerprint(cases, study.data, study.preprocess),
            )
            for candidate in chosen or study.candidates
        ]  # fmt: skip
        started = time.monotonic()
        with timed("validation_score", spent), timed("evaluate", spent):
            for task in tasks:
                assert training.fit(task).state == "finished"
        total_s = time.monotonic() - started
    validation, judging = (spent[part] / total_s for part in spent)
    print(f"{name}: {len(tasks)} fits of {total_s / len(tasks):.1f} s; validation {validation:.3f}, judging {judging:.3f} of it")
    return {f"{name}_validation": validation, f"{name}_judging": judging}


@contextmanager
def timed(name: str, spent: dict[str, float]) -> Iterator[None]:
    """Count what a fit spends in the function `name` that it calls."""
    function: Callable[..., Any] = getattr(training, name)

    def wrapped(*arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return function(*arguments)
        finally:
            spent[name] += time.monotonic() - started

    with mock.patch.object(training, name, wrapped):
        yield


if __name__ == "__main__":
    main()
