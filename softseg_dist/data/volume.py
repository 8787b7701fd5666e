"""NIfTI files and pictures, read with suspicion: limits are checked on the header before anything is allocated or inflated.

The only module that knows nibabel. Single files only (`.nii`, `.nii.gz`; NIfTI-1 and NIfTI-2, either byte order). In
memory, volumes are float32 in canonical axis order (RAS+, see `geometry`), and lengths are in mm, whatever the header's unit is.
A path may end in [2]: that volume of a 4-D file, or that colour of a picture (PNG, TIFF), counted from 0.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from softseg_dist.data.geometry import Affine4, Geometry, Shape3, corners_apart_mm, spacing_of
from softseg_dist.data.processes import free_bytes
from softseg_dist.data.source_files import MAX_VOXELS, PICTURES, opened, part_of, pointer, read_exactly, read_picture, split_part
from softseg_dist.errors import UserError
from softseg_dist.places import replace_file
from softseg_dist.words import dimensions

MAX_VALUE = 1e30  # no scanner measures it: -3.4e38, the lowest float32, marks what was not measured
SCALE_ROUNDING = 2.0**-22  # slope and intercept are float32, which makes 0 such a part of the intercept
MAX_SKIP = 2**24  # bytes of header extensions before the voxels
DEFLATE_RATIO = 1032  # gzip cannot make data smaller than this (zlib technical details), so a larger size is false
DATA_TYPES = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)  # NIfTI codes of integers, float32 and float64
HEADERS = {348: (nib.Nifti1Header, 344, b"n+1"), 540: (nib.Nifti2Header, 4, b"n+2")}  # size -> class, where its magic is, magic
MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # of the units in which a header may give lengths: metre, millimetre, micrometre; else mm
QUATERNION_ROUNDING = 1e-5  # by how much the squares of a quaternion's numbers may exceed 1
QUATERNION = ("quatern_b", "quatern_c", "quatern_d")
QFORM = ("qform_code", *QUATERNION, "qoffset_x", "qoffset_y", "qoffset_z")
PLACE = ("pixdim", *QFORM, "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units")  # header fields: where a volume lies


@dataclass(frozen=True, eq=False)
class Volume:
    """A file: `data` [X Y Z] float32 in canonical order, `geometry` as stored."""

    data: NDArray[np.float32]
    geometry: Geometry


def read_geometry(path: Path, spacing_mm: Sequence[float] = ()) -> Geometry:
    """The grid of a file in mm; reads the header only.

    `spacing_mm` is that of a picture along columns, rows and pages, whatever the file says; () takes what it says. There x runs to
    the right and y up; a single page is 1 mm thick if nothing says more. Raises UserError naming the file if it is missing, no
    regular file or not of its format, or if the header declares several volumes of which the path names none, more than
    `MAX_VOXELS`, more than the file can hold, complex or colour voxels, a singular or non-finite affine, or two affines that
    disagree. A qform that is no rotation does not count beside a valid sform.
    """
    file, part = part_of(path)
    return _header_of(file, [part], spacing_mm)[1]


def _header_of(file: Path, parts: Collection[int | None], spacing_mm: Sequence[float]) -> tuple[nib.Nifti1Header | None, Geometry]:
    """The header, if it is one of NIfTI, and the grid of a file that has all these parts."""
    raw, geometry, number = _picture_header(file, spacing_mm) if is_picture(file) else _read_header(file)
    what = "colour" if raw is None else "volume"
    if None in parts and number > 1:
        got = f"got {dimensions((*geometry.shape, number))} in {file}; {file.name}[0] to [{number - 1}]"
        raise UserError(f"images must have 3 dimensions, {got} are its {what}s, a channel or mask each: name them, or split it")
    if (last := max(part or 0 for part in parts)) >= number:
        raise UserError(f"there is no {what} [{last}] in {file}, which has {number}, counted from [0]")
    return raw, geometry


def _picture_header(path: Path, spacing_mm: Sequence[float]) -> tuple[None, Geometry, int]:
    shape, number, pixel_mm, _ = read_picture(path, header_only=True)
    if len(size := spacing_mm or pixel_mm) < (3 if shape[2] > 1 else 2):
        give = "give spacing_mm=(x, y) of the data set, for a stack (x, y, z) (predict: --spacing-mm x,y), or save it with its size"
        raise UserError(f"{path} does not say the size of a voxel in mm: {give}")
    x, y, z = (*size, 1.0)[:3]
    return None, Geometry(shape, np.diag((x, -y, z, 1.0))), number


def read_volume(path: Path) -> Volume:
    """The voxels of a file.

    Raises UserError as `read_geometry` does, and if the file is cut off or corrupt, or a voxel is NaN, infinite or beyond
    `MAX_VALUE`.
    """
    ((_, volume),) = read_volumes([path])
    return volume


def read_volumes(paths: Iterable[Path], spacing_mm: Sequence[float] = ()) -> Iterator[tuple[Path, Volume]]:
    """`read_volume` of each path, which comes with it. A file is read once, up to the last volume that is asked for."""
    parts = {path: part_of(path) for path in paths}
    for file in dict.fromkeys(file for file, _ in parts.values()):
        numbers = {path: number for path, (of_file, number) in parts.items() if of_file == file}
        raw, geometry = _header_of(file, numbers.values(), spacing_mm)
        for at, volume in _stored(file, raw, geometry, sorted({number or 0 for number in numbers.values()})):
            yield from ((path, volume) for path, number in numbers.items() if (number or 0) == at)


def _stored(path: Path, raw: nib.Nifti1Header | None, geometry: Geometry, numbers: Sequence[int]) -> Iterator[tuple[int, Volume]]:
    if raw is None:
        pixels = read_picture(path)[3]
        yield from ((at, _finite(geometry.to_canonical(pixels[..., at].T), geometry, path)) for at in numbers)
        return
    num_voxels, free = math.prod(geometry.shape), free_bytes()
    if (needed := 4 * num_voxels) > free:  # as float32
        raise UserError(f"{path} takes {needed / 2**30:.3g} GB of memory, {free / 2**30:.3g} GB are free: crop it, or free some")
    with opened(path) as (file, _):
        for at in numbers:
            file.seek(int(raw["vox_offset"]) + at * num_voxels * int(raw.get_data_dtype().itemsize))
            yield at, _read(file, raw, geometry, path)
        read_exactly(file, 1, path, at_least=0)  # at the end of a gzip file this compares the checksum


def _read(file: BinaryIO, raw: nib.Nifti1Header, geometry: Geometry, path: Path) -> Volume:
    """The next volume of a file, plane by plane: no more than one is in memory beside it."""
    data, kind, (slope, intercept) = np.empty(geometry.canonical_shape, np.float32), raw.get_data_dtype(), _scaling(raw, path)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, and refused below
        for plane in np.moveaxis(geometry.from_canonical(data), 2, 0):
            read = read_exactly(file, plane.size * kind.itemsize, path)
            values: NDArray[Any] = np.frombuffer(read, kind).reshape(plane.shape, order="F")
            if (slope, intercept) != (1.0, 0.0):
                values = values.astype(np.float64)
                values *= slope
                values += intercept
                values[np.abs(values) <= SCALE_ROUNDING * abs(intercept)] = 0  # it was 0 before a tool chose this scale
            plane[...] = values
    return _finite(data, geometry, path)


def _finite(values: NDArray[Any], geometry: Geometry, name: object) -> Volume:
    """Canonical `values` as a volume; in float32 an overflow is infinite, which is refused."""
    with np.errstate(over="ignore", invalid="ignore"):
        data = np.asarray(values, dtype=np.float32, order="C")
    low, high = float(data.min()), float(data.max())
    if not (low >= -MAX_VALUE and high <= MAX_VALUE):  # also if one is NaN
        if bad := int(data.size - np.count_nonzero(np.isfinite(data))):
            raise UserError(f"voxels must be finite numbers, got {bad} NaN or infinite of {data.size} in {name}")
        mark = low if low < -MAX_VALUE else high
        got = f"got {mark:g} in {np.count_nonzero(data == mark)} of {data.size} voxels of {name}"
        why = "a mark of what was not measured? give such voxels the value of air"
        raise UserError(f"voxels must lie within {MAX_VALUE:g} of 0, {got}: {why}")
    return Volume(data, geometry)


def volume_of(image: Any, affine: Affine4 | None = None, name: str = "image") -> Volume:
    """A nibabel image in memory, or an array [i j k] with its `affine` [4 4], which takes a voxel index to mm.

    Raises UserError, in which `name` stands for the image, as `read_volume` does.
    """
    stored: Any = image if is_image(image) else np.asarray(image)
    kind = stored.get_data_dtype() if is_image(image) else stored.dtype
    if kind.kind not in "buif" or any(n > 1 for n in stored.shape[3:]) or 0 in (*stored.shape, len(stored.shape)):
        raise UserError(f"{name} must have 3 dimensions of real numbers, got {dimensions(stored.shape)} of {kind}")
    x, y, z = (*stored.shape, 1, 1)[:3]
    values = stored.get_fdata(dtype=np.float64, caching="unchanged") if is_image(image) else stored
    if is_image(image) and isinstance(image.header, nib.Nifti1Header):
        found = _affine(image.header, (x, y, z), Path(name))
    else:
        found = np.asarray(image.affine if is_image(image) else affine, dtype=np.float64)
    if found.shape != (4, 4) or not _is_invertible(found):
        raise UserError(f"the affine must be finite, invertible and of 4 x 4 numbers, got {found.tolist()} for {name}")
    geometry = Geometry((x, y, z), found)
    return _finite(geometry.to_canonical(values.reshape(x, y, z)), geometry, name)


def stem_of(path: Path) -> str:
    """The name of an image's file without its suffix."""
    return re.sub(r"(?:\.nii(?:\.gz)?|(?i:\.png|\.tiff?))$", "", split_part(path.name)[0])


def is_picture(path: Path) -> bool:
    """Whether a path is that of a PNG or TIFF file, or of one of its colours, by its name."""
    return split_part(path.name)[0].lower().endswith(PICTURES)


def is_image(thing: object) -> bool:
    """Whether `thing` is a nibabel image with a place in space."""
    return isinstance(thing, nib.spatialimages.SpatialImage)


def image_of(maps: NDArray[np.float32], geometry: Geometry, like: Any) -> Any:
    """`maps` [K X Y Z] (canonical) as a nibabel image on the grid of `like`: [i j k], or [i j k K] for several.

    Of a NIfTI image qform, sform, their codes and the units are copied, as `write_volume` does.
    """
    stored = np.ascontiguousarray(np.moveaxis(geometry.from_canonical(maps), 0, -1))
    stored = stored[..., 0] if len(maps) == 1 else stored
    return _image_like(stored, like.header) if isinstance(like.header, nib.Nifti1Header) else _image(stored, geometry)


def write_volume(path: Path, data: NDArray[np.float32] | NDArray[np.uint8], geometry: Geometry, like: Path | None = None) -> None:
    """Write `data` [X Y Z] (canonical; float32 or uint8) as NIfTI in the orientation and grid of `geometry`; atomic.

    `like` is a file on that grid: its qform and sform, their codes and its units are copied to the last bit, so that every tool
    puts the two at one place. Without it both forms say what `geometry` says. Raises UserError if the file cannot be written.
    """
    assert data.shape == geometry.canonical_shape, f"{data.shape} is not the grid {geometry.canonical_shape} of {path}"
    stored = np.ascontiguousarray(geometry.from_canonical(data))
    image = _image(stored, geometry) if like is None or is_picture(like) else _image_like(stored, _raw_header(part_of(like)[0])[0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda partial: nib.save(image, partial))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _image(stored: NDArray[Any], geometry: Geometry) -> nib.Nifti1Image:
    image = nib.Nifti1Image(stored, geometry.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code=1)
    image.set_qform(geometry.affine, code=1, strip_shears=True)
    if corners_apart_mm(geometry.shape, geometry.affine, image.get_qform()):
        image.header["qform_code"] = 0  # a qform cannot hold shears
    return image


def _image_like(stored: NDArray[Any], raw: nib.Nifti1Header) -> nib.Nifti1Image:
    header, placed = type(raw)(), _normalised(raw)
    for name in PLACE:
        header[name] = placed[name]
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(stored, header.get_best_affine(), header)  # with another affine, nibabel would write both forms anew


def _raw_header(path: Path) -> tuple[nib.Nifti1Header, bool]:
    """The header as it is stored, in its byte order, and if the file is compressed; only that it is one has been checked."""
    if not path.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"an image must be a .nii or .nii.gz file, got {path}")
    with opened(path) as (file, is_gzip):
        block = read_exactly(file, 540, path, at_least=348)
    sizes = {int.from_bytes(block[:4], order): order for order in ("big", "little")}
    for size, (kind, at, magic) in HEADERS.items():
        if size in sizes and len(block) >= size and block[at : at + len(magic)] == magic:
            return kind(block[:size], endianness=sizes[size], check=False), is_gzip
    reason = pointer(block) or "not a NIfTI file (or one of a .hdr/.img pair): its header does not start as one"
    raise UserError(f"{path} is {reason}")


def _read_header(path: Path) -> tuple[nib.Nifti1Header, Geometry, int]:
    """A header that has been checked, its grid, and the number of volumes."""
    raw, is_gzip = _raw_header(path)
    shape, number = _shape(raw, path)
    if (code := int(raw["datatype"])) not in DATA_TYPES:
        raise UserError(f"voxels must be integers or real numbers of at most 64 bits, got NIfTI data type {code} in {path}")
    if math.prod(shape) > MAX_VOXELS:
        raise UserError(f"{path} declares {dimensions(shape)} = {math.prod(shape):.3g} voxels; the limit is {MAX_VOXELS:.3g}")
    offset = float(raw["vox_offset"])
    if not (math.isfinite(offset) and len(raw.binaryblock) <= offset <= MAX_SKIP):
        raise UserError(f"{path} is not a valid NIfTI file: voxels are said to start at byte {offset:g}")
    _scaling(raw, path)
    geometry = Geometry(shape, _affine(raw, shape, path))
    on_disk, needed = path.stat().st_size, int(offset) + number * math.prod(shape) * int(raw.get_data_dtype().itemsize)
    if on_disk * (DEFLATE_RATIO if is_gzip else 1) < needed:
        raise UserError(f"{path} is cut off, or its header is wrong: {needed} bytes are declared, the file has {on_disk}")
    return raw, geometry, number


def _shape(raw: nib.Nifti1Header, path: Path) -> tuple[Shape3, int]:
    """Voxels along three axes, and volumes. Trailing axes of length 1 do not count; missing ones have length 1."""
    dim = [int(n) for n in raw["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise UserError(f"{path} is not a valid NIfTI file: its dimensions are {dim}")
    used = dim[1 : dim[0] + 1]
    if len(more := [n for n in used[3:] if n > 1]) > 1:
        raise UserError(f"images must have 3 or 4 dimensions, got {dimensions(used)} in {path}; split it into volumes")
    x, y, z = (*used, 1, 1)[:3]
    return (x, y, z), math.prod(more)


def _scaling(raw: nib.Nifti1Header, path: Path) -> tuple[float, float]:
    """Slope 0 or NaN means no scaling, as the format says."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    intercept = 0.0 if math.isnan(intercept) else intercept
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise UserError(f"the scaling of voxels must be finite, got slope {slope:g} and intercept {intercept:g} in {path}")
    return slope, intercept


def _normalised(raw: nib.Nifti1Header) -> nib.Nifti1Header:
    """A copy in which the place is said plainly: qfac 1 or -1, unused voxel sizes 1, a quaternion of length 1 at most.

    As the format's reference reader takes them (nifti1_io). What is plain already keeps every bit.
    """
    header = raw.copy()
    pixdim, dim = header["pixdim"], header["dim"]
    pixdim[0] = -1 if pixdim[0] < 0 else 1
    for axis in (1, 2, 3):
        if (axis > dim[0] or dim[axis] == 1) and not (math.isfinite(pixdim[axis]) and pixdim[axis] > 0):
            pixdim[axis] = 1
    squares = math.fsum(float(header[name]) ** 2 for name in QUATERNION)
    if abs(header.quaternion_threshold) < squares - 1 <= QUATERNION_ROUNDING:
        for name in QUATERNION:
            header[name] /= math.sqrt(squares)
    return header


def _affine(raw: nib.Nifti1Header, shape: Shape3, path: Path) -> Affine4:
    """In mm: the sform if it has a code, else the qform, else the voxel size alone (as nibabel does); if both, they agree."""
    header = _normalised(raw)
    codes = {"sform": (int(raw["sform_code"]), header.get_sform), "qform": (int(raw["qform_code"]), header.get_qform)}
    forms = {kind: read for kind, (code, read) in codes.items() if code > 0} or {"voxel size": header.get_base_affine}
    found: dict[str, Affine4] = {}
    for kind, read in forms.items():
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")  # what would be warned about is refused below
                affine = np.array(read(), dtype=np.float64)
                affine[:3] *= MM.get(int(raw["xyzt_units"]) % 8, 1.0)
        except (ValueError, HeaderDataError, np.linalg.LinAlgError) as error:
            if not found:
                raise UserError(f"the orientation in the header of {path} is not valid: {error}") from error
            continue  # the qform is no rotation: the sform beside it says where the image lies
        if _is_invertible(affine):
            found[kind] = affine
        elif not found:
            raise UserError(f"the affine must be finite and invertible, got the {kind} {_rows(affine)} in {path}")
    if len(found) == 2 and (apart := corners_apart_mm(shape, found["sform"], found["qform"])):
        both = ", ".join(f"{kind} {_rows(affine)}" for kind, affine in found.items())
        raise UserError(f"sform and qform disagree by up to {apart:.3g} mm in {path}: {both}; set the wrong one's code to 0")
    return next(iter(found.values()))


def _is_invertible(affine: Affine4) -> bool:
    """Finite, voxels of 1e-6 to 1e6 mm along each axis, and no two axes almost parallel."""
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e9:
        return False
    spacing = np.array(spacing_of(affine))
    return bool(spacing.min() > 1e-6 and spacing.max() < 1e6 and abs(np.linalg.det(affine[:3, :3] / spacing)) > 1e-6)


def _rows(affine: Affine4) -> str:
    return "[" + "; ".join(" ".join(f"{value:.4g}" for value in row) for row in affine[:3]) + "]"
