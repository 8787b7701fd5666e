"""Stores on S3: a machine fetches one once, however many processes ask, and never uses one that is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from s3_server import BUCKET

from softseg_dist import Phantom, Preprocess
from softseg_dist.data.store import Store, build_store, local_store, shared_store
from softseg_dist.errors import UserError
from softseg_dist.places import Place

DATA, PREPROCESS = Phantom(subjects=2, size=(16, 16), num_slices=2), Preprocess(dim=2)


@pytest.fixture
def cache(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


@pytest.fixture
def where(cache: Path, tmp_path: Path) -> str:
    """A store on S3 that this machine does not have yet."""
    path = build_store(tmp_path / "elsewhere", DATA.cases(None), DATA, PREPROCESS)
    place = Place.at(f"s3://{BUCKET}/{uuid.uuid4().hex}") / path.name
    place.push(path)
    return str(place)


def damaged(content: bytes) -> bytes:
    """With one bit turned in the middle, where the numbers are."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def test_a_remote_store_is_the_store(where: str, tmp_path: Path) -> None:
    (original,) = (tmp_path / "elsewhere").glob("*.arrow")
    one, other = Store.open(original), Store.open(local_store(where))
    assert one.digest == other.digest
    np.testing.assert_array_equal(one.sample(0).image, other.sample(0).image)


def test_it_is_fetched_once_and_then_needs_no_network(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = local_store(where)
    Place.at(where).delete()
    assert local_store(where) == first


@pytest.mark.engine
def test_processes_that_ask_at_once_get_one_whole_file(where: str, cache: Path) -> None:
    code = "import sys; from softseg_dist.data.store import local_store as l; p = l(sys.argv[1]); print(p.stat().st_ino)"
    asking = [subprocess.Popen([sys.executable, "-c", code, where], stdout=subprocess.PIPE) for _ in range(3)]
    assert len({process.communicate(timeout=120)[0] for process in asking}) == 1
    assert [process.returncode for process in asking] == [0, 0, 0]
    assert sorted(path.suffix for path in cache.iterdir()) == [".arrow", ".lock"]


def test_a_copy_that_was_damaged_here_is_fetched_again(where: str) -> None:
    path = local_store(where)
    whole = path.read_bytes()
    for content in (damaged(whole), whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        assert local_store(where) == path
        assert path.read_bytes() == whole


def test_a_store_that_is_damaged_there_is_refused_by_name_and_not_kept(where: str, cache: Path) -> None:
    place = Place.at(where)
    place.write(damaged(place.read() or b""))
    with pytest.raises(UserError, match=f"{where} is not as it was written"):
        local_store(where)
    assert not list(cache.glob("*.arrow"))


def test_a_store_that_is_damaged_there_is_prepared_again_by_who_has_the_data(cache: Path) -> None:
    folder = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    place = Place.at(shared_store(folder, DATA.cases(None), DATA, PREPROCESS))
    whole = place.read()
    place.write(damaged(whole or b""))
    for path in cache.glob("*.arrow"):
        path.unlink()
    assert shared_store(folder, DATA.cases(None), DATA, PREPROCESS) == str(place)
    assert place.read() == whole


def test_verify_names_the_case_whose_numbers_have_changed(tmp_path: Path) -> None:
    path = build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS)
    Store.open(path).verify()
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(UserError, match="not as it was written"):
        Store.open(path).verify()


def test_a_store_that_is_not_there_is_named(cache: Path) -> None:
    with pytest.raises(UserError, match=f"there is no store s3://{BUCKET}/nothing.arrow"):
        local_store(f"s3://{BUCKET}/nothing.arrow")


def test_a_store_is_built_once_for_all_machines(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    cases = DATA.cases(None)
    where = shared_store(folder, cases, DATA, PREPROCESS)
    assert Place.at(folder).names() == [Path(where).name]
    monkeypatch.setenv("SOFTSEG_CACHE", str(tmp_path / "another machine"))

    def told(done: int, total: int, name: str) -> None:
        raise AssertionError("it was built again")

    assert shared_store(folder, cases, DATA, PREPROCESS, told) == where
    Store.open(local_store(where)).verify()


def test_a_local_store_is_where_it_is(tmp_path: Path) -> None:
    assert local_store(tmp_path / "a.arrow") == tmp_path / "a.arrow"
    assert local_store(f"file://{tmp_path}/a.arrow") == tmp_path / "a.arrow"
    where = shared_store(os.path.relpath(tmp_path / "stores"), DATA.cases(None), DATA, PREPROCESS)
    assert Path(where).is_absolute()
    assert Path(where).is_file()
