"""Where a run came from: everything that somebody needs to repeat it, and everything that was left out of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softseg_dist.report.run_folder import RunData
from softseg_dist.report.tables import Summary

RECORDED = {  # fields of run.json
    "study_file": "study file",
    "study_fingerprint": "fingerprint of the study",
    "store_fingerprint": "fingerprint of the data (images, masks and preprocessing)",
    "store_digest": "digest of the prepared numbers",
    "started": "last started (UTC)",
}
SAID = {"data": "data", "preprocess": "preprocessing", "splits": "splits", "objective": "objective", "search": "search"}


def origin_of(run: RunData) -> list[tuple[str, str]]:
    """What was run on what, as (what, value); what a run did not record is left out."""
    found = [(words, str(run.run[field])) for field, words in RECORDED.items() if run.run.get(field)]
    found.append(
        ("seed", f"{run.study.get('seed', 0)}; all randomness of a fit follows from it, the study's name and the split")
    )
    found += [(words, _written(run.study[field])) for field, words in SAID.items() if run.study.get(field)]
    return found


def left_out(summary: Summary) -> list[tuple[str, int, int]]:
    """What is in no mean, as (what, how many, of how many); the first two lines are there even if they are 0."""
    training, ranking = summary.training, summary.ranking
    planned = summary.num_planned
    surfaces = summary.measures.surfaces.values()
    found = [
        ("fits that failed", sum(t.failed for t in training), planned),
        ("undefined values of the objective", sum(s.undefined for s in ranking), sum(s.values for s in ranking)),
        ("fits not run yet", sum(t.missing for t in training), planned),
        ("fits saved by giving up candidates", raced := sum(t.raced for t in training), planned + raced),
        ("candidates without a score", sum(s.rank is None for s in ranking), len(ranking)),
        ("values without a surface to measure", sum(s.undefined for s in surfaces), sum(s.values for s in surfaces)),
        ("subjects in no test set", summary.num_subjects - summary.num_tested, summary.num_subjects),
    ]
    return [line for i, line in enumerate(found) if i < 2 or line[1]]


def _written(value: Any) -> str:
    """`MonteCarlo(count=6, test=0.2)`: the JSON of an object as it was written."""
    if isinstance(value, Mapping):
        fields = {k: v for k, v in value.items() if k not in ("type", "code") and v is not None}
        inner = ", ".join(f"{k}={_written(v)}" for k, v in fields.items())
        return f"{value['type']}({inner})" if "type" in value else f"{{{inner}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_written, value))})"
    return str(value)
