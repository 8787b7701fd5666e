"""How a run stands, read from its folder alone: no lock, no Ray, and nothing that trains is imported, so it answers at once.

Whether a fit runs cannot be read from a folder; one that has written something lately seems to.
"""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rich.console import Console

from softseg_dist.errors import UserError
from softseg_dist.frozen import grouped
from softseg_dist.locks import holder
from softseg_dist.places import Place, working_folder
from softseg_dist.sealed import AGAIN, RESTORE, Damaged, key_of, read_json
from softseg_dist.words import duration, next_command

log = logging.getLogger(__name__)
SPOOL = "mlflow_spool.jsonl"  # in a run folder: records that MLflow has not got yet
SEEMS_TO_RUN_S = 300.0  # a fit that has written nothing for so long, and for 3 checkpoints, does not seem to run
READERS = 16  # files that are read at a time: an object store takes some 30 ms for each
Json = dict[str, Any]


@dataclass(frozen=True)
class CandidateStatus:
    """One candidate: its fits that ended with a score, those that failed, and the mean score on validation so far.

    `splits` are its fits, one per split and repeat, `left` those to run: none if it was `raced_out`, or failed and was proposed.
    """

    name: str
    finished: int
    failed: int
    splits: int
    mean: float | None
    left: int
    raced_out: bool = False


@dataclass(frozen=True)
class ActiveFit:
    """A fit that seems to run: the epochs that it has finished and when it last wrote something."""

    key: str
    epochs: int
    quiet_s: float


@dataclass(frozen=True)
class RunStatus:
    """`left` neither ended nor seem to run. `driver` is the process of this machine that holds the run folder's lock, or None."""

    run: str
    study: str
    objective: str
    planned: int
    finished: int
    failed: int
    left: int
    running: tuple[ActiveFit, ...]
    candidates: tuple[CandidateStatus, ...]
    quiet_s: float
    driver: str | None
    mlflow_waiting: int


def status_of(run: str) -> RunStatus:
    """Read a run folder, given as a path or URI. Raises UserError if it is not one."""
    place = Place.at(run)
    with ThreadPoolExecutor(READERS) as readers:
        files = place.walk()
        ended = {name for name in files if re.fullmatch(r"fits/[^/]+/\d+(-r\d+)?\.json", name)}
        known = {name for name in files if name.startswith("fits/") and name.endswith("/candidate.json")}
        raced = {name.split("/")[1] for name in files if name.startswith("fits/") and name.endswith("/race.json")}
        names, key = ["study.json", "splits.json", *sorted(known), *sorted(ended)], key_of(place)
        parts = [names[first::READERS] for first in range(READERS)]
        read = dict(chain(*readers.map(lambda part: [(name, _json(place, name, key, name in ended)) for name in part], parts)))
        study, splits = read["study.json"], read["splits.json"]
        if not isinstance(study, dict) or not isinstance(splits, list):
            raise UserError(f"{place}: not a run folder: it must hold study.json and splits.json; give runs/<study>")
        if study.get("nested"):
            raise UserError(f"{place}: a nested study has a run for every outer split; give {place}/outer/000 or another one")
        running = _running(place, files, ended, study, readers)
    records, objective = {record["name"]: record for record in map(read.get, known) if record}, study["objective"]
    proposed = [name for name, record in records.items() if record["origin"] == "proposed"]
    intact = filter(None, map(read.get, sorted(ended)))  # a damaged one runs again
    results = grouped((str(result["candidate"]), result) for result in intact)
    tried = sorted((record for record in records.values() if record["origin"] == "tuning"), key=lambda record: record["number"])
    tune_splits = min(len(splits), study["tune_each"]["splits"]) if tried else 0
    num_fits = len(splits) * study.get("repeats", 1)
    rates = {record["name"]: record["name"].rpartition("~")[0] in records for record in tried}  # whether one has been chosen
    candidates = (
        *(_candidate(name, results[name], num_fits, name in raced) for name in study["candidates"]),
        *(_candidate(name, results[name], tune_splits, final=True, over=chosen) for name, chosen in rates.items()),
        *(_candidate(name, results[name], num_fits, name in raced, final=True) for name in sorted(proposed)),
    )
    finished, failed = sum(c.finished for c in candidates), sum(c.failed for c in candidates)
    trials = (study.get("search") or {}).get("trials", 0)
    not_asked = max(0, trials - len(proposed)) * num_fits
    planned = not_asked + finished + failed + sum(c.left for c in candidates)
    last = max((written_s for name, written_s in files.items() if not name.startswith("report/")), default=0.0)
    here = working_folder(place)
    spooled = (Place.at(here) / SPOOL).read() or (place / SPOOL).read() or b""  # the driver leaves it in the run folder at its end
    return RunStatus(
        run=place.uri,
        study=study["name"],
        objective=objective if isinstance(objective, str) else objective["row"]["name"],
        planned=planned,
        finished=finished,
        failed=failed,
        left=max(0, planned - finished - failed - len(running)),
        running=running,
        candidates=candidates,
        quiet_s=max(0.0, time.time() - last),
        driver=holder(here / ".lock"),
        mlflow_waiting=spooled.count(b"\n"),
    )


def show(status: RunStatus, console: Console) -> None:
    """Print a status, with a line per candidate."""
    counts = f"{status.finished} of {status.planned} fits finished, {status.failed} failed"
    console.print(f"{status.study}: {counts}, {len(status.running)} running, {status.left} left")
    rows = [("candidate", "fits", f"mean {status.objective}"), *map(_row, status.candidates)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.print("  ".join(map(str.ljust, row, widths)).rstrip())
    for fit in status.running:
        console.print(f"running {fit.key}: {fit.epochs} epochs, wrote {duration(fit.quiet_s)} ago", style="dim")
    goes_on = ", the same command goes on" if status.left or status.running else ""
    driver = f"driver: {status.driver}" if status.driver is not None else f"no driver on this machine{goes_on}"
    console.print(f"last change {duration(status.quiet_s)} ago; {driver}")
    if status.mlflow_waiting and status.driver is None:
        console.print(f"{status.mlflow_waiting} records wait for MLflow: {next_command('sync', status.run)}")


def _row(candidate: CandidateStatus) -> tuple[str, str, str]:
    failed = f", {candidate.failed} failed" if candidate.failed else ""
    failed += ", raced out" if candidate.raced_out else ""
    mean = "" if candidate.mean is None else f"{candidate.mean:.4f}"
    return candidate.name, f"{candidate.finished + candidate.failed}/{candidate.splits}{failed}", mean


def _json(place: Place, name: str, key: str, runs_again: bool) -> Any:
    try:
        return read_json(place, name, key, AGAIN if runs_again else RESTORE)
    except Damaged as damage:
        if runs_again:
            log.warning("%s", damage)
            return None
        raise


def _candidate(
    name: str, mine: list[Json], splits: int, raced_out: bool = False, final: bool = False, over: bool = False
) -> CandidateStatus:
    """`final`: one failed fit ends the candidate. `over`: no fit of it is left to run."""
    known = [result["score"] for result in mine if result["score"] is not None]  # an evaluation has none on validation
    mean, failed = sum(known) / len(known) if known else None, sum(result["state"] != "finished" for result in mine)
    left = 0 if raced_out or over or (final and failed) else splits - len(mine)
    return CandidateStatus(name, len(mine) - failed, failed, splits, mean, left, raced_out)


def _running(place: Place, files: Mapping[str, float], ended: set[str], study: Json, readers: Executor) -> tuple[ActiveFit, ...]:
    written: defaultdict[str, float] = defaultdict(float)
    for name, written_s in files.items():
        folder = name.rpartition("/")[0]
        if re.fullmatch("fits/[^/]+/[^/]+", folder) and f"{folder}.json" not in ended and f"{folder}/result.json" not in files:
            key = folder.removeprefix("fits/")
            written[key] = max(written[key], written_s)
    quiet = {key: max(0.0, time.time() - at) for key, at in written.items()}
    limit_s = max(SEEMS_TO_RUN_S, 3 * study.get("resources", {}).get("checkpoint_every_s", 0.0))
    keys = sorted(key for key, seconds in quiet.items() if seconds < limit_s)
    histories = readers.map(lambda key: (place / "fits" / key / "history.jsonl").read() or b"", keys)
    return tuple(ActiveFit(key, rows.count(b"\n"), quiet[key]) for key, rows in zip(keys, histories, strict=True))
