"""Sealed files: a file that a later step believes holds the SHA-256 of its own bytes, and is checked each time it is read.

A seal is `softseg-sha256:` and 64 hexadecimal digits: the digest of a key and of the file with zeros in place of these digits. It
stands where the format of the file allows it (JSON: under "seal"; Parquet and Arrow: in the metadata; a checkpoint: at its end), so
that other programs read the file as before. The key of the files of a run is random: a file of another run does not fit either.
Files that a fit leaves have their digests in its result (`training.task.vouched`), the weights of a model in its card.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softseg_dist.errors import UserError
from softseg_dist.places import Place, replace_file

MARK = b"softseg-sha256:"
DIGITS = 64
BLANK = MARK + b"0" * DIGITS  # what `seal` fills in; the last one of a file counts
FIELD = "seal"  # its name in JSON and metadata
ITEMS = "items"  # the field of a list in JSON
KEEPER = "code.json"  # the file of a run folder that holds the key of all others
RESTORE = "restore it, or give another --out"
AGAIN = "the same `softseg run` makes it again"


class Damaged(UserError):
    """A file that is not as it was written. `fit` is the key of the fit that made it, if running that again makes it again."""

    def __init__(self, path: object, to_do: str, fit: str = "") -> None:
        super().__init__(f"{path} is not as it was written (missing, cut off, changed, or of another run or version); {to_do}")
        self.path, self.fit = str(path), fit


def seal(content: bytes, key: str = "") -> bytes:
    """The content with its last `BLANK` filled in."""
    at = content.rindex(BLANK) + len(MARK)
    return content[:at] + _digest(content, at, key) + content[at + DIGITS :]


def is_sealed(content: bytes | mmap.mmap, key: str = "") -> bool:
    """Whether the content is as `seal` gave it with this key."""
    at = content.rfind(MARK) + len(MARK)
    return at >= len(MARK) and content[at : at + DIGITS] == _digest(content, at, key)


def _digest(content: bytes | mmap.mmap, at: int, key: str) -> bytes:
    found = hashlib.sha256(key.encode())
    with memoryview(content) as whole, whole[:at] as before, whole[at + DIGITS :] as after:
        for part in (before, b"0" * DIGITS, after):
            found.update(part)
    return found.hexdigest().encode()


def write_sealed(path: str | Path, write: Callable[[Path], object], key: str = "") -> None:
    """As `replace_file`, and seal what `write` has written, which holds a `BLANK`."""

    def write_and_seal(partial: Path) -> None:
        write(partial)
        seal_file(partial, key)

    replace_file(path, write_and_seal)


def seal_file(path: Path, key: str = "") -> None:
    """Fill in the last `BLANK` of a file."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        at = content.rfind(BLANK) + len(MARK)
        assert at >= len(MARK), f"{path} has no place for a seal"
        content[at : at + DIGITS] = _digest(content, at, key)


def is_intact(path: Path, key: str = "") -> bool:
    """Whether the file is there, and as it was sealed with this key."""
    if not path.is_file() or not path.stat().st_size:  # an empty file cannot be mapped
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return is_sealed(content, key)


def checked(path: Path, key: str = "", to_do: str = AGAIN) -> Path:
    """The path. Raises Damaged if the file is not intact."""
    if not is_intact(path, key):
        raise Damaged(path, to_do)
    return path


def sealed_json(value: object, key: str = "") -> bytes:
    """JSON with a seal as its last field: an object, or a list under "items"."""
    fields = value if isinstance(value, dict) else {ITEMS: value}
    return seal(json.dumps({**fields, FIELD: BLANK.decode()}, indent=1).encode(), key)


def unsealed_json(content: bytes, path: object, key: str = "", to_do: str = AGAIN) -> Any:
    """The value of `sealed_json`; `path` is where the content was read. Raises Damaged if it was changed."""
    if not is_sealed(content, key):
        raise Damaged(path, to_do)
    value: dict[str, Any] = json.loads(content)
    value.pop(FIELD)
    return value[ITEMS] if list(value) == [ITEMS] else value


def key_of(run: Place) -> str:
    """The key of the files of a run folder; "" if it has none yet. Raises Damaged if its keeper is."""
    return str((read_json(run, KEEPER, "", RESTORE) or {"key": ""})["key"])


def read_json(run: Place, path: str, key: str, to_do: str = AGAIN) -> Any:
    """The value in a file of a run folder with this key; None if there is no file. Raises Damaged if it was changed."""
    seal_of = path if path == KEEPER else f"{key}/{path}"
    return None if (content := (run / path).read()) is None else unsealed_json(content, run / path, seal_of, to_do)
