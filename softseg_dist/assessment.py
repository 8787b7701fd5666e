"""Predictions that exist already, judged as a study judges its own: folders of maps and finished runs as candidates of one run.

Every map is judged on the grid of its image, against what each rater drew. The rows of a case are a file that is named by all they
follow from, so that the same call goes on where it ended. Without given splits a candidate is the models that it comes from. Of
several fits that predict a case, in splits or repeats, it has the mean of what all of them measure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import softseg_dist
from softseg_dist.data.cases import Case, DataSet
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.data.prediction_files import Values, find_predictions, label_values, read_maps
from softseg_dist.data.processes import over_processes
from softseg_dist.data.source_files import sha256_of
from softseg_dist.data.splits import Split, Splits
from softseg_dist.errors import UserError
from softseg_dist.frozen import canonical_json, digest
from softseg_dist.judging.judge import Yardstick, judge
from softseg_dist.judging.results import Head, merge_tables, write_frame, write_rows
from softseg_dist.judging.thresholds import CURVE, FIXED
from softseg_dist.numerics.metrics import TABLE, Metric, row_of
from softseg_dist.pipeline import facts_of, provenance, pulled
from softseg_dist.places import make_folder, without_credentials
from softseg_dist.record.ledger import CandidateRecord, Ledger, json_of
from softseg_dist.report.run_folder import RunData, load_run
from softseg_dist.report.scores import soft_scores, split_means
from softseg_dist.report.tables import summarise
from softseg_dist.sealed import is_intact
from softseg_dist.study import Study, check_name
from softseg_dist.training.task import FitResult
from softseg_dist.words import listed

EVALUATION = "Evaluation"  # the type in study.json
FOLD = re.compile(r"fold_(\d+)|(\d{3})")  # the folder of a split: nnU-Net's, or ours
KEPT = ["study", "candidate", "split", "subset", "grid", "subject", "case", "class", "reference", "threshold", "metric"]
Key = tuple[int, str]  # split, case
Files = list[tuple[Path, ...]]  # of each map of a case: one for all classes, or one per class
Unit = tuple[Head, tuple[Path, ...]]  # a map that is judged: what its rows are about, and its files
Note = Callable[[str], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """How predictions are judged.

    Args:
        name: of the run folder; None: that of the study and "-evaluation".
        control: the candidate that all others are compared with; None: the study's, if it is one of them.
        pattern: names of files, see `find_predictions`.
        common: compare the cases that all candidates have; otherwise a case that one of them lacks is refused.
        command: how it was called, for the record.
    """

    name: str | None = None
    control: str | None = None
    pattern: str = ""
    common: bool = False
    command: str = "softseg_dist.evaluate"


@dataclass(frozen=True)
class Assessment:
    """What is judged: `candidates` maps names to folders or runs, `cases` are all of the data set, `splits` those that were given.

    `study` is what study.json says, `metrics` are the objectives that the study has of its own.
    """

    study: Mapping[str, Any]
    data: DataSet
    candidates: Mapping[str, str]
    cases: tuple[Case, ...]
    splits: tuple[Split, ...]
    metrics: tuple[Metric, ...]
    options: EvaluateOptions

    @classmethod
    def of(
        cls, data: DataSet | Study, places: Mapping[str, str], root: Path | None, splits: Splits | None, options: EvaluateOptions
    ) -> Assessment:
        """Scan the data set. Raises UserError if a name is not valid, and with a line for everything that a case lacks."""
        study, source = (data, data.data) if isinstance(data, Study) else (None, data)
        places = {name: without_credentials(place) for name, place in places.items()}
        fields = json_of(study) if study else {"objective": Study.model_fields["objective"].default, "seed": 0}
        name = options.name or (f"{study.name}-evaluation" if study else "evaluation")
        control = options.control or (study.control if study and study.control in places else None)
        for folder in (name, *places):
            check_name(folder)
        if not places or (control and control not in places):
            raise UserError(f"the control {control} is not a candidate; there are {listed(list(places)) or 'none'}")
        scanned = study.kept(source.scan(root)) if study else source.scan(root)
        cases = tuple(sorted(scanned, key=lambda case: case.name))
        _refuse(line for case in cases for line in case.missing())
        sites, persons = {case.subject: case.site for case in cases}, {case.name: case.subject for case in cases}
        described = {
            "type": EVALUATION,
            "name": name,
            "question": study.question if study else f"How do {' and '.join(places)} compare?",
            "data": json_of(source),
            "objective": fields["objective"],
            "candidates": {candidate: {} for candidate in places},
            "predictions": {key: place if "://" in place else str(Path(place).absolute()) for key, place in places.items()},
            "control": control,
            "seed": fields["seed"],
        }
        given: tuple[Split, ...] = ()
        if splits and study:
            given = study.replace(splits=splits).make_splits(sites, persons)
        elif splits:
            given = splits.of_cases(sites, persons, fields["seed"])
        own = tuple(metric for metric in (study.objectives if study else ()) if metric.row.name not in TABLE)
        return cls(described, source, places, cases, given, own, options)


def _refuse(problems: Iterable[str]) -> None:
    if lines := list(dict.fromkeys(problems)):
        raise UserError("\n".join(lines))


def assess(asked: Assessment, out: Path, note: Note) -> Path:
    """Judge all candidates; returns the run folder, OUT/<name>, of which a report can be written.

    Raises UserError with a line for each file that is missing, twice there, on another grid or no prediction; rows are kept.
    """
    folder = out / asked.study["name"]
    make_folder(folder)
    ledger = Ledger(folder)
    with ledger.lock():
        if (ledger.read("study.json") or {"type": EVALUATION}).get("type") != EVALUATION:
            raise UserError(f"{folder}: holds the run of a study; give another --name or --out")
        runs = {name: run for name, place in asked.candidates.items() if (run := _run_of(place))}
        files = {name: _files_of(name, asked, note) for name in asked.candidates if name not in runs}
        volumes = list(over_processes(_volumes_of, asked.cases))
        _refuse(problem for problem in volumes if isinstance(problem, str))
        means = np.mean([of_case for of_case in volumes if not isinstance(of_case, str)], axis=0)
        yardstick = Yardstick(asked.data.classes, tuple(means.tolist()), asked.metrics)
        tables = {name: _rows_of_run(name, *run, asked, yardstick) for name, run in runs.items()}
        seen = {name: set(zip(rows["split"].astype(int), rows["case"].astype(str), strict=True)) for name, rows in tables.items()}
        wanted = _wanted(asked, {name: set(of) for name, of in (files | seen).items()}, note)
        judged = _judge(asked, files, wanted, yardstick, folder)
        for stale in folder.glob("fits/*/*.json"):
            stale.unlink()
        merge_tables(judged, folder / "results.parquet")
        rows = pd.concat([pd.read_parquet(folder / "results.parquet"), *tables.values()], ignore_index=True)
        _write(asked, wanted, yardstick, rows, ledger)
    return folder


def _files_of(name: str, asked: Assessment, note: Note) -> dict[Key, Files]:
    """The files of each case in each split, or in split 0 without given ones. Raises UserError with a line for each problem."""
    folder, files, problems = Path(asked.candidates[name]), defaultdict[Key, Files](list), list[str]()
    inside = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}
    named = {int(match[1] or match[2]): path for name, path in inside.items() if (match := FOLD.fullmatch(name))}
    folds = named if inside.keys().isdisjoint(case.name for case in asked.cases) else {}  # with a pattern folders may be of cases
    for fold, path in (folds or {-1: folder}).items():
        validation = path / "validation"  # where the training of nnU-Net leaves the maps of a fold
        place = validation if validation.is_dir() else path
        found = find_predictions(place, asked.cases, asked.data.classes, asked.options.pattern)
        problems += [f"{name}: {problem}" for problem in found.problems]
        surplus = [*found.surplus]
        for case in (case for case in asked.cases if case.name in found.files):
            tested = [split.index for split in asked.splits if case.subject in split.test and fold in (-1, split.index)]
            if len(tested) > 1:
                problems.append(f"{name}: {case.name} is tested in {len(tested)} splits: each has its own folder, fold_0 and on")
            elif asked.splits and not tested:
                surplus += found.files[case.name]
            else:
                files[tested[0] if tested else 0, case.name].append(found.files[case.name])
        for extra in surplus:
            note(f"{name}: {extra} is of no case that is tested; it is left out")
    _refuse(problems)
    return dict(files)


def _volumes_of(case: Case) -> tuple[float, ...] | str:
    try:
        return OwnMasks.of(case.load()).mean_volumes_mm3
    except UserError as error:
        return str(error)


def _run_of(place: str) -> tuple[RunData, str] | None:
    """The run in a folder and its winner, or the candidate if the folder is runs/<study>/fits/<candidate>; None if it is no run."""
    of_candidate = (Path(place) / "candidate.json").is_file()
    if not (of_candidate or "://" in place or (Path(place) / "study.json").is_file()):
        return None
    run = load_run(pulled(Path(place).absolute().parents[1] if of_candidate else place).folder)
    return run, Path(place).name if of_candidate else summarise(run).winner.name


def _rows_of_run(name: str, run: RunData, candidate: str, asked: Assessment, yardstick: Yardstick) -> pd.DataFrame:
    """The rows of a candidate on the grids of the files, of all its fits; without given splits they are in split 0.

    Raises UserError unless cases, classes, mean volumes and given splits are the same.
    """
    place, info, rows = asked.candidates[name], run.run.get("data") or {}, run.results
    rows = rows[(rows["candidate"] == candidate) & (rows["grid"] == "own")].assign(candidate=name, study=asked.study["name"])
    ours = dict(zip(yardstick.classes, yardstick.mean_volumes_mm3, strict=True))
    theirs = dict(zip(info.get("classes") or (), info.get("mean_volumes_mm3") or (), strict=False))
    if rows.empty or list(theirs) != list(ours) or not np.allclose(list(theirs.values()), list(ours.values()), rtol=1e-6, atol=0):
        of = [", ".join(f"{label} {volume:.6g} mm3" for label, volume in each.items()) or "not recorded" for each in (ours, theirs)]
        raise UserError(f"{name}: a run is compared if it was judged by the same masks: mean volumes {of[0]}, in {place} {of[1]}")
    known = {(case.name, case.subject) for case in asked.cases}
    if others := sorted(set(zip(rows["case"].astype(str), rows["subject"].astype(str), strict=True)) - known):
        raise UserError(f"{name}: {place} has other cases than the data set: {listed([case for case, _ in others])}")
    if asked.splits:
        tests = {split.index: set(split.test) for split in run.splits}
        if differing := [split.name for split in asked.splits if tests.get(split.index) != set(split.test)]:
            raise UserError(f"{name}: the test sets of {place} are not those of --splits in split {listed(differing)}")
    else:
        rows = rows.assign(split=0)
    at_all = rows["threshold"].isna() | (rows["threshold"] == FIXED) | rows["metric"].astype(str).str.startswith("reliability")
    at_all |= (rows["metric"] == "dice") & rows["threshold"].isin(CURVE)  # other thresholds are those of one fit
    return rows[at_all]


def _wanted(asked: Assessment, have: Mapping[str, set[Key]], note: Note) -> set[Key]:
    """What is compared. Raises UserError with a line for every case that a candidate lacks, unless `common` is asked for."""
    tested = {(split.index, case.name) for split in asked.splits for case in asked.cases if case.subject in split.test}
    wanted = tested or set[Key]().union(*have.values())
    common = wanted.intersection(*have.values())
    if asked.options.common:
        wanted = common
    lacking = [(name, *key) for name, keys in have.items() for key in sorted(wanted - keys)]
    if lacking and common:
        note(f"--common compares the {len({case for _, case in common})} cases that all candidates have")
    in_split = " in split {}" if asked.splits else ""
    _refuse(f"{name}: no prediction of {case}{in_split.format(at)} in {asked.candidates[name]}" for name, at, case in lacking)
    if not wanted:
        raise UserError(f"no file is of a case of the data set: {listed([case.name for case in asked.cases])}; see --pattern")
    if left := sorted({case.name for case in asked.cases} - {case for _, case in wanted}):
        note(f"{len(left)} of {len(asked.cases)} cases are not compared: {listed(left)}")
    return wanted


def _judge(
    asked: Assessment, files: Mapping[str, Mapping[Key, Files]], wanted: set[Key], yardstick: Yardstick, folder: Path
) -> list[Path]:
    """The files of rows. Raises UserError with a line for every file that is no prediction, at the end."""
    units = defaultdict[str, list[Unit]](list)
    subject_of = {case.name: case.subject for case in asked.cases}
    for name, of in files.items():
        for split, case in sorted(wanted):
            head = Head(asked.study["name"], name, split, 0, "test", "own", subject_of[case], case)
            units[case] += [(head, paths) for paths in of[split, case]]
    judged = partial(_judge_case, yardstick, label_values(asked.data.classes, asked.cases), folder)
    tasks = [(case, units[case.name]) for case in asked.cases if case.name in units]
    done = list(chain(*over_processes(judged, tasks)))
    _refuse(problem for problem in done if isinstance(problem, str))
    return [rows for rows in done if isinstance(rows, Path)]


def _judge_case(yardstick: Yardstick, values: Values, folder: Path, task: tuple[Case, Sequence[Unit]]) -> list[Path | str]:
    """For every map of a case the file of its rows, or what is wrong with it."""
    (case, units), done, data = task, list[Path | str](), None
    own_code = [metric.fingerprint for metric in yardstick.metrics]
    origin = [*case.sources(), case.subject, case.rater_names, str(yardstick), *own_code, str(values), str(softseg_dist.NUMERICS)]
    for head, files in units:
        try:
            read = [sha256_of(path) for path in files]
            name = digest(canonical_json([origin, read]))
            rows = folder / "fits" / head.candidate / f"{head.split:03d}" / "judged" / f"{case.name}-{name}.parquet"
            if not is_intact(rows, name):
                data = data or case.load()
                measured = judge(read_maps(files, data.geometry, values), OwnMasks.of(data), case.rater_names, yardstick, (FIXED,))
                if read != [sha256_of(path) for path in files]:
                    raise UserError(f"{listed(files)} changed while it was read; run again when it stays as it is")
                rows.parent.mkdir(parents=True, exist_ok=True)
                write_rows(head.rows(measured), rows, name)
            done.append(rows)
        except UserError as error:
            done.append(f"{head.candidate}: {error}")
    return done


def _write(asked: Assessment, wanted: set[Key], yardstick: Yardstick, rows: pd.DataFrame, ledger: Ledger) -> None:
    """Everything that a report reads; `rows` are those of all maps and fits."""
    folder, subject_of = ledger.working, {case.name: case.subject for case in asked.cases}
    splits = asked.splits or (Split(index=0, test=tuple(sorted({subject_of[case] for _, case in wanted}))),)
    rows = rows[pd.MultiIndex.from_frame(rows[["split", "case"]]).isin(list(wanted))]
    rows = rows.groupby(KEPT, observed=True, dropna=False, sort=False)["value"].mean().reset_index().assign(repeat=0)
    write_frame(rows, folder / "results.parquet", ledger.seal_of("results.parquet"))
    scores = soft_scores(rows, row_of(asked.study["objective"]).name)
    for number, name in enumerate(asked.candidates):
        ledger.write_candidate(CandidateRecord(name=name, origin="fixed", number=number, recipe={}))
        for split, score in split_means(scores.of(name), scores.splits).items():
            result = FitResult(candidate=name, split=split, state="finished", thresholds={"fixed": FIXED}, test_score=score)
            ledger.write_result(result)
    data = facts_of(asked.cases, yardstick.classes, yardstick.mean_volumes_mm3)
    written = {"study.json": asked.study, "splits.json": [json_of(split) for split in splits]}
    for file, content in (written | {"run.json": provenance(asked.options.command) | {"data": data}}).items():
        ledger.write(file, content)
