"""Pools: several data sets as one, whose cases, people, sites and classes are never mixed up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from softseg_dist.data.cases import Case, CaseData, DataSet, Pool, check_apart
from softseg_dist.data.challenges import SCGM, NnUNet
from softseg_dist.data.check import check_cases, unread
from softseg_dist.data.files import Files
from softseg_dist.data.layouts import Bids, Each
from softseg_dist.data.phantom import Phantom, PhantomCase
from softseg_dist.data.prediction_files import find_predictions, label_values
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.splits import MonteCarlo
from softseg_dist.data.store import build_store
from softseg_dist.errors import UserError

SHAPE = (6, 5, 4)
GM, WM = np.zeros(SHAPE), np.zeros(SHAPE)
GM[1, 2:4, 1:3], WM[3:5, 2:4, 2] = 1, 1


def put(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.eye(4)), path)


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(1, 99, SHAPE)


def bids(root: Path, folder: str = "bids", people: tuple[str, ...] = ("01", "02"), **fields: Any) -> Bids:
    """Two classes, each with a file for each rater."""
    for number, person in enumerate(people):
        put(root / f"{folder}/sub-{person}/anat/sub-{person}_T2w.nii.gz", image(number))
        for name, mask in (("GM", GM), ("WM", WM)):
            for rater in ("anna", "ben")[: 1 + number]:
                put(root / f"{folder}/derivatives/d/sub-{person}/anat/sub-{person}_label-{name}_desc-{rater}_mask.nii.gz", mask)
    parts = {name: f"label-{name}_desc-{{rater}}_mask" for name in ("GM", "WM")}
    return Bids(folder, **({"image": "T2w", "labels": parts} | fields))


def nnunet(root: Path, names: tuple[str, ...] = ("c1", "c2"), **fields: Any) -> NnUNet:
    """The same classes in one map, the other way round."""
    for number, name in enumerate(names):
        put(root / f"nnunet/imagesTr/{name}_0000.nii.gz", image(10 + number))
        put(root / f"nnunet/labelsTr/{name}.nii.gz", GM * 2 + WM)
    facts = {"labels": {"background": 0, "WM": 1, "GM": 2}, "channel_names": {"0": "T2w"}}
    (root / "nnunet/dataset.json").write_text(json.dumps(facts))
    return NnUNet("nnunet", **({"labels": ("WM", "GM")} | fields))


def test_cases_are_called_after_their_sets_and_classes_come_in_the_order_of_the_first(tmp_path: Path) -> None:
    data = Pool(bids(tmp_path), nnunet(tmp_path))
    cases = data.cases(tmp_path)
    assert [(case.name, case.subject, case.site) for case in cases] == [
        ("1-sub-01", "sub-01", ""),
        ("1-sub-02", "sub-02", ""),
        ("2-c1", "c1", ""),
        ("2-c2", "c2", ""),
    ]
    assert (data.classes, data.rater_names) == (("GM", "WM"), None)
    assert [case.rater_names for case in cases] == [("anna",), ("anna", "ben"), ("rater",), ("rater",)]
    for case in cases:
        assert all(np.array_equal(by_class, [GM, WM]) for by_class in case.load().raters)
    assert check_cases(cases, Preprocess()) == []
    named = data.replace(names=("lausanne", "basel"))
    assert [case.name for case in named.cases(tmp_path)] == ["basel-c1", "basel-c2", "lausanne-sub-01", "lausanne-sub-02"]
    assert DataSet.model_validate_json(named.model_dump_json()) == named


def test_sources_tell_in_which_order_the_classes_come(tmp_path: Path) -> None:
    for name, voxels in (("a", image(5)), ("a_x", GM), ("a_y", WM)):
        put(tmp_path / f"set/{name}.nii.gz", voxels)
    orders = ({"GM": "{case}_x.nii.gz", "WM": "{case}_y.nii.gz"}, {"WM": "{case}_x.nii.gz", "GM": "{case}_y.nii.gz"})
    sets = [Files("set", image="{case}.nii.gz", labels=labels) for labels in orders]
    assert sets[0].cases(tmp_path)[0].sources() == sets[1].cases(tmp_path)[0].sources()  # each with classes of its own
    right, wrong = (Pool(bids(tmp_path), data).cases(tmp_path)[-1] for data in sets)
    assert np.array_equal(right.load().raters, wrong.load().raters[:, ::-1])
    assert right.sources() != wrong.sources()
    stores = [build_store(tmp_path, Pool(bids(tmp_path), data).cases(tmp_path), sets[0], Preprocess()) for data in sets]
    assert stores[0] != stores[1]


def test_equal_subjects_of_two_sets_are_one_person_or_two_only_where_the_study_says_so(tmp_path: Path) -> None:
    data = Pool(bids(tmp_path), bids(tmp_path, "more", ("02", "03")))
    rule = 'several sets have a subject sub-02: say person=r"[^@]+" if that is one person, person=r".+" if these are several'
    with pytest.raises(UserError, match=re.escape(rule)):
        data.scan(tmp_path)
    together, apart = data.replace(person=r"[^@]+"), data.replace(person=r".+", names=("old", "new"))
    assert [case.subject for case in together.cases(tmp_path)] == ["sub-01", "sub-02", "sub-02", "sub-03"]
    assert [case.subject for case in apart.cases(tmp_path)] == ["sub-02@new", "sub-03@new", "sub-01@old", "sub-02@old"]
    assert [case.subject for case in data.replace(person=r"sub-(\d+)").cases(tmp_path)] == [
        "01",
        "02",
        "02",
        "03",
    ]  # not the set's 1
    cases = data.replace(person=r"sub-(\d+)").cases(tmp_path)
    sites, persons = {case.subject: case.site for case in cases}, {case.name: case.subject for case in cases}
    for split in MonteCarlo(count=3).of_cases(sites, persons, 0):
        sides = [set(side) for side in (split.train, split.validation, split.test)]
        assert sum("02" in side for side in sides) == 1
    unlike = data.replace(person=r"(c\d)").scan(tmp_path)[0].missing()
    assert unlike == ("1: case sub-01 has 'sub-01@1', which person='(c\\\\d)' does not match",)
    with pytest.raises(UserError, match="does not match"):
        data.replace(person=r"(c\d)").cases(tmp_path)


def test_equal_images_of_two_sets_are_found_and_simulated_ones_are_no_files(tmp_path: Path) -> None:
    data = Pool(bids(tmp_path), nnunet(tmp_path), bids(tmp_path, "copy", ("x",)))
    cases = data.cases(tmp_path)
    with pytest.raises(UserError, match=r"the images of 1-sub-01 \(sub-01\) and 3-sub-x \(sub-x\) are equal"):
        check_apart(cases, [case.sources() for case in cases])
    simulated = Pool(Phantom(subjects=2), Phantom(subjects=2, seed=1), person=".+").cases(None)
    check_apart(simulated, [case.sources() for case in simulated])
    assert len({case.sources() for case in simulated}) == 4


def test_the_set_may_be_the_site_and_sites_of_one_name_are_said(tmp_path: Path) -> None:
    for folder in ("bids", "more"):
        bids(tmp_path, folder)
        (tmp_path / f"{folder}/participants.tsv").write_text("participant_id\tsite\nsub-01\tA\n")
    data = Pool(bids(tmp_path), bids(tmp_path, "more"), names=("old", "new"), person=".+")
    sites = {site: [case.site for case in data.replace(site=site).cases(tmp_path)] for site in ("own", "set", "both")}
    assert sites == {"own": ["A", "", "A", ""], "set": ["new", "new", "old", "old"], "both": ["new-A", "new", "old-A", "old"]}
    *found, about_sites = data.warnings(tmp_path)
    assert [text.partition(":")[0] for text in found] == ["old", "new"]
    assert about_sites == 'several sets have a site A, which counts as one; site="both" keeps them apart'
    assert len(data.replace(site="both").warnings(tmp_path)) == len(found)
    assert [problem.detail for problem in unread(data, tmp_path)] == [*found, about_sites]


def test_what_a_case_lacks_is_said_with_its_set_and_either_exclude_leaves_it_out(tmp_path: Path) -> None:
    data = Pool(bids(tmp_path), nnunet(tmp_path, ("c1", "c2", "c3")), names=("lausanne", "basel"))
    (tmp_path / "nnunet/labelsTr/c3.nii.gz").unlink()
    with pytest.raises(UserError, match=r"^basel: case c3 has no mask labelsTr/c3.nii.gz of WM"):
        data.cases(tmp_path)
    assert [problem.case for problem in check_cases(data.scan(tmp_path), Preprocess())] == ["basel-c3", "basel-c3"]
    kept = data.replace(exclude=("basel-c3", "sub-01")).cases(tmp_path)
    assert [case.name for case in kept] == ["basel-c1", "basel-c2", "lausanne-sub-02"]
    own = Pool(bids(tmp_path), nnunet(tmp_path, exclude=("c2", "c3")), exclude=("2-c1",))
    assert [case.name for case in own.cases(tmp_path)] == ["1-sub-01", "1-sub-02"]
    with pytest.raises(UserError, match="exclude names c9, but the cases are 1-sub-01"):
        own.replace(exclude=("c9",)).cases(tmp_path)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"sets": (Phantom(),)}, "at least 2 items"),
        ({"sets": (Phantom(), Phantom(shape="lesions"))}, "all sets must have the same classes, got GM in 1; lesion in 2"),
        ({"names": ("a",)}, "names must be one for each of 2 sets, all different, got a"),
        ({"names": ("a", "a")}, "names must be one for each of 2 sets, all different, got a, a"),
        ({"names": ("a/b", "c")}, "should match pattern"),
        ({"person": "("}, "person must be a regular expression"),
    ],
    ids=str,
)
def test_a_pool_that_cannot_be_is_refused_when_it_is_made(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        Pool(**({"sets": (Phantom(), Phantom(seed=1))} | fields))


def test_sets_of_other_channels_are_refused_by_name(tmp_path: Path) -> None:
    for person in ("01", "02"):
        put(tmp_path / f"bids/sub-{person}/anat/sub-{person}_T1w.nii.gz", image(7))
    with pytest.raises(UserError, match="the images of all sets must have as many channels, got 2 channels in 1, 1 channel in 2"):
        Pool(bids(tmp_path, image=("T1w", "T2w")), nnunet(tmp_path)).scan(tmp_path)


def test_predictions_and_centres_are_found_as_those_of_the_sets(tmp_path: Path) -> None:
    data = Pool(bids(tmp_path), nnunet(tmp_path))
    cases = data.cases(tmp_path)
    for name in ("sub-01_T2w", "1-sub-02", "c1", "2-c2"):  # by the image, or by the case
        for label in data.classes:
            put(tmp_path / f"maps/{name}_label-{label}_softseg.nii.gz", GM)
    found = find_predictions(tmp_path / "maps", cases, data.classes)
    assert (sorted(found.files), found.problems, found.surplus) == ([case.name for case in cases], (), ())
    only = Pool(nnunet(tmp_path), nnunet(tmp_path), person=".+")
    assert label_values(only.classes, only.cases(tmp_path)) == {"WM": (1,), "GM": (2,)}
    for case in cases:
        assert np.array_equal(case.mask("GM"), GM)
        assert case.sources(("GM",)) == case.sources()  # the mask is one of the case
    assert np.array_equal(cases[0].mask("label-WM_desc-anna_mask"), WM)
    Preprocess(crop=(4, 4), center="GM").apply(cases[0])


class NamedCase(PhantomCase):
    """A case that reads what its name says."""

    def load(self) -> CaseData:
        assert self.name == self.subject
        return super().load()


class Named(Phantom):
    """A data set as a study file may define it."""

    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        return tuple(NamedCase(self, index) for index in range(self.subjects))


def test_data_sets_of_a_study_file_and_pools_can_be_pooled() -> None:
    inner = Pool(Named(subjects=1), Phantom(subjects=1, seed=1), person=".+")
    outer = Pool(inner, Phantom(subjects=1, seed=2), names=("both", "third"))
    assert [(case.name, case.subject) for case in outer.cases(None)] == [
        ("both-1-sub-001", "sub-001@1"),
        ("both-2-sub-001", "sub-001@2"),
        ("third-sub-001", "sub-001"),
    ]
    first = outer.cases(None)[0].load()
    assert first.truth is not None
    assert np.array_equal(first.image, Named(subjects=1).cases(None)[0].load().image)
    written = outer.model_dump(mode="json")
    assert written["sets"][0]["sets"][0]["type"] == "test_pools:Named"
    assert written["sets"][0]["sets"][0]["code"]
    assert DataSet.model_validate_json(outer.model_dump_json()) == outer
    assert outer.replace(names=()).classes == ("GM",)
    assert outer.rater_names == ("A", "B", "C", "D")
    assert str(Pool(Phantom(), Phantom(seed=1))) == "Pool(sets=(Phantom(), Phantom(seed=1)))"


def test_channels_have_the_names_of_all_sets_or_none_if_one_of_them_says_none() -> None:
    one, each = (Bids("a", image=image, labels={"GM": "seg"}) for image in (("T2w", "FLAIR"), Each("T1w", "PDw")))
    files = Files("b", image="{case}_{channel}.nii.gz", channels=("t2", "flair"), labels={"GM": "{case}_seg.nii.gz"})
    assert (one.channel_names, each.channel_names) == ((("T2w",), ("FLAIR",)), (("T1w", "PDw"),))
    assert Pool(one, files).channel_names == (("T2w", "t2"), ("FLAIR", "flair"))
    assert Pool(one, SCGM("c", labels=("GM",))).channel_names == ()
