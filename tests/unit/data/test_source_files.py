"""PNG and TIFF: values and sizes come back as they were stored; what would not is refused by name, in one line."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from softseg_dist.data.source_files import read_picture
from softseg_dist.data.volume import read_geometry, read_volume, read_volumes, write_volume
from softseg_dist.errors import UserError

GRAY = np.arange(12, dtype=np.uint8).reshape(3, 4)  # 3 rows, 4 columns
RGB = np.stack([GRAY, GRAY + 100, GRAY * 20], axis=-1)
HALF_MM = 25.4 / 0.5  # dots per inch


def save(path: Path, *pages: np.ndarray, **options: Any) -> Path:
    first, *others = [Image.fromarray(page) for page in pages or (GRAY,)]
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, **({"dpi": (HALF_MM, 25.4)} | ({"append_images": others, "save_all": True} if others else {}) | options))
    return path


def refused(path: Path, *words: str, spacing_mm: tuple[float, ...] = ()) -> None:
    with pytest.raises(UserError) as caught:
        read_volume_of(path, spacing_mm)
    text = str(caught.value)
    assert path.name.partition("[")[0] in text
    assert "\n" not in text
    assert all(word in text for word in words), text


def read_volume_of(path: Path, spacing_mm: tuple[float, ...] = ()) -> Any:
    ((_, volume),) = read_volumes([path], spacing_mm)
    return volume


# --- values ---


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.TIFF"])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16"])
def test_gray_values_come_back(tmp_path: Path, name: str, dtype: str) -> None:
    pixels = (GRAY.astype(int) * {"bool": 1, "uint8": 20, "uint16": 5000}[dtype]).astype(dtype)
    data = read_volume(save(tmp_path / name, pixels)).data
    assert data.shape == (4, 3, 1)
    assert np.array_equal(data[:, ::-1, 0], pixels.T)


@pytest.mark.parametrize("dtype", ["int32", "float32", ">u2"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_tiff_keeps_integers_of_32_bits_and_fractions(tmp_path: Path, dtype: str, compression: str | None) -> None:
    pixels = ((GRAY.astype(float) - 3) * 1000.37).clip(0 if "u" in dtype else None).astype(dtype)
    assert np.array_equal(read_picture(save(tmp_path / "a.tif", pixels, compression=compression))[3][0, :, :, 0], pixels)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_colours_are_parts_and_an_opaque_alpha_is_none(tmp_path: Path, name: str) -> None:
    opaque = np.dstack([RGB, np.full_like(GRAY, 255)])
    for pixels in (RGB, opaque):
        path = save(tmp_path / name, pixels)
        for number in (0, 1, 2):
            assert np.array_equal(read_volume(Path(f"{path}[{number}]")).data[:, ::-1, 0], RGB[..., number].T)
        refused(path, f"got 4 x 3 x 1 x 3 in {path}; {name}[0] to [2] are its colours, a channel or mask each")
        refused(Path(f"{path}[3]"), f"no colour [3] in {path}, which has 3")
    opaque[1, 2, 3] = 254
    refused(Path(f"{save(path, opaque)}[0]"), "transparent")
    gray = np.dstack([GRAY, np.full_like(GRAY, 255)])
    assert np.array_equal(read_volume(save(path, gray)).data[:, ::-1, 0], GRAY.T)


def test_pages_of_a_tiff_are_slices(tmp_path: Path) -> None:
    pages = [GRAY, GRAY + 50, GRAY + 100, GRAY + 150]
    volume = read_volume_of(save(tmp_path / "a.tif", *pages), (0.5, 0.25, 3))
    assert np.array_equal(volume.data[:, ::-1], np.array(pages).T)
    assert volume.geometry.spacing_mm == (0.5, 0.25, 3)
    coloured = read_volume_of(Path(f"{save(tmp_path / 'c.tif', RGB, RGB + 9)}[1]"), (0.5, 0.25, 3))
    assert np.array_equal(coloured.data[:, ::-1], np.array([RGB[..., 1], RGB[..., 1] + 9]).T)


# --- places ---


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_x_runs_to_the_right_and_y_up_in_mm_of_the_resolution(tmp_path: Path, name: str) -> None:
    grid = read_geometry(save(tmp_path / name))
    assert grid.shape == (4, 3, 1)
    assert np.allclose(grid.affine, np.diag([0.5, -1, 1, 1]), rtol=1e-4)
    assert grid.orientation == "RPS"
    assert read_geometry(tmp_path / name, (2, 3)).spacing_mm == (2, 3, 1)


def test_a_resolution_per_cm_is_read(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", dpi=None, resolution=40, resolution_unit="cm")
    assert np.allclose(read_geometry(tmp_path / "a.tif").spacing_mm, (0.25, 0.25, 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {"dpi": None}),
        ("a.tif", {"dpi": None}),
        ("a.png", {"dpi": (72, 72)}),  # what drawing programs write
        ("a.png", {"dpi": (96, 96)}),
        ("a.tif", {"dpi": (1, 1)}),
        ("a.tif", {"dpi": None, "resolution": 40, "resolution_unit": 1}),  # without a unit
    ],
)
def test_a_picture_that_does_not_say_its_size_is_refused_and_told_what_to_give(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = save(tmp_path / name, **{key: value for key, value in options.items() if value is not None or key != "dpi"} | options)
    refused(path, "does not say the size of a voxel in mm: give spacing_mm=(x, y) of the data set")
    assert read_volume_of(path, (0.5, 0.5)).geometry.spacing_mm == (0.5, 0.5, 1)


def test_the_distance_of_pages_must_be_given(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", GRAY, GRAY)
    for known in ((), (0.5, 0.5)):
        refused(path, "give spacing_mm=(x, y) of the data set, for a stack (x, y, z)", spacing_mm=known)


def test_a_map_of_a_picture_is_a_nifti_file_on_its_grid(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path / "a.png"))
    write_volume(tmp_path / "map.nii.gz", volume.data, volume.geometry, like=tmp_path / "a.png")
    found = read_volume(tmp_path / "map.nii.gz")
    assert np.array_equal(found.data, volume.data)
    assert volume.geometry.difference(found.geometry) == ""


# --- what would not be read as it was stored ---


def png(path: Path, depth: int, kind: int, width: int, height: int, data: bytes) -> Path:
    """A PNG file by hand: bit depth and type of colour as in its specification."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    size = chunk(b"pHYs", struct.pack(">IIB", 2000, 2000, 1))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + size + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(("kind", "samples"), [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "gray and alpha"])
def test_colours_of_16_bits_which_pillow_cuts_to_8_are_refused(tmp_path: Path, kind: int, samples: int) -> None:
    rows = zlib.compress(b"".join(b"\0" + bytes(2 * samples * 4) for _ in range(3)))
    refused(png(tmp_path / "a.png", 16, kind, 4, 3, rows), "of several colours must have 8 bits for each")


def test_palettes_other_colours_and_animations_are_refused(tmp_path: Path) -> None:
    for name in ("p.png", "p.tif"):
        Image.fromarray(GRAY).convert("P").save(tmp_path / name, dpi=(99, 99))
        refused(tmp_path / name, "must be gray or RGB, not P (P is a palette)")
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "c.tif", dpi=(99, 99))
    refused(tmp_path / "c.tif", "must be gray or RGB, not CMYK")
    refused(save(tmp_path / "a.png", GRAY, GRAY + 9), "must not be an animation")


def tiff(path: Path, pixels: np.ndarray, **changed: int) -> Path:
    """A TIFF file by hand: one strip, little-endian; tags by number as in TIFF 6.0, but `changed`."""
    rows, columns, samples = (*pixels.shape, 1)[:3]
    bits = 8 * pixels.dtype.itemsize
    tags = {256: columns, 257: rows, 258: bits, 259: 1, 262: 1, 273: 8, 277: samples, 278: rows, 279: pixels.nbytes}
    tags |= {int(tag.removeprefix("tag")): value for tag, value in changed.items()}
    data = pixels.tobytes() + struct.pack(f"<{samples}H", *[bits] * samples)
    entries = b""
    for tag, value in sorted(tags.items()):
        count = samples if tag == 258 else 1
        position = 8 + pixels.nbytes if count > 2 else (bits << 16 | bits if count == 2 else value)
        entries += struct.pack("<HHII", tag, 4 if tag in (273, 279) or count > 2 else 3, count, position)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_a_tiff_whose_tags_change_what_its_samples_mean_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert np.array_equal(read_volume_of(tiff(path, GRAY), (1, 1)).data[:, ::-1, 0], GRAY.T)
    refused(tiff(path, GRAY, tag274=6), "must not be turned by a tag", spacing_mm=(1, 1))
    refused(tiff(path, GRAY, tag339=2), "must not have negative bytes", spacing_mm=(1, 1))
    refused(tiff(path, np.dstack([GRAY, GRAY]), tag338=0), "must have no samples but its colours", spacing_mm=(1, 1))


def test_pages_of_two_sizes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", GRAY, GRAY, GRAY[:2])  # a thumbnail behind the pages
    refused(path, "one size and kind, got another in page 3", spacing_mm=(1, 1, 1))
    refused(save(path, GRAY, GRAY.astype(np.float32)), "got another in page 2", spacing_mm=(1, 1, 1))


def test_a_float_picture_with_nan_is_refused(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.tif", np.full((3, 4), np.nan, np.float32)), "got 12 NaN or infinite of 12")


# --- what is broken ---


def test_a_picture_that_declares_more_than_it_has_is_refused_without_allocating(tmp_path: Path) -> None:
    tracemalloc.start()
    refused(png(tmp_path / "a.png", 8, 0, 60_000, 60_000, zlib.compress(bytes(9999))), "too large")
    refused(png(tmp_path / "b.png", 8, 0, 4, 3, zlib.compress(bytes(9))), "cut off")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_what_is_no_picture_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    refused(path, "a pointer of Git LFS")
    path.write_bytes(b"\x1f\x8b" + bytes(99))
    refused(path, "compressed by gzip")
    for content in (b"", b"GIF89a" + bytes(99), b"\x89PNG\r\n\x1a\n", b"II*\0" + bytes(40), bytes(999)):
        path.write_bytes(content)
        refused(path, "is cut off, too large, or no PNG or TIFF file")
    path.unlink()
    refused(path, "there is no file")
    path.mkdir()
    refused(path, "only regular files are read, got a folder")


@pytest.mark.parametrize("kind", ["gray.png", "rgb.png", "gray.tif", "lzw.tif", "stack.tif", "float.tif"])
def test_a_damaged_picture_gives_a_volume_or_one_line(tmp_path: Path, kind: str) -> None:
    name, _, end = kind.partition(".")
    pages = {"rgb": [RGB], "stack": [GRAY, GRAY], "float": [GRAY.astype(np.float32)]}.get(name, [GRAY])
    whole = save(tmp_path / f"a.{end}", *pages, **({"compression": "tiff_lzw"} if name == "lzw" else {})).read_bytes()
    path, draw = tmp_path / f"b.{end}[0]", random.Random(kind)
    for turn in range(50):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if turn % 3 == 0 else whole)
        for _ in range(draw.randrange(4) if damaged else 0):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / f"b.{end}").write_bytes(damaged)
        message = ""
        try:
            read_volume_of(path, (1, 1, 1))
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        assert not message or f"b.{end}" in message
