"""NIfTI files: what is good comes back, what is not is refused by name before anything large happens."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softseg_dist.data.processes import free_bytes
from softseg_dist.data.source_files import sha256_of
from softseg_dist.data.volume import Volume, image_of, read_geometry, read_volume, read_volumes, volume_of, write_volume
from softseg_dist.errors import UserError

AFFINE = np.array([[-0.5, 0.02, 0, 10], [0.02, 0.5, 0.1, -20], [0, -0.02, 2.5, 5], [0, 0, 0, 1]])
DIM, DATATYPE, PIXDIM, OFFSET, SLOPE, UNITS, QUATERNION, SROW_X = 40, 70, 76, 108, 112, 123, 256, 280  # bytes of a NIfTI-1 header


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


def test_four_dimensions_are_refused_where_no_volume_is_named_and_five_always(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", ramp((3, 4, 5, 2)))
    refused(path, "3 dimensions", "3 x 4 x 5 x 2", "a.nii.gz[0] to [1] are its volumes, a channel or mask each")
    with pytest.raises(UserError, match=r"there is no volume \[2\] in .*a.nii.gz, which has 2, counted from \[0\]"):
        read_geometry(tmp_path / "a.nii.gz[2]")
    refused(save(tmp_path / "b.nii.gz", ramp((3, 4, 5, 2, 2))), "3 or 4 dimensions", "3 x 4 x 5 x 2 x 2")


@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (3, 4, 5, 1, 3), (3, 4, 1, 3)], ids=str)
def test_volumes_of_a_4d_file_are_read_by_number_with_scale_and_axis_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = nib.Nifti1Image(ramp(shape), AFFINE)
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "a.nii.gz")
    paths = [tmp_path / f"a.nii.gz[{number}]" for number in (2, 0)]
    found = dict(read_volumes([*paths, paths[0]]))
    expected = ramp(shape).reshape(*shape[:3], 3)[::-1] * 0.5 + 3  # x runs to the left
    assert list(found) == paths[::-1], "in the order of the file"
    for path, number in zip(paths, (2, 0), strict=True):
        assert np.array_equal(found[path].data, expected[..., number])
        assert np.array_equal(read_volume(path).data, expected[..., number])
        assert read_geometry(path).shape == shape[:3]


def test_the_volume_of_a_3d_file_is_number_0(tmp_path: Path) -> None:
    save(tmp_path / "a.nii", ramp(), np.eye(4))
    assert np.array_equal(read_volume(tmp_path / "a.nii[0]").data, ramp())


def test_a_4d_file_is_inflated_once_and_no_further_than_the_last_volume_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 9, (16, 16, 16, 40), dtype=np.int16)
    path = save(tmp_path / "a.nii.gz", noise, np.eye(4))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # the first volumes are there
    opens, opener = list[Path](), Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **more: (opens.append(path), opener(path, *args, **more))[1])
    found = dict(read_volumes(tmp_path / f"a.nii.gz[{number}]" for number in (1, 3)))
    assert [np.array_equal(volume.data, noise[..., at]) for volume, at in zip(found.values(), (1, 3), strict=True)] == [True] * 2
    assert opens.count(path) == 2, "once for the header, once for the voxels"
    with pytest.raises(UserError, match="cut off"):
        read_volume(tmp_path / "a.nii.gz[39]")


def test_a_plain_4d_file_that_is_cut_off_is_refused_by_its_header(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp((3, 4, 5, 2)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"cut off.* {352 + 240} bytes are declared"):
        read_geometry(tmp_path / "a.nii[0]")


def test_a_map_lies_on_the_grid_of_the_4d_file_that_its_image_is_a_volume_of(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", ramp((3, 4, 5, 2)))
    volume = read_volume(tmp_path / "a.nii.gz[1]")
    write_volume(tmp_path / "map.nii.gz", volume.data, volume.geometry, like=tmp_path / "a.nii.gz[1]")
    assert np.array_equal(nib.load(tmp_path / "map.nii.gz").get_fdata(), ramp((3, 4, 5, 2))[..., 1])
    assert np.array_equal(nib.load(tmp_path / "map.nii.gz").affine, nib.load(tmp_path / "a.nii.gz").affine)


@pytest.mark.parametrize(("bad", "count"), [(np.nan, 2), (np.inf, 1)])
def test_non_finite_voxels_are_refused_with_their_number(tmp_path: Path, bad: float, count: int) -> None:
    data = ramp(dtype="float32")
    data.flat[:count] = bad
    refused(save(tmp_path / "a.nii", data), f"got {count} NaN or infinite of 120")


@pytest.mark.parametrize("mark", [np.finfo(np.float32).min, np.finfo(np.float32).max, -2e30])
def test_a_mark_of_what_was_not_measured_is_called_so(tmp_path: Path, mark: float) -> None:
    data = ramp(dtype="float32")
    data.flat[:7] = mark
    refused(save(tmp_path / "a.nii", data), f"got {mark:g} in 7 of 120 voxels", "a mark of what was not measured")
    data.flat[:7] = mark / abs(mark) * 9e29
    assert np.array_equal(read_volume(save(tmp_path / "b.nii", data, np.eye(4))).data, data)


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


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(("kind", "slope"), [(np.float32, 1), (np.float64, 1), (np.int16, 0.5), (np.uint8, 1)])
def test_reading_holds_little_more_than_the_volume(tmp_path: Path, name: str, kind: type, slope: float) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 200, (64, 80, 100)).astype(kind), np.diag([-1, 1, 1, 1]))
    image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / name)
    read_volume(tmp_path / name)  # imports
    tracemalloc.start()
    found = read_volume(tmp_path / name).data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * found.nbytes
    np.testing.assert_array_equal(found, nib.as_closest_canonical(nib.load(tmp_path / name)).get_fdata(dtype=np.float32))


def test_a_volume_that_the_memory_cannot_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.nii", ramp((64, 64, 64)))
    monkeypatch.setattr("softseg_dist.data.volume.free_bytes", lambda: 2.0**19)
    refused(path, "takes 0.000977 GB of memory, 0.000488 GB are free")
    monkeypatch.setattr("softseg_dist.data.volume.free_bytes", lambda: 2.0**21)
    read_volume(path)
    assert 2**20 < free_bytes() < 2**50


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


def placed(path: Path, affine: np.ndarray, qform: int = 1, sform: int = 1, shape: tuple[int, ...] = (4, 5, 6)) -> Path:
    """A file whose header says `affine` in the forms that have a code."""
    image = nib.Nifti1Image(ramp(shape), affine)
    image.set_qform(affine, code=qform)
    image.set_sform(affine, code=sform)
    nib.save(image, path)
    return path


def written_like(path: Path) -> Path:
    """A map on the grid of `path`, of which only the place is copied."""
    geometry, out = read_geometry(path), path.with_name("written.nii")
    write_volume(out, np.ones(geometry.canonical_shape, np.uint8), geometry, like=path)
    return out


ABOUT_Z = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 20], [0, 0, 2, -7], [0, 0, 0, 1]])  # a rotation by 180 degrees


@pytest.mark.parametrize(
    ("position", "layout", "values", "meant", "sform"),
    [
        (PIXDIM, "<f", (0,), (1,), 0),
        (PIXDIM, "<f", (0,), (1,), 1),
        (PIXDIM, "<f", (np.nan,), (1,), 1),
        (PIXDIM, "<f", (-0.5,), (-1,), 0),
        (QUATERNION, "<3f", (0, 0, 1.0000004), (0, 0, 1), 0),
        (QUATERNION, "<3f", (0, 0, 1.0000004), (0, 0, 1), 1),
        (QUATERNION, "<3f", (0, 0, 1.000004), (0, 0, 1), 0),
    ],
)
def test_a_qfac_of_0_and_a_rounded_quaternion_are_read_and_written_as_what_they_mean(
    tmp_path: Path, position: int, layout: str, values: tuple[float, ...], meant: tuple[float, ...], sform: int
) -> None:
    plain = patched(placed(tmp_path / "plain.nii", ABOUT_Z, sform=0), position, layout, *meant)
    path = patched(placed(tmp_path / "a.nii", ABOUT_Z, sform=sform), position, layout, *values)
    for each in (path, written_like(path)):
        assert np.allclose(read_geometry(each).affine, read_geometry(plain).affine, atol=1e-6)
    assert np.allclose(nib.load(tmp_path / "written.nii").affine, nib.load(plain).affine, atol=1e-6)


@pytest.mark.parametrize("size", [0, np.nan, -1])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1)], ids=str)
def test_the_voxel_size_along_an_axis_that_there_is_not_is_1(tmp_path: Path, size: float, shape: tuple[int, ...]) -> None:
    image = nib.Nifti1Image(ramp(shape), None)
    image.header["qform_code"] = 1
    nib.save(image, tmp_path / "a.nii")
    path = patched(tmp_path / "a.nii", PIXDIM + 4, "<3f", 0.5, 0.5, size)
    assert read_geometry(path).spacing_mm == (0.5, 0.5, 1)
    assert read_geometry(written_like(path)).spacing_mm == (0.5, 0.5, 1)
    refused(patched(placed(tmp_path / "b.nii", np.eye(4), sform=0), PIXDIM + 12, "<f", size), "got the qform" if size != -1 else "")


@pytest.mark.parametrize(("unit", "mm"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (11, 0.001)])
@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 1), (1, 1), (0, 0)])
def test_lengths_are_in_mm_whatever_unit_the_header_gives_them_in(
    tmp_path: Path, unit: int, mm: float, qform: int, sform: int
) -> None:
    in_mm = ABOUT_Z if qform or sform else nib.Nifti1Image(ramp(), np.diag([1.0, 1, 2, 1])).header.get_base_affine()
    affine = np.diag([1 / mm] * 3 + [1]) @ ABOUT_Z
    path = patched(placed(tmp_path / "a.nii", affine, qform, sform), UNITS, "<B", unit)
    geometry = read_geometry(path)
    assert np.allclose(geometry.spacing_mm, (1, 1, 2), atol=1e-6)
    if qform or sform:
        assert np.allclose(geometry.affine, in_mm, atol=1e-4)
    out = written_like(path)
    assert np.array_equal(nib.load(out).affine, nib.load(path).affine)  # to the last bit, in the unit of the source
    assert nib.load(out).header["xyzt_units"] == unit
    assert read_geometry(out).difference(geometry) == ""
    write_volume(tmp_path / "plain.nii", np.ones(geometry.canonical_shape, np.uint8), geometry)
    assert np.allclose(nib.load(tmp_path / "plain.nii").affine, geometry.affine, atol=1e-4)
    assert nib.load(tmp_path / "plain.nii").header.get_xyzt_units()[0] == "mm"


def test_an_image_in_memory_has_its_lengths_in_mm_and_its_map_in_its_own_unit() -> None:
    image = nib.Nifti1Image(ramp(), np.diag([500.0, 500, 1000, 1]))
    image.header.set_xyzt_units("micron")
    volume = volume_of(image)
    assert volume.geometry.spacing_mm == (0.5, 0.5, 1)
    made = image_of(np.ones((1, 4, 5, 6), np.float32), volume.geometry, image)
    assert np.array_equal(made.affine, image.affine)
    assert made.header.get_xyzt_units()[0] == "micron"


@pytest.mark.parametrize("quaternion", [(0, 0, 1.2), (np.nan, 0, 0), (9, 9, 9)])
def test_a_qform_that_is_no_rotation_does_not_count_beside_a_valid_sform(tmp_path: Path, quaternion: tuple[float, ...]) -> None:
    path = patched(placed(tmp_path / "a.nii", ABOUT_Z), QUATERNION, "<3f", *quaternion)
    for each in (path, written_like(path)):
        assert np.array_equal(read_geometry(each).affine, ABOUT_Z)
    refused(patched(placed(tmp_path / "b.nii", ABOUT_Z, sform=0), QUATERNION, "<3f", *quaternion))
    refused(patched(path, SROW_X, "<4f", 0, 0, 0, 0), "got the sform")  # and no invalid sform is passed over


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_file_is_inflated_if_it_begins_as_gzip_does_whatever_its_name_says(tmp_path: Path, name: str) -> None:
    raw = nib.Nifti1Image(ramp(), np.eye(4)).to_bytes()
    (tmp_path / name).write_bytes(raw if name.endswith(".gz") else gzip.compress(raw))
    assert np.array_equal(read_volume(tmp_path / name).data, ramp())
    big = bytearray(nib.Nifti1Image(np.zeros((40, 50, 60), np.int16), np.eye(4)).to_bytes())
    struct.pack_into("<4h", big, DIM, 3, 300, 300, 300)
    (tmp_path / name).write_bytes(gzip.compress(big) if name.endswith(".gz") else bytes(big))
    refused(tmp_path / name, "is cut off, or its header is wrong" if name == "a.nii" else "cut off")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("/annex/objects/MD5E-s115--0ccac146d107ecea40039e0fb1e1806c.nii.gz\n", ["pointer of git-annex", "git annex get"]),
        (f"../../.git/annex/objects/xx/{'k' * 350}.nii.gz", ["pointer of git-annex", "git annex get"]),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", ["pointer of Git LFS", "git lfs pull"]),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_pointer_is_called_what_it_is_and_what_to_do(tmp_path: Path, content: str, words: list[str], name: str) -> None:
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, *words)


@pytest.mark.timeout(20)
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "good.nii").symlink_to(save(tmp_path / "real.nii", ramp()))
    for name, kind in {"pipe.nii.gz": "a pipe", "zero.nii": "a device", "folder.nii": "a folder"}.items():
        refused(tmp_path / name, f"only regular files are read, got {kind}")
        with pytest.raises(UserError, match=f"got {kind}"):
            sha256_of(tmp_path / name)
    assert np.array_equal(read_volume(tmp_path / "good.nii").data, read_volume(tmp_path / "real.nii").data)


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
