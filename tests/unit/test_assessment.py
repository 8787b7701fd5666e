"""Folders of predictions are judged as fits are: paired by subject or crossed with given splits, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from sealed_files import put, seal_of

from softseg_dist import (
    Bids,
    DataSet,
    EvaluateOptions,
    Files,
    GivenSplits,
    LabelledCase,
    MaskFile,
    Metric,
    MonteCarlo,
    Recipe,
    Scale,
    Study,
    UserError,
)
from softseg_dist.assessment import Assessment, assess
from softseg_dist.judging.results import write_frame
from softseg_dist.numerics.metrics import TABLE, Map, PerClass
from softseg_dist.record.ledger import Ledger
from softseg_dist.report.export import latex
from softseg_dist.report.findings import answer
from softseg_dist.report.run_folder import RunData, load_run
from softseg_dist.report.tables import summarise

AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])
SHAPE = (10, 9, 6)
CLASSES = {"head": "label-x_dseg:1", "tail": "label-x_dseg:2"}
DATA = Bids("set", image="T1w", labels=CLASSES)
SUBJECTS = [f"sub-{i:02d}" for i in range(6)]


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine), path)
    return path


def truth(number: int) -> np.ndarray:
    """The map of integers of a subject, as its file has it."""
    whole = np.zeros(SHAPE)
    whole[2:7, 2 : 6 + number % 2, 1:5] = 1
    whole[4 : 8 + number % 3, 3:7, 2:5] = 2
    return whole


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with the data set `set`: six subjects, two classes in one map."""
    for number, subject in enumerate(SUBJECTS):
        save(tmp_path / "set" / subject / "anat" / f"{subject}_T1w.nii.gz", np.arange(540).reshape(SHAPE))
        save(tmp_path / "set/derivatives/labels" / subject / "anat" / f"{subject}_label-x_dseg.nii.gz", truth(number))
    return tmp_path


def predict(folder: Path, change: Callable[[np.ndarray, int], np.ndarray], subjects: list[str] = SUBJECTS) -> Path:
    """A folder with a map of integers per subject: `change(truth, number of the subject)`."""
    for subject in subjects:
        number = SUBJECTS.index(subject)
        save(folder / f"{subject}.nii.gz", change(truth(number), number))
    return folder


def same(whole: np.ndarray, number: int) -> np.ndarray:
    return whole


def moved(whole: np.ndarray, number: int) -> np.ndarray:
    return np.roll(whole, 1 + number % 2, axis=0)


def judged(
    root: Path, candidates: dict[str, Path], splits: Path | None = None, data: DataSet = DATA, **options: object
) -> tuple[RunData, list[str]]:
    """The run folder of an evaluation, read, and what was noted."""
    notes: list[str] = []
    rule = GivenSplits(splits).bound(Path()) if splits else None
    named = {name: str(folder) for name, folder in candidates.items()}
    asked = Assessment.of(data, named, root, rule, EvaluateOptions(**options))  # type: ignore[arg-type]
    return load_run(assess(asked, root / "runs", notes.append)), notes


def folds(root: Path, tests: list[list[int]]) -> Path:
    """A file of splits with these test subjects, as nnU-Net writes it."""
    parts = [{"val": [SUBJECTS[i] for i in test], "train": [s for i, s in enumerate(SUBJECTS) if i not in test]} for test in tests]
    path = root / "splits_final.json"
    path.write_text(json.dumps(parts))
    return path


def test_maps_of_pictures_are_judged_on_their_grids_and_pictures_are_no_maps(tmp_path: Path) -> None:
    for number in range(3):
        drawn = np.zeros((9, 8), np.uint8)
        drawn[2:6, 3 : 5 + number] = 255
        for name, pixels in ((f"p{number}", drawn // 2), (f"p{number}_seg", drawn)):
            (tmp_path / "set").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / f"set/{name}.png")
        affine = np.diag([0.5, -0.5, 1, 1])
        save(tmp_path / f"maps/p{number}_label-x_softseg.nii.gz", drawn.T[..., None] / 255, affine)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(drawn).save(tmp_path / f"pictures/p{number}.png")
    data = Files("set", image="{case}.png", labels={"x": "{case}_seg.png"}, spacing_mm=(0.5, 0.5))
    rows = judged(tmp_path, {"itself": tmp_path / "maps"}, data=data)[0].results
    assert rows.loc[(rows["metric"] == "brier_skill_case") & (rows["reference"] == "mean"), "value"].tolist() == [1, 1, 1]
    with pytest.raises(UserError) as refused:
        judged(tmp_path, {"pictures": tmp_path / "pictures"}, data=data)
    assert str(refused.value).startswith("no file is of a case of the data set: p0, p1, p2")


def test_the_references_as_predictions_have_the_perfect_value_of_every_metric(root: Path) -> None:
    rows = judged(root, {"itself": predict(root / "p", same)})[0].results
    rows = rows[rows["reference"].isin(["mean", "raters"])]
    for name, row in TABLE.items():
        if row.perfect != "no":  # one hard rater
            values = rows.loc[(rows["metric"] == name) & (rows["threshold"].isna() | (rows["threshold"] == 0.5)), "value"]
            assert len(values) == 2 * len(SUBJECTS), name
            assert (values.dropna() == row.best).all(), name


def mean_dice(rows: pd.DataFrame) -> pd.Series:
    """By candidate and class."""
    dice = rows[(rows["metric"] == "dice") & (rows["reference"] == "mean") & (rows["threshold"] == 0.5)]
    return dice.groupby(["candidate", "class"], observed=True)["value"].mean()


def test_files_by_patterns_are_judged_as_bids_is_and_regions_by_the_values_that_they_name(root: Path) -> None:
    mask = "derivatives/labels/{subject}/anat/{subject}_label-x_dseg.nii.gz"
    labels = {"head": f"{mask}:1", "tail": f"{mask}:2"}
    data, folders = Files("set", image="{subject}/anat/{subject}_T1w.nii.gz", labels=labels), {"moved": predict(root / "q", moved)}
    expected, found = (judged(root, folders, data=each, name=type(each).__name__)[0].results for each in (DATA, data))
    pd.testing.assert_frame_equal(found.assign(study="x"), expected.assign(study="x"))
    regions = data.replace(labels={"both": f"{mask}:1+2", "tail": f"{mask}:2"})
    rows = judged(root, folders | {"itself": predict(root / "p", same)}, data=regions, name="regions")[0].results
    means = mean_dice(rows)
    assert means["itself"].tolist() == [1, 1]
    assert means["moved", "tail"] == mean_dice(expected)["moved", "tail"] < means["moved", "both"] < 1


class Overshoot(Metric):
    """The share of the prediction that lies outside of the reference."""

    short = "overshoot"
    higher_is_better = False

    def __call__(self, prediction: Map, reference: Map, scale: Scale) -> PerClass:
        space = (0, *range(2, prediction.ndim))
        return np.asarray((prediction * (1 - reference)).sum(axis=space) / np.maximum(prediction.sum(axis=space), 1e-9))


def test_a_metric_of_the_study_is_judged_and_tested(root: Path) -> None:
    study = Study(
        name="own", question="?", data=DATA, splits=MonteCarlo(count=2), objective=Overshoot(), candidates={"itself": Recipe()}
    )
    folders = {"itself": str(predict(root / "p", same)), "moved": str(predict(root / "q", moved))}
    asked = Assessment.of(study, folders, root, None, EvaluateOptions(control="itself"))
    run = load_run(assess(asked, root / "runs", print))
    rows = run.results[run.results["metric"] == "overshoot"]
    assert len(rows) == 2 * 2 * len(SUBJECTS)
    assert (rows.loc[rows["candidate"] == "itself", "value"] == 0).all()
    (comparison,) = summarise(run).comparisons
    assert comparison.crossed.mean > 0


def test_a_folder_that_is_compared_with_itself_is_equal_to_the_digit(root: Path) -> None:
    folder = predict(root / "p", moved)
    summary = summarise(judged(root, {"a": folder, "b": folder}, control="a")[0])
    (comparison,) = summary.comparisons
    assert comparison.crossed.mean == 0
    assert np.isnan(comparison.crossed.p)
    assert answer(summary).startswith("b and the control a have equal scores")


def test_one_map_per_subject_is_paired_by_subject_and_tested_over_subjects(root: Path) -> None:
    run = judged(root, {"itself": predict(root / "p", same), "moved": predict(root / "q", moved)}, control="itself")[0]
    summary = summarise(run)
    rows = run.results[(run.results["metric"] == "brier_skill") & (run.results["reference"] == "mean")]
    means = rows.groupby(["subject", "candidate"], observed=True)["value"].mean().unstack("candidate")
    expected = stats.ttest_1samp(means["moved"] - means["itself"], 0)
    (comparison,) = summary.comparisons
    assert comparison.crossed.p == pytest.approx(expected.pvalue)
    assert comparison.crossed.df == len(SUBJECTS) - 1
    assert any("these trained models" in note for note in comparison.crossed.remarks)
    assert summary.winner.low < summary.winner.mean or summary.winner.mean == 1
    table = latex(summary)
    assert table.count("t-test over subjects") == 2
    assert "crossed" not in table


def test_maps_of_several_folds_of_one_subject_are_averaged(root: Path) -> None:
    for fold, change in enumerate((same, moved)):
        predict(root / "p" / f"fold_{fold}" / "validation", change)
    alone = [judged(root, {"one": root / "p" / f"fold_{fold}"}, name=f"fold{fold}")[0].results for fold in (0, 1)]
    both = judged(root, {"one": root / "p"}, name="both")[0].results

    def of(rows: object, metric: str = "dice_dml") -> np.ndarray:
        table = rows[(rows["metric"] == metric) & (rows["reference"] == "mean")]  # type: ignore[index]
        return np.array(table.sort_values(["case", "class"])["value"])

    assert np.allclose(of(both), (of(alone[0]) + of(alone[1])) / 2, rtol=1e-12)
    assert (of(alone[0]) == 1).all()
    assert (of(alone[1]) < 1).all()


def test_lesions_that_some_of_the_fits_of_a_case_find_are_not_rounded_away(root: Path) -> None:
    predict(root / "p" / "fold_0", same)
    predict(root / "p" / "fold_1", lambda whole, number: whole * ((whole == 1) | (number > 0)))
    found = summarise(judged(root, {"p": root / "p"})[0]).measures.lesions["p"].sensitivity[""]
    assert (found.count, found.total, found.share) == (11.5, 12, 11.5 / 12)


def test_subjects_that_a_study_holds_out_are_in_none_of_the_given_splits(root: Path) -> None:
    study = Study(
        name="held", question="?", data=DATA, splits=MonteCarlo(count=2), holdout=(SUBJECTS[5],), candidates={"p": Recipe()}
    )
    path = folds(root, [[0, 1], [2, 3]])
    parts = [{part: [s for s in names if s != SUBJECTS[5]] for part, names in of.items()} for of in json.loads(path.read_text())]
    path.write_text(json.dumps(parts))
    folder = str(predict(root / "p", same))
    asked = Assessment.of(study, {"p": folder}, root, GivenSplits(path).bound(Path()), EvaluateOptions())
    run = load_run(assess(asked, root / "runs", print))
    assert sorted(run.results["case"].unique()) == SUBJECTS[:4]


def test_what_was_judged_before_a_case_had_another_person_is_judged_again(root: Path) -> None:
    place = {"p": str(predict(root / "p", same))}
    for data in (DATA, DATA.replace(person=r"sub-0(\d)")):
        run = load_run(assess(Assessment.of(data, place, root, None, EvaluateOptions()), root / "runs", print))
    assert sorted(run.results["subject"].unique()) == [str(i) for i in range(6)]


@pytest.mark.parametrize("per_split", [False, True])
def test_with_given_splits_subjects_and_splits_are_crossed(root: Path, per_split: bool) -> None:
    tests = [[0, 1], [2, 3], [4, 5]]
    for fold, test in enumerate(tests):
        predict(root / "p" / (f"fold_{fold}" if per_split else "."), moved, [SUBJECTS[i] for i in test])
    run = judged(root, {"p": root / "p", "itself": predict(root / "q", same)}, folds(root, tests), control="itself")[0]
    summary = summarise(run)
    assert summary.comparisons[0].crossed.num_splits == 3
    tested = run.results.groupby("split")["subject"].unique()
    assert [sorted(map(str, tested[split])) for split in range(3)] == [[SUBJECTS[i] for i in test] for test in tests]
    assert {fit.key for fit in run.fits} == {f"{name}/{split:03d}" for name in ("p", "itself") for split in range(3)}


def test_a_run_with_repeats_is_averaged_over_them(root: Path) -> None:
    tests = [[0, 1], [2, 3], [4, 5]]
    run = judged(root, {"p": predict(root / "p", moved)}, folds(root, tests), name="once")[0]
    again = run.results.assign(repeat=1, value=run.results["value"] + 0.5)
    write_frame(pd.concat([run.results, again]), run.folder / "results.parquet", seal_of(run.folder / "results.parquet"))
    for fit in run.fits:
        Ledger(run.folder).write_result(fit.replace(repeat=1))
    twice = judged(root, {"p": root / "p", "run": run.folder / "fits/p"}, folds(root, tests), control="p")[0]
    assert {fit.key for fit in twice.fits} == {f"{name}/{split:03d}" for name in ("p", "run") for split in range(3)}
    summary = summarise(twice)
    assert summary.comparisons[0].crossed.mean == pytest.approx(0.25)
    assert [fits.missing for fits in summary.training] == [0, 0]


def test_a_subject_in_several_test_sets_needs_a_folder_per_split(root: Path) -> None:
    tests = [[0, 1], [1, 2]]
    folder = predict(root / "p", same)
    with pytest.raises(UserError, match=r"p: sub-01 is tested in 2 splits: each has its own folder, fold_0 and on"):
        judged(root, {"p": folder}, folds(root, tests))
    for fold in (0, 1):
        predict(root / "q" / f"{fold:03d}", same)
    run, notes = judged(root, {"q": root / "q"}, folds(root, tests))
    assert len(run.results[["split", "case"]].drop_duplicates()) == 4
    assert f"q: {root}/q/000/sub-05.nii.gz is of no case that is tested; it is left out" in notes


def test_a_case_that_one_candidate_lacks_is_named_and_common_leaves_it_out(root: Path) -> None:
    candidates = {"p": predict(root / "p", same), "q": predict(root / "q", moved, SUBJECTS[:4])}
    with pytest.raises(UserError) as refused:
        judged(root, candidates)
    assert str(refused.value).splitlines() == [f"q: no prediction of {case} in {root}/q" for case in SUBJECTS[4:]]
    run, notes = judged(root, candidates, common=True)
    assert sorted(map(str, run.results["subject"].unique())) == SUBJECTS[:4]
    assert "2 of 6 cases are not compared: sub-04, sub-05" in notes
    assert run.run["data"]["mean_volumes_mm3"] == [np.mean([2 * (truth(i) == k).sum() for i in range(6)]) for k in (1, 2)]


class Numbered(DataSet):
    """Cases that are called 000, 001 and 002."""

    folder: str

    @property
    def classes(self) -> tuple[str, ...]:
        return ("head",)

    @property
    def rater_names(self) -> tuple[str, ...]:
        return ("rater",)

    def scan(self, data_root: Path | None) -> tuple[LabelledCase, ...]:
        images = sorted(Path(self.folder).glob("image_*.nii.gz"))
        return tuple(
            LabelledCase(f"{number:03d}", [path], f"{number:03d}", "", {"rater": {"head": MaskFile(path, (1,))}})
            for number, path in enumerate(images)
        )


def test_with_a_pattern_the_folder_of_a_case_is_not_that_of_a_split(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"image_{number}.nii.gz", truth(number))
        save(tmp_path / "p" / f"{number:03d}" / "seg.nii.gz", truth(number) == 1)
    save(tmp_path / "p/099/seg.nii.gz", truth(0))  # of no case: it is no split either
    asked = Assessment.of(
        Numbered(folder=str(tmp_path)), {"p": str(tmp_path / "p")}, None, None, EvaluateOptions(pattern="{case}/seg.nii.gz")
    )
    run = load_run(assess(asked, tmp_path / "runs", print))
    rows = run.results[(run.results["metric"] == "brier_skill") & (run.results["reference"] == "mean")]
    assert rows["value"].tolist() == [1.0, 1.0, 1.0]
    assert run.study["predictions"] == {"p": str(tmp_path / "p")}


def test_files_of_no_case_are_noted(root: Path) -> None:
    predict(root / "p", same)
    save(root / "p" / "sub-99.nii.gz", truth(0))
    assert f"p: {root}/p/sub-99.nii.gz is of no case that is tested; it is left out" in judged(root, {"p": root / "p"})[1]


def spoiled(root: Path, kind: str) -> str:
    """Spoil the file of sub-03 in the folder `bad`; returns what the message says."""
    folder = predict(root / "bad", moved)
    path, whole = folder / "sub-03.nii.gz", truth(3)
    if kind == "grid":
        save(path, whole[:-1])
        return "on the grid of its image: shape 9 x 9 x 6 against 10 x 9 x 6"
    if kind == "value":
        whole[0, 0, 0] = 7
        save(path, whole)
        return "got 7 in one of 1 other voxels"
    if kind == "nan":
        whole[0, 0, 0] = np.nan
        save(path, whole)
        return "finite numbers, got 1 NaN"
    if kind == "range":
        path.unlink()
        for label, high in (("head", 1.0), ("tail", 1.25)):
            save(folder / f"sub-03_label-{label}_softseg.nii.gz", high * (whole == 1))
        return "must lie in [0, 1], got 1.25"
    if kind == "two":
        save(folder / "sub-03_T1w.nii.gz", whole)
        return "case sub-03: one file, or one per class, got "
    path.unlink()
    save(folder / "sub-03_label-head_mask.nii.gz", whole == 1)
    return "case sub-03 has no file of class tail"


@pytest.mark.parametrize("kind", ["grid", "value", "nan", "range", "two", "class"])
def test_a_bad_file_is_a_line_with_candidate_rule_value_and_file_and_nothing_that_was_judged_is_lost(root: Path, kind: str) -> None:
    few, subjects = DATA.replace(exclude=tuple(SUBJECTS[:2] + SUBJECTS[5:])), SUBJECTS[2:5]
    good = predict(root / "good", same)
    message = spoiled(root, kind)
    with pytest.raises(UserError) as refused:
        judged(root, {"good": good, "bad": root / "bad"}, data=few)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("bad: ")
    assert message in line
    assert str(root / "bad") in line
    before = {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("judged/*.parquet")}
    assert len(before) == (0 if kind in ("two", "class") else 2 * len(subjects) - 1)  # these are seen before
    for path in (root / "bad").glob("sub-03*"):
        path.unlink()
    predict(root / "bad", moved)
    run = judged(root, {"good": good, "bad": root / "bad"}, data=few)[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run.results["case"].nunique() == len(subjects)


def test_a_class_in_no_file_is_one_line(root: Path) -> None:
    for number, subject in enumerate(SUBJECTS):
        save(root / "p" / f"{subject}_label-head_mask.nii.gz", truth(number) == 1)
    with pytest.raises(UserError, match=rf"^p: class tail is in no file of {root}/p; there are head$"):
        judged(root, {"p": root / "p"})


def test_what_cases_of_the_data_set_lack_is_a_line_for_each(root: Path) -> None:
    for subject in SUBJECTS[:2]:
        (root / "set/derivatives/labels" / subject / "anat" / f"{subject}_label-x_dseg.nii.gz").unlink()
    with pytest.raises(UserError) as refused:
        judged(root, {"p": predict(root / "p", same)})
    assert [line[:30] for line in str(refused.value).splitlines()] == [
        f"case {s} has no mask 'label"[:30] for s in SUBJECTS[:2] for _ in CLASSES
    ]


def test_another_call_with_other_candidates_replaces_them(root: Path) -> None:
    p, q = predict(root / "p", same), predict(root / "q", moved)
    judged(root, {"p": p, "q": q})
    run = judged(root, {"r": q})[0]
    assert [candidate.name for candidate in run.candidates] == ["r"]
    assert set(run.results["candidate"].unique()) == {"r"}


def test_the_run_of_a_study_is_not_overwritten_and_names_become_folders(root: Path) -> None:
    folder = predict(root / "p", same)
    (root / "runs/taken").mkdir(parents=True)
    put(root / "runs/taken/study.json", {"type": "Study"})
    with pytest.raises(UserError, match="holds the run of a study; give another --name"):
        judged(root, {"p": folder}, name="taken")
    (root / "runs/taken/study.json").write_text('{"type": "Eval')
    with pytest.raises(UserError, match=r"study\.json is not as it was written"):
        judged(root, {"p": folder}, name="taken")
    with pytest.raises(UserError, match=r"a name becomes a folder.*got 'a/b'"):
        judged(root, {"a/b": folder})
    with pytest.raises(UserError, match="the control q is not a candidate; there are p"):
        judged(root, {"p": folder}, control="q")
    with pytest.raises(UserError, match="no file is of a case of the data set: sub-00"):
        judged(root, {"p": folder}, pattern="x{case}.nii.gz")
