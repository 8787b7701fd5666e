"""Run studies and use their results from Python: what a notebook or a script calls. The command line calls the same functions.

    import softseg_dist
    run = softseg_dist.run("study.py", data_root="data", local=True)    # or load("runs/study"), or load("s3://lab/runs/study")
    print(run.answer); run.ranking; run.tests; run.results; run.fits    # pandas tables, see `Run`
    soft = run.model().predict(image)                                   # a nibabel image on the image's own grid

Ray, MLflow and Optuna are imported by `run` alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from softseg_dist.data.cases import DataSet
from softseg_dist.data.splits import GivenSplits, Splits
from softseg_dist.errors import UserError
from softseg_dist.interrupts import interruptible
from softseg_dist.judging.results import SCHEMA
from softseg_dist.prediction import Predictor, load_model
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.report.findings import answer
from softseg_dist.report.held_out import outer_answer, outer_table
from softseg_dist.report.run_folder import OuterData, RunData, load_outer, load_run
from softseg_dist.report.tables import Summary, summarise
from softseg_dist.study import Study
from softseg_dist.study_file import StudyFile, load_study

if TYPE_CHECKING:  # what imports Ray, MLflow or Optuna
    from softseg_dist.assessment import EvaluateOptions
    from softseg_dist.engine.progress import Progress
    from softseg_dist.engine.session import Outcome
    from softseg_dist.nested import Nested
    from softseg_dist.pipeline import Finished, RunOptions

__all__ = ["Predictor", "Run", "evaluate", "load", "load_model", "run", "run_file"]

# The columns of `judging.results`, which says what they mean; a split is -1 where several fits together were measured.
RESULTS: Final = {field.name: {"int32": "int32", "double": "float64"}.get(str(field.type), "category") for field in SCHEMA}
RANKING: Final = {
    "rank": "Int64",  # from 1; missing without a score
    "candidate": "string",
    "proposed": "bool",  # by a search
    "chosen_by": "float64",  # the objective on validation, which ranks; on test in a run without scores on validation
    **dict.fromkeys(("mean", "low", "high"), "float64"),  # the objective on test, and its 95 % interval
    "sd": "float64",  # of the means of the splits
    **dict.fromkeys(("num_subjects", "num_splits", "num_scores"), "int64"),  # a score is that of a subject in a split
    "num_undefined": "int64",  # values of the objective that do not exist
    **dict.fromkeys(("volume_error", "volume_error_abs", "brier", "ece"), "float64"),
    **dict.fromkeys(("dice_at_fixed", "dice_at_grid", "dice_at_dice_optimal"), "float64"),
    **dict.fromkeys(("threshold_fixed", "threshold_grid", "threshold_dice_optimal"), "float64"),  # means over fits
}
TESTS: Final = {
    **dict.fromkeys(("candidate", "reference"), "string"),
    **dict.fromkeys(("difference", "low", "high"), "float64"),  # candidate minus reference, and its 95 % interval
    **dict.fromkeys(("p", "p_holm", "df"), "float64"),  # of the crossed test
    **dict.fromkeys(("p_wilcoxon", "p_corrected"), "float64"),  # over splits: Wilcoxon, corrected resampled t-test
    **dict.fromkeys(("bootstrap_low", "bootstrap_high"), "float64"),
    **dict.fromkeys(("num_subjects", "num_splits", "num_pairs"), "int64"),
    "note": "string",
}
FITS: Final = {  # see `FitResult`
    "candidate": "string",
    **dict.fromkeys(("split", "repeat"), "int64"),
    **dict.fromkeys(("state", "reason"), "string"),
    **dict.fromkeys(("score", "test_score", "dead_share", "duration_s", "peak_memory_mb"), "float64"),
    **dict.fromkeys(("epochs", "attempt", "num_workers"), "int64"),
    **dict.fromkeys(("best_epoch", "resumed_epoch", "parameters"), "Int64"),
    "converged": "boolean",
    **dict.fromkeys(("precision", "engine"), "string"),
}


def run(
    study: str | Path | Study,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    *,
    local: bool = False,
    debug: bool = False,
    options: RunOptions | None = None,
) -> Run:
    """Run a study or continue it: prepare data, train every candidate on every split, write the report.

    Progress is printed as plain lines, on a terminal as a table. An interrupt (Ctrl-C, "stop" of a notebook) lets running fits
    write their checkpoints; the same call continues the study.

    Args:
        study: path of a study file, or a `Study`. Its own classes and functions must lie in files, not in notebook cells.
        data_root: folder that holds the study's data set.
        out: folder for runs, or its URI; the run folder is OUT/<study name>. None: "runs".
        local: run in this process, one fit at a time, without Ray; breakpoints work.
        debug: 2 splits, 2 epochs, few subjects and no final model, as a test under the name <study name>-debug; in this
            process, unless `options` ask for Ray.
        options: further settings, such as `RunOptions(stores=..., address=...)`; the arguments above come before its fields.

    Raises UserError on bad input, a changed study, or a run folder in use; finished fits stay as they are.
    """
    from softseg_dist.engine.progress import progress_for
    from softseg_dist.pipeline import RunOptions

    given: dict[str, Any] = {} if data_root is None else {"data_root": Path(data_root)}
    given |= {} if out is None else {"out": out}
    given |= {"local": True} if local else {}
    given |= {"debug": True, "final_model": False} if debug else {}
    chosen = replace(options or RunOptions(command="softseg_dist.run"), **given)
    ended = run_file(open_study(study, debug), chosen, lambda: progress_for(sys.stdout, live=not chosen.in_process))
    return Run(ended.folder, ended.outcome)


def open_study(study: str | Path | Study, debug: bool = False) -> StudyFile:
    """A study with its source; with `debug`, cut to what runs in a minute. Raises UserError if it cannot be loaded."""
    loaded = StudyFile.of(study) if isinstance(study, Study) else load_study(study)
    return replace(loaded, study=loaded.study.debug()) if debug else loaded


def run_file(file: StudyFile, options: RunOptions, progress: Callable[[], Progress]) -> Finished | Nested:
    """Run a loaded study, nested or not; `progress` makes a display for each search.

    Raises KeyboardInterrupt if SIGINT, SIGTERM or SIGHUP comes before the run folder is open.
    """
    from softseg_dist.nested import run_nested
    from softseg_dist.pipeline import run_study

    with interruptible():
        return run_study(file, options, progress()) if file.study.nested is None else run_nested(file, options, progress)


def evaluate(
    predictions: Mapping[str, str | Path],
    data: DataSet | Study | str | Path,
    data_root: str | Path | None = None,
    out: str | Path = "runs",
    *,
    splits: str | Path | Splits | None = None,
    options: EvaluateOptions | None = None,
) -> Run:
    """Judge predictions that exist already, each on the grid of its image, and write the report of a run folder, OUT/<name>.

    Args:
        predictions: name of a candidate -> a folder of its maps or masks, or a run folder (its winner) or fits/<candidate> in one.
        data: the data set; or a study, or the path of a study file, which says the objective and the control too.
        data_root: folder that holds the data set.
        out: folder for runs, on this machine.
        splits: a file of splits or a rule, whose test sets the predictions are of: then subjects and splits are crossed.
        options: further settings, such as `EvaluateOptions(control="nnunet")`.

    Raises UserError with a line for everything that is missing, stands twice or is no prediction; what has been judged is kept.
    """
    from softseg_dist.assessment import Assessment, EvaluateOptions, assess

    if "://" in str(out):
        raise UserError(f"predictions are judged into a folder of this machine, got {out}; give another --out")
    given = open_study(data).study if isinstance(data, str | Path | Study) else data
    rule = GivenSplits(splits).bound(Path()) if isinstance(splits, str | Path) else splits
    places, root = {name: str(place) for name, place in predictions.items()}, None if data_root is None else Path(data_root)
    asked = Assessment.of(given, places, root, rule, options or EvaluateOptions())
    judged = Run(str(assess(asked, Path(out), lambda line: print(line, file=sys.stderr))))
    judged.report()
    return judged


def load(folder: str | Path) -> Run:
    """The run in a folder or at a URI, finished or not; reads files only, and executes no code of the run.

    Raises UserError if it is not a run folder, a file in it cannot be read, or no fit has finished yet.
    """
    loaded = Run(WorkingCopy(folder).place.uri)
    _ = loaded._outer or loaded._data
    return loaded


@dataclass(frozen=True)
class Run:
    """A run folder. `outcome` counts fits by how they stand after `run`; it is None after `load`.

    The tables are pandas data frames whose columns and types are those of `RESULTS`, `RANKING`, `TESTS` and `FITS` in
    `softseg_dist.api`. They are read once: use `load` again while a run goes on. Of a nested study there are `results` (on
    outer test subjects), `answer` and `report()`; each outer split is a run of its own, in outer/000 and so on.
    """

    folder: str
    outcome: Outcome | None = None

    @property
    def results(self) -> pd.DataFrame:
        """Everything measured on test subjects: a row per candidate, split, case, class, reference, threshold and metric."""
        return _typed((self._outer or self._data).results, RESULTS)

    @property
    def ranking(self) -> pd.DataFrame:
        """A row per candidate, the highest ranked (on validation) first: the objective on test, and metrics beside it."""
        rows = []
        for s in self._summary.ranking:
            names = {"candidate": s.name, "num_undefined": s.undefined}
            rules = {f"dice_at_{rule}": dice for rule, dice in s.dice.items()}
            rules |= {f"threshold_{rule}": threshold for rule, threshold in s.thresholds.items()}
            rows.append(vars(s) | names | s.beside | rules)
        return _frame(rows, RANKING)

    @property
    def tests(self) -> pd.DataFrame:
        """A row per candidate that is compared with the reference (the control, or else the highest ranked), highest first."""
        rows = []
        for c in self._summary.comparisons:
            beside = {"p_wilcoxon": c.wilcoxon.p, "p_corrected": c.corrected.p}
            beside |= dict(zip(("bootstrap_low", "bootstrap_high"), c.bootstrap, strict=True))
            rows.append(vars(c) | vars(c.crossed) | {"difference": c.crossed.mean} | beside)
        return _frame(rows, TESTS)

    @property
    def fits(self) -> pd.DataFrame:
        """A row per fit that has ended, with or without a score. Those of `tune_each` are left out."""
        return _frame(({name: getattr(fit, name) for name in FITS} for fit in self._data.fits), FITS)

    @property
    def answer(self) -> str:
        """The finding in words, as on the first lines of the report."""
        return answer(self._summary) if self._outer is None else outer_answer(outer_table(self._outer))

    def report(self) -> Path:
        """Write the report again; returns the path of its page, which is on this machine."""
        from softseg_dist.pipeline import report_run

        return report_run(self.folder)

    def model(self, candidate: str | None = None, *, trust: bool = False) -> Predictor:
        """The model of the winner, or of another `candidate` that `softseg refit` has trained; see `load_model`."""
        copy = WorkingCopy(self.folder)
        copy.pull("model/*", f"model-{candidate}/*")
        return load_model(copy.folder, candidate, trust=trust)

    @cached_property
    def _copy(self) -> Path:
        from softseg_dist.pipeline import pulled

        return pulled(self.folder).folder

    @cached_property
    def _data(self) -> RunData:
        return load_run(self._copy)

    @cached_property
    def _outer(self) -> OuterData | None:
        return load_outer(self._copy)

    @cached_property
    def _summary(self) -> Summary:
        return summarise(self._data)


def _frame(rows: Iterable[Mapping[str, Any]], schema: Mapping[str, str]) -> pd.DataFrame:
    cells = [{name: row.get(name) for name in schema} for row in rows]
    return _typed(pd.DataFrame(cells, columns=list(schema)), schema)


def _typed(frame: pd.DataFrame, schema: Mapping[str, str]) -> pd.DataFrame:
    """The columns of `schema`, in its order and types, numbered from 0."""
    return frame[list(schema)].astype(dict(schema)).reset_index(drop=True)
