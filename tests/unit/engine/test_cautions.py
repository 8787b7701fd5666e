"""Cautions: what data do to candidates is told with value, place and what would change it; a clean study has none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sealed_files import value_of
from typer.testing import CliRunner

import softseg_dist
from softseg_dist import (
    AdaptiveWing,
    Affine,
    Bids,
    Dice,
    Flip,
    Gamma,
    MonteCarlo,
    Phantom,
    Preprocess,
    Recipe,
    Sigmoid,
    Softmax,
    Study,
    factorial,
)
from softseg_dist.cli.main import _grouped, app
from softseg_dist.data.cases import Case, CaseData
from softseg_dist.data.check import Problem
from softseg_dist.data.geometry import Float32, Geometry
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.engine.cautions import Inspection, inspect_first, inspect_store
from softseg_dist.errors import UserError
from softseg_dist.pipeline import RunOptions
from softseg_dist.words import next_command

SIZE = (12, 12, 4)
BLOCK = np.zeros(SIZE, np.float32)
BLOCK[3:9, 4:8, 1:3] = 1
SOFT = BLOCK.copy()
SOFT[3, 4:8, 1:3] = 0.5
NONE = np.zeros(SIZE, np.float32)
BOTH = factorial(Recipe(), label=("hard", "soft"))


class Drawn(Case):
    """A case of noise with masks [R K X Y Z], or one mask of one rater."""

    def __init__(self, name: str, masks: Float32, subject: str = "", seed: int | None = None) -> None:
        self.name, self.subject, self.site = name, subject or name, ""
        self.masks = masks.reshape(-1, 1, *SIZE) if masks.ndim < 5 else masks
        self.rater_names = tuple("abc"[: len(self.masks)])
        self.seed = sum(map(ord, name)) if seed is None else seed

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        return ()

    def load(self) -> CaseData:
        geometry = Geometry(SIZE, np.eye(4))
        image = np.random.default_rng(self.seed).normal(size=SIZE).astype(np.float32)
        return CaseData(image[None], self.masks, None, geometry.canonical_affine, geometry)

    def mask(self, part: str) -> Float32:
        return self.masks[0, 0]


def study(classes: Sequence[str] = ("GM",), **changes: object) -> Study:
    data = Bids("ds", image="T2w", labels={name: f"label-{name}_desc-{{rater}}_mask" for name in classes})
    fields = {"name": "s", "question": "?", "data": data, "splits": MonteCarlo(count=2), "candidates": BOTH}
    return Study(**fields | changes)


def found(of: Study, cases: Sequence[Case], splits: Sequence[Split] | None = None) -> dict[str, str]:
    inspection = Inspection(of)
    for case in cases:
        inspection.look(of.preprocess.apply(case))
    return {caution.rule: caution.detail for caution in inspection.cautions(splits)}


def drawn(*masks: Float32) -> list[Case]:
    return [Drawn(f"sub-{i}", mask) for i, mask in enumerate(masks)]


def test_a_clean_study_has_none() -> None:
    base = Recipe(augment=(Affine(), Flip()))
    candidates = factorial(base, label=("hard", "soft"), activation=(Sigmoid(), Softmax()), loss=(Dice(), AdaptiveWing()))
    clean = study(data=Phantom(subjects=5, size=(24, 24), num_slices=3), candidates=candidates)
    cases = clean.data.cases(None)
    sites = {case.subject: case.site for case in cases}
    assert found(clean, cases, clean.make_splits(sites)) == {}


def test_cases_whose_soft_targets_are_binary_are_named() -> None:
    told = found(study(), drawn(SOFT, BLOCK, SOFT, BLOCK, NONE))["binary targets"]
    # 2 of 6 rows of SOFT are half labelled: 4 of 24 voxels per slice
    assert "in 2 of 4 labelled cases: 0 % of the labelled voxels of sub-1, sub-3 (16.7 % to 16.7 % of the others)" in told
    assert "spacing_mm" in told


@pytest.mark.parametrize("names", [("sub-1Ses1", "sub-1Ses2"), ("case7_ses-01", "case7_ses-02"), ("A_session1", "A")])
def test_subjects_that_may_be_sessions_of_one_person_are_named(names: tuple[str, str]) -> None:
    told = found(study(), [Drawn(name, SOFT) for name in (*names, "sub-2Ses1", "sub-3")])["sessions apart"]
    assert told.startswith(f"{', '.join(sorted(names))} may be sessions of one person (1 such person), whom splits would not keep")
    person = told.partition('person=r"')[2].partition('"')[0]
    assert len({re.match(person, name)[1] for name in names}) == 1  # type: ignore[index]
    assert "sessions apart" not in found(study(), [Drawn(name, SOFT, subject="one") for name in names])


def test_soft_targets_of_a_fusion_that_rounds_are_binary() -> None:
    two = np.stack([BLOCK, np.roll(BLOCK, 1, axis=0)])[:, None]
    candidates = factorial(Recipe(), fusion=("mean", "majority", "staple", "soft_staple"))
    told = found(study(candidates=candidates), [Drawn("a", two)])["binary targets"]
    assert told.startswith('label="soft" with fusion="majority" is binary before augmentation in 1 of 1 labelled case: 0 %')


def test_candidates_with_identical_targets_are_named() -> None:
    told = found(study(), drawn(BLOCK, BLOCK, NONE))["identical targets"]
    assert "identical targets in all of 3 cases, also augmented" in told
    assert "hard = soft" in told
    assert "spacing_mm" in told


@pytest.mark.parametrize("augment", [(Flip(),), (Gamma(),), ()])
def test_an_augmentation_that_moves_no_value_leaves_targets_identical(augment: tuple[Flip | Gamma, ...]) -> None:
    assert "identical targets" in found(study(candidates=factorial(Recipe(augment=augment), label=("hard", "soft"))), drawn(BLOCK))


def test_targets_that_an_augmentation_interpolates_differ() -> None:
    assert "identical targets" not in found(
        study(candidates=factorial(Recipe(augment=(Affine(),)), label=("hard", "soft"))), drawn(BLOCK)
    )


def test_one_case_whose_targets_differ_is_enough() -> None:
    assert "identical targets" not in found(study(), drawn(BLOCK, SOFT, BLOCK))


def test_only_candidates_that_differ_in_nothing_else_are_compared() -> None:
    candidates = {"a": Recipe(label="hard"), "b": Recipe(label="soft", loss=AdaptiveWing())}
    assert "identical targets" not in found(study(candidates=candidates), drawn(BLOCK))


def test_fusions_of_raters_who_agree_are_identical() -> None:
    agreed = np.stack([BLOCK, BLOCK])[:, None]
    candidates = factorial(Recipe(), fusion=("mean", "random_rater", "staple"))
    told = found(study(candidates=candidates), [Drawn("a", agreed)])["identical targets"]
    assert "mean = random_rater, mean = staple, random_rater = staple" in told


def test_volumes_that_preparation_changes_are_named() -> None:
    two = [Drawn("whole", np.stack([BLOCK, SOFT])[:, None]), Drawn("cut", np.stack([np.roll(BLOCK, 4, axis=0)] * 2)[:, None])]
    told = found(study(preprocess=Preprocess(crop=(8, 8))), two)["volume changed"]
    # BLOCK has 6 x 4 x 2 voxels; of the one that is moved to 7 ... 12, rows 7 to 9 lie in the crop of rows 2 to 9
    assert told.startswith("Preparation changes a labelled volume by more than 5 % in 1 of 2 cases (cut): class GM of cut")
    assert "has 48 mm3 in the file, 24 after it" in told
    assert "volume changed" not in found(study(), two)


def splits(*train: Sequence[str]) -> list[Split]:
    return [Split(index=i, train=tuple(who), validation=("v",), test=("t",)) for i, who in enumerate(train)]


def test_a_class_that_no_training_case_of_a_split_has_is_named() -> None:
    two = [Drawn(f"sub-{i}", np.stack([BLOCK, BLOCK if i < 3 else NONE])[None]) for i in range(6)]
    of = study(("GM", "WM"))
    told = found(of, two, splits(["sub-0", "sub-3"], ["sub-3", "sub-4"], ["sub-5"]))
    assert told["class absent in training"].startswith("Class WM is in no training case of 2 of 3 splits (001, 002)")
    assert "class of few subjects" not in told
    assert "class absent in training" not in found(of, two, splits(["sub-0", "sub-3"]))


def test_a_class_of_fewer_than_three_subjects_is_named() -> None:
    sessions = [Drawn(f"sub-{i // 2}_ses-{i % 2}", BLOCK if i < 4 else NONE, subject=f"sub-{i // 2}") for i in range(8)]
    told = found(study(), sessions, [])["class of few subjects"]
    assert told.startswith("Class GM is labelled in 2 of 4 subjects (sub-0, sub-1)")


def test_a_rater_who_is_named_but_did_not_draw_every_case_is_an_error() -> None:
    one, two = np.stack([BLOCK])[:, None], np.stack([BLOCK, SOFT])[:, None]
    of = study(candidates={"c": Recipe(fusion="rater:b"), "d": Recipe()})
    inspection = Inspection(of)
    for case in drawn(two, one, two):
        inspection.look(of.preprocess.apply(case))
    (error,) = (caution for caution in inspection.cautions(None) if caution.level == "error")
    assert error.detail.startswith('fusion="rater:b" (c) names no rater of 1 case (sub-1): name a rater of every case')


def test_a_class_that_nobody_has_is_an_error() -> None:
    inspection = Inspection(study())
    for case in drawn(NONE, NONE, NONE):
        inspection.look(Preprocess().apply(case))
    assert [caution.rule for caution in inspection.cautions([]) if caution.level == "error"] == ["class in no case"]
    assert inspection.cautions(None) == []  # others may have it


@pytest.mark.parametrize(
    ("classes", "pairs"),
    [
        (("left", "right"), "left and right"),
        (("kidney_L", "kidney_R", "spine"), "kidney_L and kidney_R"),
        (("r-lung", "l-lung"), "l-lung and r-lung"),
        (("LV", "RV"), "LV and RV"),
    ],
)
def test_left_and_right_that_a_flip_exchanges_are_named(classes: tuple[str, ...], pairs: str) -> None:
    flipped = {"a": Recipe(augment=(Flip(),)), "b": Recipe(augment=(Flip(axes=(1,)),)), "c": Recipe(augment=(Flip(p=0),))}
    told = found(study(classes, candidates=flipped), [])["left and right mirrored"]
    assert told.startswith(f"Flip of axis 0 mirrors left and right in a, but does not exchange the classes {pairs}:")


@pytest.mark.parametrize("classes", [("left_atrium",), ("GM", "WM"), ("bright", "lesion"), ("lobe", "robe")])
def test_classes_without_sides_may_be_flipped(classes: tuple[str, ...]) -> None:
    assert found(study(classes, candidates={"a": Recipe(augment=(Flip(),))}), []) == {}


def test_slices_without_sides_may_be_flipped() -> None:
    """Of sagittal slices axis 0 is posterior to anterior; one axial or coronal case is enough to have sides."""
    sided = study(("left", "right"), candidates={"a": Recipe(augment=(Flip(),))})
    both = np.stack([BLOCK, BLOCK])[None]
    for axis, is_told in (("x", False), ("y", True), ("z", True), ("auto", True)):
        cut = sided.replace(preprocess=Preprocess(axis=axis))
        assert ("left and right mirrored" in found(cut, [Drawn("a", both), Drawn("b", both)])) == is_told
    inspection = Inspection(sided)
    for name, axis in (("a", "x"), ("b", "y")):
        inspection.look(Preprocess(axis=axis).apply(Drawn(name, both)))  # type: ignore[arg-type]
    assert "left and right mirrored" in [caution.rule for caution in inspection.cautions(None)]


def test_classes_that_overlap_are_named_where_softmax_is_used() -> None:
    apart, over = (Drawn(name, np.stack([BLOCK, mask])[None]) for name, mask in (("apart", NONE), ("over", BLOCK * 0.75)))
    told = found(study(("GM", "WM"), candidates={"a": Recipe(activation=Softmax())}), [apart, over])["classes overlap"]
    assert told.startswith("Labels of several classes add up to more than 1 in 1 of 2 cases, most in over (48 voxels)")
    assert "classes overlap" not in found(study(("GM", "WM")), [apart, over])


def test_equal_images_under_two_names_are_named() -> None:
    told = found(study(), [Drawn("a", SOFT, seed=1), Drawn("b", SOFT, seed=2), Drawn("c", NONE, seed=1)])["equal images"]
    assert told.startswith("Cases have equal images under several names: a = c;")


def test_a_crop_and_slices_that_need_the_subject_s_masks_are_named() -> None:
    of_label = Preprocess(crop=(8, 8), center="label-GM_desc-a_mask", slices="labelled")
    told = found(study(preprocess=of_label), [])
    assert "centred on its own mask 'label-GM_desc-a_mask'" in told["crop by a mask"]
    assert 'slices="all"' in told["slices by labels"]
    assert found(study(preprocess=Preprocess(crop=(8, 8), center="foreground")), []) == {}


STUDY = """
from softseg_dist import *
STUDY = Study(name="t", question="?", data=Phantom(subjects=5, raters=1, size=(16, 16), num_slices=2), splits=MonteCarlo(count=1),
    candidates=factorial(Recipe(), label=("hard", "soft")), control="hard")
"""


@pytest.mark.parametrize("command", ["check", "plan"])
def test_commands_print_them(tmp_path: Path, command: str) -> None:
    path = tmp_path / "study.py"
    path.write_text(STUDY)
    picture = ["--picture", str(tmp_path / "m.png")] if command == "check" else []
    result = CliRunner().invoke(app, [command, str(path), *picture])
    assert result.exit_code == 0
    assert "hard = soft" in " ".join(result.output.split())


def test_a_check_of_too_few_subjects_still_shows_its_table(tmp_path: Path) -> None:
    path = tmp_path / "study.py"
    path.write_text(STUDY.replace("subjects=5", "subjects=2"))
    result = CliRunner().invoke(app, ["check", str(path), "--picture", str(tmp_path / "m.png"), "--json"])
    assert result.exit_code == 2
    problems = {problem["rule"]: problem for problem in json.loads(result.output)["problems"]}
    assert problems["cannot be split"]["level"] == "error"
    assert "needs at least 3 subjects" in problems["cannot be split"]["detail"]
    assert "identical targets" in problems


def put(root: Path, subject: str, image: Float32) -> None:
    """An image and its mask, in the layout of BIDS."""
    for part, voxels in (("T2w", image), ("T2w_seg", BLOCK)):
        path = root / ("ds" if part == "T2w" else "ds/derivatives/labels") / subject / "anat" / f"{subject}_{part}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


BIDS = STUDY.replace("Phantom(subjects=5, raters=1, size=(16, 16), num_slices=2)", 'Bids("ds", image="T2w", labels={"GM": "seg"})')


def test_what_is_not_read_is_a_warning_of_check_and_a_line_of_a_run(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, f"sub-{number}", np.random.default_rng(number).normal(size=SIZE).astype(np.float32))
    (tmp_path / "ds/sub-9").mkdir()
    path, words = tmp_path / "study.py", ["--data-root", str(tmp_path)]
    path.write_text(BIDS)
    line = "there is no image T2w in sub-9: not in the study"
    result = CliRunner().invoke(app, ["check", str(path), *words, "--picture", str(tmp_path / "m.png"), "--json"])
    assert {"case": "", "level": "warning", "rule": "not read", "detail": line} in json.loads(result.output)["problems"]
    assert result.exit_code == 0
    result = CliRunner().invoke(app, ["plan", str(path), *words])
    assert f"warning: {line}" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["prepare", str(path), *words, "--stores", str(tmp_path / "stores")])
    assert f"warning: {line}\n" in result.output


def test_a_check_groups_equal_problems_names_files_whole_and_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    data = tmp_path / "a folder with a long name"
    for number in range(9):
        put(data, f"sub-{number}", np.random.default_rng(number).normal(size=SIZE).astype(np.float32))
    masks = [data / f"ds/derivatives/labels/sub-{number}/anat/sub-{number}_T2w_seg.nii.gz" for number in range(9)]
    for mask in masks[:2]:
        mask.unlink()
    masks[2].write_bytes(b"torn")
    for mask in masks[3:5]:
        nib.save(nib.Nifti1Image(np.zeros(SIZE, dtype=np.float32), np.eye(4)), mask)
    path = tmp_path / "my study.py"
    path.write_text(BIDS)
    words = [str(path), "--data-root", str(data)]
    told = CliRunner().invoke(app, ["check", *words, "--picture", str(tmp_path / "m.png")])
    assert told.exit_code == 2
    lines = told.output.splitlines()
    assert [line.partition(": case sub-0 has no mask")[0] for line in lines if "incomplete" in line] == [
        "error: incomplete, 2 cases (sub-0, sub-1), the first"
    ]
    assert [line for line in lines if line.startswith(f"error: unusable, sub-2: {masks[2]} ")]
    assert [line for line in lines if line.startswith("warning: empty mask, 2 cases (sub-3, sub-4): rater rater, class GM ")]
    left_out = "exclude=('sub-0', 'sub-1', 'sub-2')"
    assert lines[-1].endswith(f"leave the cases out by {left_out} of the data set; then again: {next_command('check', *words)}")
    path.write_text(BIDS.replace('labels={"GM": "seg"}', f'labels={{"GM": "seg"}}, {left_out}'))
    told = CliRunner().invoke(app, ["check", *words, "--picture", str(tmp_path / "m.png")])
    assert told.exit_code == 0, told.output
    assert told.output.endswith(f"and then: {next_command('run', *words, debug=True)}\n")


def test_problems_of_two_classes_or_values_are_not_one() -> None:
    told = ("rater a, class 0 labels no voxel", "rater a, class 1 labels no voxel", "3.2% of the voxels", "14% of the voxels")
    problems = [Problem(f"sub-0{n}_ses-1", "warning", "rule", text) for n, text in enumerate(told)]
    whole = [Problem("", "warning", "not read", f"{n} files") for n in (1, 2)]
    assert [len(group) for group in _grouped([*problems, *whole])] == [1, 1, 2, 1, 1]


def test_a_check_refuses_what_a_run_would_and_looks_at_the_subjects_of_the_study_alone(tmp_path: Path) -> None:
    for number in range(6):
        image = np.random.default_rng(number % 5).normal(size=SIZE).astype(np.float32)  # of the sixth subject that of the first
        put(tmp_path, f"sub-{number}", image)
    path, words = tmp_path / "study.py", ["--data-root", str(tmp_path), "--picture", str(tmp_path / "m.png"), "--json"]
    for few, code in (("", 2), ("subjects=5, ", 0)):
        path.write_text(BIDS.replace("splits=", f"{few}splits="))
        result = CliRunner().invoke(app, ["check", str(path), *words])
        assert (result.exit_code, "are equal: one would train what the other tests" in result.output) == (code, code == 2)


def test_a_plan_names_the_cases_that_cannot_be_prepared() -> None:
    lost = study(
        data=Phantom(subjects=3, shape="lesions", size=(16, 16), num_slices=2), preprocess=Preprocess(crop=(8, 8), center="cord")
    )
    problems = inspect_first(lost, None)
    assert [problem.case for problem in problems if problem.rule == "unusable"] == ["sub-001", "sub-002", "sub-003"]


@pytest.mark.engine
def test_a_run_records_them_and_its_report_shows_them(tmp_path: Path) -> None:
    path = tmp_path / "study.py"
    network = "Recipe(network=UNet(filters=(4, 8)), optim=Optim(epochs=1))"
    path.write_text(STUDY.replace("Recipe()", network))
    options = RunOptions(out=tmp_path / "runs", stores=tmp_path / "stores", final_model=False)
    softseg_dist.run(path, local=True, options=options)
    recorded = value_of(tmp_path / "runs/t/run.json")["cautions"]
    assert [caution["rule"] for caution in recorded] == ["identical targets", "binary targets"]
    page = (tmp_path / "runs/t/report/index.html").read_text()
    assert page.index("(hard = soft)") < page.index("Read with care")


def test_a_run_with_a_class_that_nobody_has_is_refused(tmp_path: Path) -> None:
    lost = study(data=Phantom(subjects=3, size=(16, 16)))
    store = Store.open(build_store(tmp_path, drawn(NONE, NONE, NONE), lost.data, Preprocess()))
    with pytest.raises(UserError, match=r"No case has a label of class GM, so it cannot be scored; check labels="):
        inspect_store(lost, store, [])
