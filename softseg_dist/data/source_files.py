"""Files that others wrote: only regular ones are opened, gzip is known by its first bytes, no more is read than is asked for."""

from __future__ import annotations

import gzip
import stat
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from softseg_dist.errors import UserError

CHUNK = 2**24  # bytes inflated at a time
GZIP = b"\x1f\x8b"  # RFC 1952, 2.3.1
KINDS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
POINTERS = {  # files that stand for others: what they contain -> what they are and what fetches the file
    b"https://git-lfs.github.com/spec/": "a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"/annex/objects/": "a pointer of git-annex; fetch the file itself with git annex get, or datalad get",
}


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
    """`num_bytes` bytes, and not one more is inflated; fewer, but `at_least`, if the file ends there. Else UserError."""
    data = bytearray()
    while len(data) < num_bytes and (chunk := file.read(min(CHUNK, num_bytes - len(data)))):
        data += chunk
    if len(data) < (num_bytes if at_least is None else at_least):
        if is_pointer := pointer(data):
            raise UserError(f"{path} is {is_pointer}")
        raise UserError(f"{path} is cut off: {num_bytes} bytes were expected where {len(data)} are left")
    return data


def pointer(content: bytes | bytearray) -> str:
    """What a file is that stands for one which was not fetched, by its first bytes, and what to do; "" for any other."""
    return next((text for mark, text in POINTERS.items() if mark in content[:400] and 0 not in content[:40]), "")


def nfc(text: str) -> str:
    """The text with its accents composed: file systems differ in how they keep names."""
    return unicodedata.normalize("NFC", text)
