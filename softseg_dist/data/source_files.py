"""Files that others wrote: regular ones alone, gzip by its first bytes, PNG and TIFF; no more is read than is asked for.

Their digests are remembered beside the stores: a file that has not changed is not read again to know that. It is taken as unchanged
if size, inode, time of modification and time of change (which no tool can set back) are those that it had when it was read. One
that was changed less than `SETTLED_NS` before it was read is not remembered: it could change again without a later time, as clocks
of filesystems tick up to every 2 s (FAT).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
import stat
import struct
import time
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat

from softseg_dist.data.geometry import Shape3
from softseg_dist.errors import UserError, in_words
from softseg_dist.frozen import sealed, unsealed
from softseg_dist.places import Place

MAX_VOXELS = 2**31  # 1290^3: far beyond any scan, and 8 GiB as float32
CHUNK = 2**24  # bytes inflated at a time
GZIP = b"\x1f\x8b"  # RFC 1952, 2.3.1
KINDS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
POINTERS = {  # files that stand for others: what they contain -> what they are and what fetches the file
    b"https://git-lfs.github.com/spec/": "a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"/annex/objects/": "a pointer of git-annex; fetch the file itself with git annex get, or datalad get",
}
PICTURES = (".png", ".tif", ".tiff")
Spacing = tuple[()] | tuple[PositiveFloat, PositiveFloat] | tuple[PositiveFloat, PositiveFloat, PositiveFloat]  # of pictures
COLOURS = {"RGB": 3, "RGBA": 3} | dict.fromkeys(("1", "L", "LA", "I;16", "I;16B", "I", "F"), 1)  # of Pillow's modes
NO_SIZE = (1, 72, 96)  # dots per inch: Pillow's for files that say none, and what programs write that know none
ORIENTATION, SAMPLES, SIGNED = 274, 277, 339  # tags of TIFF 6.0
DIGESTS = ".digests"  # in the folder of the stores; may be removed at any time
SETTLED_NS = 4 * 10**9
Digest = Callable[[Path], str]
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, zlib.error)


def check_regular(path: Path) -> None:
    """Raise UserError if there is no file `path`, or if it is a folder, a pipe or a device, which may never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        linked = "; the link leads nowhere: has the data been fetched (git annex get)?" if path.is_symlink() else ""
        raise UserError(f"there is no file {path}{linked}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS.items() if is_kind(mode)), "a socket")
        raise UserError(f"only regular files are read, got {kind}: {path}")


def is_file(path: Path) -> bool:
    """Whether there is such a file; no error for a name that no disk takes."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """The file, inflated if it is compressed, whatever its name says, and whether it is; errors of the block name it."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            is_gzip = file.read(len(GZIP)) == GZIP
            file.seek(0)
            yield (cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzip else file), is_gzip
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut off or corrupt: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_exactly(file: BinaryIO, num_bytes: int, path: Path, at_least: int | None = None) -> bytearray:
    """The next `num_bytes` bytes, and not one more is inflated; fewer, but `at_least`, if the file ends there. Else UserError."""
    data = bytearray()
    while len(data) < num_bytes and (chunk := file.read(min(CHUNK, num_bytes - len(data)))):
        data += chunk
    if len(data) < (num_bytes if at_least is None else at_least):
        if is_pointer := pointer(data):
            raise UserError(f"{path} is {is_pointer}")
        raise UserError(f"{path} is cut off: {num_bytes} more bytes were expected where {len(data)} are left")
    return data


def pointer(content: bytes | bytearray) -> str:
    """What a file is that stands for one which was not fetched, by its first bytes, and what to do; "" for any other."""
    return next((text for mark, text in POINTERS.items() if mark in content[:400] and 0 not in content[:40]), "")


def read_picture(path: Path, *, header_only: bool = False) -> tuple[Shape3, int, tuple[float, ...], NDArray[Any]]:
    """Columns, rows and pages of a PNG or TIFF file; 1 or 3 colours; mm of a pixel along x and y, () if unknown; its pixels.

    These are [pages rows columns colours], without alpha. Raises UserError if the file is none, cut off or damaged, or would not be
    read as it is stored: palettes, other colours than RGB, colours of 16 bits, transparent pixels, pages that differ.
    """
    from PIL import Image  # takes time, and few data sets have pictures

    with opened(path) as (file, is_gzip):
        if what := "compressed by gzip" if is_gzip else pointer(file.read(400)):
            raise UserError(f"{path} is {what}")
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what matters is refused
                image = Image.open(file, formats=("PNG", "TIFF"))
                return *_picture_header(image, path), np.empty(0) if header_only else _pixels(image, path)
        except UserError:
            raise
        except (*BROKEN, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is cut off, too large, or no PNG or TIFF file: {in_words(error)}") from error


def _picture_header(image: Any, path: Path) -> tuple[Shape3, int, tuple[float, ...]]:
    tags, bands, pages = getattr(image, "tag_v2", {}), image.getbands(), getattr(image, "n_frames", 1)
    rules = {
        f"must be gray or RGB, not {image.mode} (P is a palette)": image.mode in COLOURS,
        "of several colours must have 8 bits for each": len(bands) == 1 or ";16" not in str(image.tile),
        "must have no samples but its colours": tags.get(SAMPLES, len(bands)) == len(bands),
        "must not have negative bytes": tags.get(SIGNED) != (2,) or image.mode != "L",
        "must not be turned by a tag": tags.get(ORIENTATION, 1) == 1,
        "must not be an animation": image.format == "TIFF" or pages == 1,
        f"must have at most {MAX_VOXELS:.3g} pixels": math.prod(image.size) * pages <= MAX_VOXELS,
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise UserError(f"a picture {broken[0]}: save {path} anew")
    dpi = tuple(map(float, image.info.get("dpi", NO_SIZE)))
    return (*image.size, pages), COLOURS[image.mode], () if {*map(round, dpi)} & {*NO_SIZE} else tuple(25.4 / n for n in dpi)


def _pixels(image: Any, path: Path) -> NDArray[Any]:
    kind, pages = (image.size, image.mode), []
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        if (image.size, image.mode) != kind:
            raise UserError(f"all pages of a picture must have one size and kind, got another in page {page + 1} of {path}")
        pages.append(np.array(image))
    pixels = np.stack(pages).reshape(len(pages), *pages[0].shape[:2], -1)
    if (pixels[..., (number := COLOURS[kind[1]]) :] != 255).any():
        raise UserError(f"a picture must not have transparent pixels: save {path} without alpha")
    return pixels[..., :number]


def split_part(text: str) -> tuple[str, str]:
    """The path of a file, and "[2]" behind it, one volume of a 4-D file or one colour of a picture; "" for none."""
    part = match[0] if (match := re.search(r"\[\d+\]$", text, re.ASCII)) else ""
    return text.removesuffix(part), part


def part_of(path: Path) -> tuple[Path, int | None]:
    """The file and the number of what `split_part` splits, from 0; None without one."""
    file, part = split_part(str(path))
    return Path(file), int(part[1:-1]) if part else None


def nfc(text: str) -> str:
    """The text with its accents composed: file systems differ in how they keep names."""
    return unicodedata.normalize("NFC", text)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Raises UserError if it cannot be read."""
    return _read(path)[1]


@contextmanager
def remembered_sha256(folder: Path, now_ns: Callable[[], int] = time.time_ns) -> Iterator[Digest]:
    """`sha256_of`, for files that were read before without reading them; several threads may ask at once.

    At the end, what is new is written down; a folder that cannot be written only costs time. `now_ns` is the clock, for tests.
    """
    memory = folder / DIGESTS
    known: dict[str, Any] = {}
    new: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # none yet, or damaged
        known = unsealed(memory.read_bytes())

    def sha256(path: Path) -> str:
        key = str(path.absolute())
        with suppress(OSError):  # reading the file reports the error with its name
            if key in known and known[key][:-1] == stamp_of(path.stat()):
                return str(known[key][-1])
        read_ns = now_ns()
        stamp, digest = _read(path)
        if stamp is not None and max(stamp[1:3]) < read_ns - SETTLED_NS:
            new[key] = [*stamp, digest]
        return digest

    try:
        yield sha256
    finally:
        if new:
            with suppress(OSError):
                Place.at(memory).write(sealed(known | new).encode())


def _read(path: Path) -> tuple[list[int] | None, str]:
    """Stamp and digest of a file; no stamp if it changed while it was read."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            before = stamp_of(os.fstat(file.fileno()))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return before if stamp_of(os.fstat(file.fileno())) == before else None, digest
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def stamp_of(stat: os.stat_result) -> list[int]:
    """Size, times and inode: a file is taken as unchanged while they are."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
