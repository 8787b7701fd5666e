"""NIfTI files: what is good comes back, what is not is refused by name before anything large happens."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softseg_dist.data.volume import Volume, read_geometry, read_volume, write_volume
from softseg_dist.errors import UserError

AFFINE = np.array([[-0.5, 0.02, 0, 10], [0.02, 0.5, 0.1, -20], [0, -0.02, 2.5, 5], [0, 0, 0, 1]])
DIM, DATATYPE, OFFSET, SLOPE, QFORM_CODE, SROW_X = 40, 70, 108, 112, 252, 280  # byte positions in a NIfTI-1 header


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE, kind: type = nib.Nifti1Image) -> Path:
    nib.save(kind(data, affine, dtype=data.dtype), path)
    return path


def ramp(shape: tuple[int, ...] = (4, 5, 6), dtype: str = "int16") -> np.ndarray:
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def patched(path: Path, position: int, layout: str, *values: float) -> Path:
    """The file with a few bytes of its header replaced."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    changed = bytearray(raw)
    struct.pack_into(layout, changed, position, *values)
    path.write_bytes(gzip.compress(bytes(changed)) if path.suffix == ".gz" else bytes(changed))
    return path


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))), ids=str)
def test_canonical_order_is_that_of_nibabel_and_leads_back(tmp_path: Path, axes: tuple[int, ...]) -> None:
    for signs in itertools.product((1, -1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = AFFINE[:3, :3][:, axes] * signs
        path = save(tmp_path / "a.nii", ramp(), affine)
        expected = nib.as_closest_canonical(nib.load(path))
        volume = read_volume(path)
        assert np.allclose(volume.geometry.canonical_affine, expected.affine, atol=1e-6)
        assert np.array_equal(volume.data, expected.get_fdata(dtype=np.float32))
        assert volume.geometry.orientation == "".join(nib.aff2axcodes(affine))
        write_volume(tmp_path / "b.nii.gz", volume.data, volume.geometry)
        back = nib.load(tmp_path / "b.nii.gz")
        assert np.array_equal(back.get_fdata(), ramp())
        assert np.allclose(back.affine, affine, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64", "uint64"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_allowed_number_type_is_read(tmp_path: Path, dtype: str, kind: type) -> None:
    volume = read_volume(save(tmp_path / "a.nii.gz", ramp(dtype=dtype), np.eye(4), kind))
    assert np.array_equal(volume.data, ramp())
    assert volume.data.dtype == np.float32


def test_big_endian_and_scaled_voxels_are_read(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(dtype=">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "a.nii")
    raw = nib.load(tmp_path / "a.nii")
    assert np.allclose(read_volume(tmp_path / "a.nii").data, raw.get_fdata())


def test_trailing_axes_of_one_are_dropped_and_missing_ones_added(tmp_path: Path) -> None:
    assert read_geometry(save(tmp_path / "a.nii", ramp((3, 4, 5, 1, 1)), np.eye(4))).shape == (3, 4, 5)
    assert read_geometry(save(tmp_path / "b.nii", ramp((3, 4)), np.eye(4))).shape == (3, 4, 1)


def test_soft_labels_are_bit_exact(tmp_path: Path) -> None:
    soft = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    assert np.array_equal(read_volume(save(tmp_path / "a.nii.gz", soft, np.eye(4))).data, soft)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_volume(path)
    text = str(caught.value)
    assert path.name in text
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_four_dimensions_are_refused(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii.gz", ramp((3, 4, 5, 2))), "3 dimensions", "3 x 4 x 5 x 2")


@pytest.mark.parametrize(("bad", "count"), [(np.nan, 2), (np.inf, 1)])
def test_non_finite_voxels_are_refused_with_their_number(tmp_path: Path, bad: float, count: int) -> None:
    data = ramp(dtype="float32")
    data.flat[:count] = bad
    refused(save(tmp_path / "a.nii", data), f"got {count} NaN or infinite of 120")


@pytest.mark.parametrize("dtype", ["complex64", [("R", "u1"), ("G", "u1"), ("B", "u1")]], ids=["complex", "colour"])
def test_complex_and_colour_voxels_are_refused(tmp_path: Path, dtype: object) -> None:
    refused(save(tmp_path / "a.nii", np.zeros((2, 2, 2), dtype=dtype)), "data type")


@pytest.mark.parametrize("keep", [0, 5, 100, 400, -9])
def test_a_truncated_gzip_is_refused(tmp_path: Path, keep: int) -> None:
    noise = np.random.default_rng(0).integers(0, 99, (9, 9, 9), dtype=np.int16)
    path = save(tmp_path / "a.nii.gz", noise)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "cut off")


def test_a_corrupt_gzip_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 99, (9, 9, 9), dtype=np.int16))
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0xFF  # the checksum
    path.write_bytes(raw)
    refused(path, "corrupt")


def test_a_truncated_plain_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp())
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "cut off", f"{352 + 240} bytes are declared", f"the file has {352 + 239}")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_is_no_nifti_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1" + bytes(600))
    with pytest.raises(UserError, match=name):
        read_volume(tmp_path / name)


def test_a_missing_file_a_folder_and_a_dead_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere")
    for name in ("none.nii", "folder.nii", "link.nii.gz"):
        refused(tmp_path / name)
    refused(tmp_path / "link.nii.gz", "link leads nowhere")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dims", [(32767, 32767, 32767), (32767, 32767, 1), (2000, 1000, 1000)], ids=str)
def test_a_small_file_that_declares_a_huge_one_is_refused_without_allocating(
    tmp_path: Path, name: str, dims: tuple[int, int, int]
) -> None:
    path = patched(save(tmp_path / name, np.zeros((40, 50, 60), np.int16)), DIM, "<4h", 3, *dims)
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_gzip_bomb_is_not_inflated_beyond_what_its_header_declares(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp((8, 8, 8)))
    bomb = tmp_path / "b.nii.gz"
    bomb.write_bytes(gzip.compress(path.read_bytes() + bytes(50_000_000), 1))
    tracemalloc.start()
    assert read_volume(bomb).data.shape == (8, 8, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("position", "layout", "values"),
    [
        (SROW_X, "<4f", (np.nan, 0, 0, 0)),
        (SROW_X, "<4f", (0, 0, 0, 0)),
        (SROW_X, "<4f", (1e30, 0, 0, 0)),
        (OFFSET, "<f", (1e30,)),
        (OFFSET, "<f", (-5,)),
        (SLOPE, "<2f", (np.inf, 0)),
        (DATATYPE, "<h", (0,)),
        (DIM, "<4h", (3, -4, 5, 6)),
        (DIM, "<h", (0,)),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, position: int, layout: str, values: tuple[float, ...]) -> None:
    refused(patched(save(tmp_path / "a.nii.gz", ramp()), position, layout, *values))


def test_sform_and_qform_that_disagree_are_refused_and_both_shown(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(), np.diag([1.0, 1, 1, 1]))
    image.set_qform(np.diag([1.0, 1, 1.5, 1]), code=1)
    image.set_sform(np.diag([1.0, 1, 1, 1]), code=1)
    nib.save(image, tmp_path / "a.nii")
    refused(tmp_path / "a.nii", "sform [1 0 0 0", "qform [1 0 0 0", "0 0 1.5 0", "2.5 mm")


def test_a_sform_without_a_code_does_not_count(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(), np.eye(4))
    image.set_qform(np.diag([2.0, 2, 2, 1]), code=1)
    image.set_sform(np.eye(4), code=0)
    nib.save(image, tmp_path / "a.nii")
    assert read_geometry(tmp_path / "a.nii").spacing_mm == (2.0, 2.0, 2.0)


def test_a_sheared_grid_is_written_so_that_it_can_be_read_again(tmp_path: Path) -> None:
    sheared = np.array([[1, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(ramp(), sheared)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    write_volume(tmp_path / "b.nii", volume.data, volume.geometry)
    assert read_geometry(tmp_path / "b.nii").difference(volume.geometry) == ""


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize(("qform", "sform"), [(1, 4), (2, 0), (0, 3), (0, 0)])
def test_a_map_lies_where_its_image_lies_to_the_last_bit(
    tmp_path: Path, kind: type, endianness: str, qform: int, sform: int
) -> None:
    image = kind(ramp(), AFFINE, kind.header_class(endianness=endianness))
    image.set_qform(AFFINE, code=qform)
    image.set_sform(AFFINE, code=sform)
    image.header.set_xyzt_units("micron", "msec")
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "image.nii")
    geometry = read_geometry(tmp_path / "image.nii")
    soft = np.random.default_rng(0).random(geometry.canonical_shape, dtype=np.float32)
    for name, data in {"soft.nii.gz": soft, "mask.nii": (soft > 0.5).astype(np.uint8)}.items():
        write_volume(tmp_path / name, data, geometry, like=tmp_path / "image.nii")
        before, after = nib.load(tmp_path / "image.nii"), nib.load(tmp_path / name)
        assert type(after) is kind
        assert after.get_data_dtype() == data.dtype
        assert np.array_equal(read_volume(tmp_path / name).data, data)
        assert np.array_equal(after.affine, before.affine)
        for form in ("get_qform", "get_sform"):
            (one, code), (other, other_code) = getattr(before, form)(coded=True), getattr(after, form)(coded=True)
            assert code == other_code
            assert one is None or np.array_equal(one, other)
        assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
        assert np.array_equal(after.header.get_zooms(), before.header.get_zooms())


@given(st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), max_size=12), st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_gives_a_volume_or_a_user_error(tmp_path: Path, changes: list[tuple[int, int]], compressed: bool) -> None:
    raw = bytearray(nib.Nifti1Image(ramp(), AFFINE).to_bytes())
    for position, value in changes:
        raw[position] = value
    path = tmp_path / ("f.nii.gz" if compressed else "f.nii")
    path.write_bytes(gzip.compress(bytes(raw), 1) if compressed else bytes(raw))
    with contextlib.suppress(UserError):  # every other exception fails the test
        volume = read_volume(path)
        assert isinstance(volume, Volume)
        assert np.isfinite(volume.data).all()
        assert volume.data.size <= len(raw)


@pytest.mark.data
def test_real_images_read_as_nibabel_reads_them(real_data: Path) -> None:
    paths = sorted(real_data.glob("*/sub-*/anat/*.nii.gz"))[:12]
    assert paths
    for path in paths:
        expected = nib.as_closest_canonical(nib.load(path))
        volume = read_volume(path)
        assert np.array_equal(volume.data, expected.get_fdata(dtype=np.float32))
        assert np.allclose(volume.geometry.canonical_affine, expected.affine, atol=1e-5)
