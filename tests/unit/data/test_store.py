"""The store: what goes in comes out without a copy, whole or not at all, and only if it is the one asked for."""

from __future__ import annotations

import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from softseg_dist.data.cases import Case, CaseData, LabelledCase, MaskFile
from softseg_dist.data.geometry import Float32
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.data.phantom import Phantom, PhantomCase
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.data.store import FORMAT, KEY, SCHEMA, Store, build_store, fingerprint
from softseg_dist.errors import UserError
from softseg_dist.frozen import sealed, unsealed

DATA = Phantom(subjects=3, size=(24, 20), num_slices=3, raters=2)
PREPROCESS = Preprocess(spacing_mm=(0.6, 0.5), crop=(16, 20))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("stores"), DATA.cases(None), DATA, PREPROCESS)


class Broken(Case):
    """A case that cannot be read."""

    name = subject = "broken"
    site = ""
    rater_names = ("A", "B")

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        return ("broken",)

    def load(self) -> CaseData:
        raise UserError("broken.nii.gz is cut off")

    def mask(self, part: str) -> Float32:
        raise AssertionError(part)


class Healthy(PhantomCase):
    """A person of whom no rater drew anything."""

    def __init__(self) -> None:
        super().__init__(DATA, 0)
        self.name = self.subject = "healthy"

    def load(self) -> CaseData:
        data = super().load()
        return replace(data, raters=np.zeros_like(data.raters), truth=None)


class Twice(PhantomCase):
    """A case with its image as a second channel."""

    def __init__(self) -> None:
        super().__init__(DATA, 0)
        self.name = self.subject = "twice"

    def load(self) -> CaseData:
        data = super().load()
        return replace(data, image=np.concatenate([data.image, data.image]))


def test_samples_come_out_as_they_went_in(built: Path) -> None:
    store = Store.open(built)
    for index, case in enumerate(DATA.cases(None)):
        expected, got = PREPROCESS.apply(case), store.sample(index)
        assert expected.nearest is not None
        for field in ("image", "raters", "nearest", "truth"):
            assert np.array_equal(getattr(expected, field), getattr(got, field)), field
            assert getattr(expected, field).dtype == getattr(got, field).dtype
        for field in ("name", "subject", "site", "rater_names", "spacing_mm", "voxel_mm3"):
            assert getattr(expected, field) == getattr(got, field), field
        assert np.array_equal(expected.own.packed, got.own.packed)
        assert expected.own.to_dict() == got.own.to_dict()
        assert np.array_equal(got.own.raters, OwnMasks.of(case.load()).raters)
        assert got.placement.axes == expected.placement.axes
        assert np.array_equal(got.placement.geometry.affine, expected.placement.geometry.affine)


def test_a_store_says_what_it_holds(built: Path) -> None:
    store = Store.open(built, fingerprint(DATA.cases(None), DATA, PREPROCESS))
    assert (store.classes, store.dim, store.channels, store.size) == (("GM",), 2, 1, (16, 20))
    assert store.preprocess == PREPROCESS
    assert [case.name for case in store.cases] == ["sub-001", "sub-002", "sub-003"]
    assert store.cases[1].num_items == 3
    assert store.cases[1].rater_names == ("A", "B")
    assert store.path.name == f"{store.fingerprint}.arrow"
    assert len(store.cases) == 3


def mapped_ranges(path: Path) -> list[range]:
    """The addresses at which this process has the file mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="addresses of mapped files are read from Linux's /proc")
def test_arrays_are_views_of_the_mapped_file(built: Path) -> None:
    sample = Store.open(built).sample(1)
    for array in (sample.image, sample.raters, sample.nearest, sample.truth, sample.own.packed):
        assert array is not None
        first = array.ctypes.data
        assert any(first in addresses and first + array.nbytes - 1 in addresses for addresses in mapped_ranges(built))


def test_arrays_are_read_only(built: Path) -> None:
    sample = Store.open(built).sample(0)
    for array in (sample.image, sample.raters, sample.nearest, sample.truth):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_raters_that_differ_in_number_are_kept_apart(tmp_path: Path) -> None:
    four = DATA.replace(raters=4, seed=1)
    cases = (DATA.cases(None)[0], four.cases(None)[1])
    store = Store.open(build_store(tmp_path, cases, DATA, PREPROCESS))
    assert [store.sample(i).raters.shape[1] for i in (0, 1)] == [2, 4]
    assert [case.rater_names for case in store.cases] == [("A", "B"), ("A", "B", "C", "D")]


def test_a_flipped_bit_of_a_raters_own_mask_is_found(built: Path, tmp_path: Path) -> None:
    whole, packed = bytearray(built.read_bytes()), Store.open(built).sample(1).own.packed.tobytes()
    assert whole.count(packed) == 1
    whole[whole.index(packed) + len(packed) // 2] ^= 1
    damaged = tmp_path / "damaged.arrow"
    damaged.write_bytes(whole)
    with pytest.raises(UserError, match="the numbers of sub-002 are not those that were written"):
        Store.open(damaged).verify()
    Store.open(built).verify()


def test_volumes_are_means_over_all_cases_of_what_raters_drew(tmp_path: Path) -> None:
    """On the grid of the file: a crop takes nothing away. Cases count alike, whatever their number of raters."""
    cases = (DATA.cases(None)[0], DATA.replace(raters=4, seed=1).cases(None)[1])
    store = Store.open(build_store(tmp_path, cases, DATA, Preprocess(crop=(8, 8), center="GM")))
    drawn = [case.load().raters.sum(axis=(1, 2, 3, 4), dtype=float).mean() * 0.5 * 0.5 * 2.5 for case in cases]
    assert store.mean_volumes_mm3 == pytest.approx(((drawn[0] + drawn[1]) / 2,))
    assert store.spacings_mm == ((0.5, 0.5), (0.5, 0.5), (2.5, 2.5))
    assert store.sample(0).own.mean_volumes_mm3 == pytest.approx((drawn[0],))


def test_a_healthy_control_can_be_stored(tmp_path: Path) -> None:
    store = Store.open(build_store(tmp_path, [Healthy(), DATA.cases(None)[0]], DATA, PREPROCESS))
    assert store.sample(0).own.raters.shape == (2, 1, 0, 0, 0)
    assert store.mean_volumes_mm3[0] == pytest.approx(store.sample(1).own.mean_volumes_mm3[0] / 2)
    store.verify()


def test_a_class_that_nobody_drew_has_no_volume_to_score_by(tmp_path: Path) -> None:
    store = Store.open(build_store(tmp_path, [Healthy()], DATA, PREPROCESS))
    with pytest.raises(UserError, match="no case has a voxel of GM, so that nothing can be scored"):
        store.mean_volumes_mm3  # noqa: B018


def test_without_resampling_there_is_no_nearest_column_to_read(tmp_path: Path) -> None:
    store = Store.open(build_store(tmp_path, DATA.cases(None)[:1], DATA, Preprocess()))
    assert store.sample(0).nearest is None


def test_any_arrow_reader_can_open_it(built: Path) -> None:
    table = pa.ipc.open_file(pa.memory_map(str(built))).read_all()
    assert table.num_rows == 3 * 3
    assert len(table["image"][0]) == 16 * 20


def test_the_fingerprint_follows_sources_and_preprocessing_only() -> None:
    base = fingerprint(DATA.cases(None), DATA, PREPROCESS)
    assert len(base) == 16
    assert fingerprint(DATA.cases(None), DATA, PREPROCESS) == base
    assert fingerprint(DATA.cases(None)[:2], DATA, PREPROCESS) != base
    assert fingerprint(DATA.cases(None), DATA, PREPROCESS.replace(crop=(16, 16))) != base
    other = DATA.replace(seed=5)
    assert fingerprint(other.cases(None), other, PREPROCESS) != base


def test_the_digest_is_of_the_content(built: Path, tmp_path: Path) -> None:
    again = build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS)
    assert Store.open(again).digest == Store.open(built).digest
    assert again.read_bytes() == built.read_bytes()


def test_a_store_that_is_there_is_not_built_again(built: Path) -> None:
    before = built.stat().st_mtime_ns
    assert build_store(built.parent, DATA.cases(None), DATA, PREPROCESS) == built
    assert built.stat().st_mtime_ns == before


def test_progress_is_told_case_by_case(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS, lambda *step: seen.append(step))
    assert seen == [(1, 3, "sub-001"), (2, 3, "sub-002"), (3, 3, "sub-003")]


def test_a_store_can_be_sent_to_another_process(built: Path) -> None:
    assert pickle.loads(pickle.dumps(Store.open(built))).digest == Store.open(built).digest


def test_a_case_that_cannot_be_read_leaves_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"broken.nii.gz is cut off"):
        build_store(tmp_path, (*DATA.cases(None), Broken()), DATA, PREPROCESS)
    assert not list(tmp_path.glob("*.arrow"))
    with pytest.raises(UserError, match=r"broken.nii.gz is cut off"):
        build_store(tmp_path / "first", (Broken(), *DATA.cases(None)), DATA, PREPROCESS)
    assert not list((tmp_path / "first").iterdir())


def test_cases_of_several_sizes_are_stored_as_they_are(tmp_path: Path) -> None:
    cases = DATA.cases(None)[0], DATA.replace(size=(20, 32)).cases(None)[1]
    store = Store.open(build_store(tmp_path, cases, DATA, Preprocess()))
    assert [case.size for case in store.cases] == [(24, 20), (20, 32)]
    assert (store.size, store.sizes_differ) == ((24, 32), True)
    for index, case in enumerate(cases):
        assert np.array_equal(store.sample(index).image, Preprocess().apply(case).image)


def test_a_case_of_more_channels_than_the_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="as many channels, got 1 for sub-001 and 2 for twice"):
        build_store(tmp_path, (DATA.cases(None)[0], Twice()), DATA, PREPROCESS)
    assert not list(tmp_path.iterdir())


def test_no_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no case"):
        build_store(tmp_path, (), DATA, PREPROCESS)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing beyond fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [100, 9000, 20_000])
def test_a_full_disk_is_told_and_leaves_no_file(tmp_path: Path, num_bytes: int) -> None:
    with files_of_at_most(num_bytes), pytest.raises(UserError, match="cannot write the store"):
        build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS)
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
def test_two_processes_may_build_one_store_at_once(built: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from softseg_dist.data.cases import DataSet;"
        "from softseg_dist.data.preprocess import Preprocess; from softseg_dist.data.store import build_store;"
        "data = DataSet.model_validate_json(sys.argv[2]); preprocess = Preprocess.model_validate_json(sys.argv[3]);"
        "build_store(Path(sys.argv[1]), data.cases(None), data, preprocess)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), DATA.model_dump_json(), PREPROCESS.model_dump_json()]
    processes = [subprocess.Popen(arguments) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == built.read_bytes()


def test_a_missing_store_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="softseg prepare"):
        Store.open(tmp_path / "none.arrow")


def test_a_store_from_another_preprocessing_is_refused(built: Path) -> None:
    with pytest.raises(UserError, match=f"expected fingerprint {'0' * 16}, got {Store.open(built).fingerprint}"):
        Store.open(built, "0" * 16)


def write_as_0_1(store: Path, path: Path) -> None:
    """The same cases as softseg_dist 0.1 wrote them: format 1, without the raters' own masks."""
    file = pa.ipc.open_file(str(store))
    schema = pa.schema([field for field in SCHEMA if field.name != "own"])
    about = unsealed(file.schema.metadata[KEY]) | {"format": 1}
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, schema.with_metadata({KEY: sealed(about)})) as writer:
        for number in range(file.num_record_batches):
            batch, metadata = file.get_batch_with_custom_metadata(number)
            case = unsealed(metadata[KEY])
            del case["own"], case["mean_volumes_mm3"], case["shapes"]["own"]
            writer.write_batch(batch.select(schema.names), custom_metadata={KEY: sealed(case)})


def test_a_store_of_another_version_is_refused_in_a_line_that_says_so(built: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.arrow"
    write_as_0_1(built, old)
    other = rf"another version of softseg_dist \(format 1, this version reads {FORMAT}\)"
    with pytest.raises(UserError, match=f"old.arrow was made by {other}") as refused:
        Store.open(old)
    assert "\n" not in str(refused.value)


def test_stores_and_leftovers_of_0_1_are_neither_used_nor_touched(built: Path, tmp_path: Path) -> None:
    old = [tmp_path / "0.arrow", tmp_path / ".0.0.draft", tmp_path / ".0.0.1.part"]
    for path in old:
        write_as_0_1(built, path)
    before = [path.read_bytes() for path in old]
    assert build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS).read_bytes() == built.read_bytes()
    assert [path.read_bytes() for path in old] == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_store_is_refused(built: Path, tmp_path: Path, share: float) -> None:
    whole = built.read_bytes()
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cut.arrow is not as it was written"):
        Store.open(cut)


def test_another_arrow_file_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "other.arrow"
    table = pa.table({"a": [1, 2]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"other\.arrow is not as it was written"):
        Store.open(path)


def test_a_damaged_store_gives_a_user_error_or_its_samples(built: Path, tmp_path: Path) -> None:
    whole = built.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for number in range(120):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 60):
            damaged[position] = generator.integers(256)
        path = tmp_path / f"{number}.arrow"
        path.write_bytes(damaged)
        try:
            store = Store.open(path)
            assert all(store.sample(i).image.shape[0] == case.num_items for i, case in enumerate(store.cases))
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("one_person", [False, True])
def test_images_of_equal_content_under_two_subjects_are_refused_with_both_names(tmp_path: Path, one_person: bool) -> None:
    for name in ("a", "b"):
        for kind, data in {
            "image": np.arange(120, dtype=np.int16).reshape(6, 5, 4),
            "mask": np.eye(6)[:, :5, None] + np.zeros(4),
        }.items():
            nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}_{kind}.nii")
    shutil.copy(tmp_path / "a_mask.nii", tmp_path / "other_mask.nii")
    cases = [
        LabelledCase(
            name, [tmp_path / f"{name}_image.nii"], "p" if one_person else name, "", {"A": {"c": MaskFile(tmp_path / file)}}
        )
        for name, file in {"a": "a_mask.nii", "b": "other_mask.nii"}.items()
    ]
    if one_person:
        assert len(Store.open(build_store(tmp_path, cases, DATA, Preprocess())).cases) == 2
    else:
        with pytest.raises(UserError, match=r"the images of a \(a\) and b \(b\) are equal: one would train what the other tests"):
            build_store(tmp_path, cases, DATA, Preprocess())
