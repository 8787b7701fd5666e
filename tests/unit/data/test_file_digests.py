"""Digests of files: remembered, and never wrong when a file has changed in any way."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from softseg_dist.data.source_files import DIGESTS, remembered_sha256, sha256_of
from softseg_dist.errors import UserError
from softseg_dist.frozen import sealed, unsealed

CONTENT = b"voxels"


def in_an_hour() -> int:
    """A clock by which all files of a test are old."""
    return time.time_ns() + 3600 * 10**9


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "image.nii"
    path.write_bytes(CONTENT)
    return path


def digest(folder: Path, source: Path, now_ns: Callable[[], int] = in_an_hour) -> str:
    with remembered_sha256(folder, now_ns) as sha256:
        return sha256(source)


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path: Path, source: Path) -> None:
    assert digest(tmp_path, source) == sha256_of(source) == hashlib.sha256(CONTENT).hexdigest()
    memory = tmp_path / DIGESTS
    remembered = {path: [*stamp, "a mark"] for path, (*stamp, _) in unsealed(memory.read_bytes()).items()}
    memory.write_text(sealed(remembered))
    assert digest(tmp_path, source) == "a mark"


def in_place(path: Path) -> None:
    path.write_bytes(b"vOxels")


def in_place_with_its_time_set_back(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"vOxels")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_another_file(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"vOxels")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [in_place, in_place_with_its_time_set_back, by_another_file])
def test_a_changed_file_is_seen(tmp_path: Path, source: Path, change: Callable[[Path], None]) -> None:
    digest(tmp_path, source)
    change(source)
    assert digest(tmp_path, source) == hashlib.sha256(b"vOxels").hexdigest()


def test_a_file_that_was_changed_a_moment_ago_is_not_remembered(tmp_path: Path, source: Path) -> None:
    """It may change once more within the same tick of its filesystem's clock."""
    digest(tmp_path, source, time.time_ns)
    assert not (tmp_path / DIGESTS).exists()


def test_a_damaged_memory_is_no_memory(tmp_path: Path, source: Path) -> None:
    expected = digest(tmp_path, source)
    memory = tmp_path / DIGESTS
    memory.write_bytes(memory.read_bytes().replace(expected[:8].encode(), b"0" * 8))
    assert digest(tmp_path, source) == expected
    memory.write_bytes(b"")
    assert digest(tmp_path, source) == expected


def test_a_folder_that_cannot_be_made_only_costs_time(tmp_path: Path, source: Path) -> None:
    assert digest(source / "no folder", source) == hashlib.sha256(CONTENT).hexdigest()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none.nii"):
        digest(tmp_path, tmp_path / "none.nii")
