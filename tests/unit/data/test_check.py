"""Checking a data set: every problem gets its line, none stops the others, the picture shows what is usable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as pictures

from softseg_dist.data.cases import Case, CaseData
from softseg_dist.data.check import Problem, check_cases
from softseg_dist.data.geometry import Float32, Geometry
from softseg_dist.data.montage import montage
from softseg_dist.data.phantom import Phantom
from softseg_dist.data.preprocess import Preprocess, Sample
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.errors import UserError

BLOCK = np.zeros((12, 12, 4), np.float32)
BLOCK[4:8, 4:8, 1:3] = 1
RAMP = np.arange(BLOCK.size, dtype=np.float32).reshape(BLOCK.shape)


class Made(Case):
    """A case with whatever is wrong with it."""

    def __init__(
        self,
        name: str,
        image: Float32 = RAMP,
        masks: Sequence[Float32] = (BLOCK,),
        spacing_mm: Sequence[float] = (1, 1, 1),
        subject: str = "",
        site: str = "",
        lacks: tuple[str, ...] = (),
        error: str = "",
    ) -> None:
        self.name, self.subject, self.site = name, subject or name, site
        self.rater_names = tuple("abc"[: len(masks)])
        self.image, self.masks, self.spacing_mm, self.lacks, self.error = image, masks, spacing_mm, lacks, error

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        return ()

    def missing(self) -> tuple[str, ...]:
        return self.lacks

    def load(self) -> CaseData:
        if self.error:
            raise UserError(self.error)
        geometry = Geometry(self.image.shape, np.diag([*map(float, self.spacing_mm), 1.0]))
        return CaseData(self.image[None], np.stack(self.masks)[:, None], None, geometry.canonical_affine, geometry)

    def mask(self, part: str) -> Float32:
        return self.masks[0]


def rules(cases: Sequence[Case], preprocess: Preprocess | None = None) -> dict[tuple[str, str], Problem]:
    return {(p.case, p.rule): p for p in check_cases(cases, preprocess or Preprocess())}


def test_good_cases_have_no_problem() -> None:
    assert check_cases([Made("a"), Made("b")], Preprocess()) == []
    assert check_cases(Phantom(subjects=1).cases(None), Preprocess()) == []


def test_what_stops_prepare_is_an_error_and_the_other_cases_are_still_looked_at() -> None:
    found = rules(
        [
            Made("lacking", lacks=("case lacking has no mask 'seg'",)),
            Made("broken", error="broken.nii.gz is cut off"),
            Made("constant", image=np.ones_like(RAMP)),
            Made("empty", masks=[BLOCK * 0]),
        ]
    )
    assert found["lacking", "incomplete"].detail == "case lacking has no mask 'seg'"
    assert found["broken", "unusable"].detail == "broken.nii.gz is cut off"
    assert "constant" in found["constant", "unusable"].detail
    assert [found[key].level for key in found] == ["error", "error", "error", "warning"]
    assert found["empty", "empty mask"].detail == "rater a, class 0 labels no voxel"


def test_a_label_outside_the_crop_is_measured() -> None:
    off = np.zeros_like(BLOCK)
    off[0:4, 4:8] = 1
    found = rules([Made("a", masks=[off])], Preprocess(crop=(8, 8)))
    assert found["a", "label outside the crop"].detail == "50.0% of the labelled voxels are cut off"
    assert rules([Made("a", masks=[off])], Preprocess(crop=(8, 8), center="seg")) == {}


def test_raters_that_hardly_overlap_are_told() -> None:
    found = rules([Made("a", masks=[BLOCK, np.roll(BLOCK, 4, axis=0), BLOCK])])
    assert found["a", "raters hardly overlap"].detail == "Dice of b and c is 0.00"


def test_what_is_unlike_the_other_cases_is_told() -> None:
    cases = [Made("a"), Made("b"), Made("c"), Made("flipped", spacing_mm=(-1, 1, 1)), Made("thick", spacing_mm=(1, 1, 4))]
    found = rules(cases)
    assert found["flipped", "orientation"].detail.startswith("LAS, while 4 of 5 cases are RAS")
    assert found["thick", "resolution"].detail == "1 x 1 x 4 mm, the median is 1 x 1 x 1 mm"
    assert len(found) == 2


def test_sizes_that_differ_are_no_problem() -> None:
    found = rules([Made("a"), Made("b", image=RAMP[:10], masks=[BLOCK[:10]])])
    assert not found


def test_a_person_at_two_sites_is_told() -> None:
    found = rules([Made("a1", subject="a", site="X"), Made("a2", subject="a", site="Y"), Made("b", site="X")])
    assert found["", "person at several sites"].detail.startswith("a was seen at X, Y")


@pytest.mark.parametrize("dim", [2, 3])
def test_the_montage_shows_the_cases_without_errors(tmp_path: Path, dim: int) -> None:
    cases = [*Phantom(subjects=2, dim=dim, size=(24,) * dim).cases(None), Made("bad", error="x")]  # type: ignore[arg-type]
    seen: list[Sample] = []
    check_cases(cases, Preprocess(dim=dim), seen.append)  # type: ignore[arg-type]
    path = tmp_path / "new" / "montage.png"
    assert len(seen) == 2
    montage(seen, path, ["GM"])
    picture = pictures.imread(path)
    assert picture.shape[0] > 100
    colours = picture[..., :3].max(axis=-1) - picture[..., :3].min(axis=-1)
    assert (colours > 0.5).sum() > 50  # the contours


def test_a_picture_of_an_unknown_kind_is_refused_and_one_without_a_suffix_is_written(tmp_path: Path) -> None:
    seen: list[Sample] = []
    check_cases(Phantom(subjects=1, size=(24, 24)).cases(None), Preprocess(dim=2), seen.append)
    with pytest.raises(UserError, match=r"cannot write .*m\.txt: .*not supported"):
        montage(seen, tmp_path / "m.txt", ["GM"])
    montage(seen, tmp_path / "m", ["GM"])
    assert (tmp_path / "m").read_bytes().startswith(b"\x89PNG")
