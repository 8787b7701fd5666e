"""Places: one set of properties on a local folder, on a file:// URI and on a real S3 server."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from s3_server import BUCKET

from softseg_dist.errors import UserError
from softseg_dist.places import Place, partial_of


@pytest.fixture(params=["path", "file", pytest.param("s3", marks=pytest.mark.engine)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Place.at(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    return Place.at(f"file://{tmp_path}/run" if request.param == "file" else tmp_path / "run")


def test_what_is_written_is_read_and_listed(place: Place) -> None:
    assert place.names() == []
    assert (place / "a" / "b.json").read() is None
    (place / "a" / "b.json").write(b"first")
    (place / "a" / "b.json").write(b"second")
    (place / "c.json").write(b"")
    assert (place / "a" / "b.json").read() == b"second"
    assert (place / "a/b.json").is_file()
    assert not (place / "a").is_file()
    assert (place.names(), place.names(folders=True)) == (["c.json"], ["a"])
    assert set(place.walk()) == {"a/b.json", "c.json"}
    assert Place.at(str(place / "a")).names() == ["b.json"]


def test_what_is_deleted_is_gone_and_deleting_nothing_is_no_error(place: Place) -> None:
    for name in ("a/b", "a/c/d", "e"):
        (place / name).write(b"x")
    (place / "e").delete()
    (place / "a").delete()
    (place / "nothing").delete()
    assert place.walk() == {}


def test_files_go_there_and_come_back(place: Place, tmp_path: Path) -> None:
    content = os.urandom(2**20)
    (tmp_path / "here").write_bytes(content)
    (place / "fits" / "there").push(tmp_path / "here")
    (place / "fits" / "there").pull(tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back"]
    with pytest.raises(FileNotFoundError):
        (place / "nothing").pull(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_uri_of_this_machine_is_local(tmp_path: Path) -> None:
    assert Place.at(f"file://{tmp_path}/run").path == tmp_path / "run"
    assert Place.at("s3://bucket/run?region=us-east-1").path is None


def test_a_query_stays_at_the_end_of_a_uri() -> None:
    place = Place.at("s3://bucket/runs?region=eu-west-1") / "study"
    assert str(place) == "s3://bucket/runs/study?region=eu-west-1"


def test_an_unknown_kind_of_uri_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="wherever://bucket/run: cannot be used as a folder"):
        Place.at("wherever://bucket/run")


def test_a_bucket_that_is_not_there_is_named(s3: dict[str, str]) -> None:
    with pytest.raises(OSError, match=r"cannot write it: .*s3://nobody-has-this/run") as refused:
        Place.at("s3://nobody-has-this/run").write(b"x")
    assert refused.value.errno == errno.EIO


def test_a_full_disk_is_named_and_leaves_the_former_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"former")
    partial_of(tmp_path / "a.json").symlink_to("/dev/full")  # where the next content is written first
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a.json'"):
        Place.at(tmp_path / "a.json").write(b"next")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"former")]


def test_a_process_that_used_s3_ends(s3: dict[str, str]) -> None:
    code = f"from softseg_dist.places import Place; Place.at('s3://{BUCKET}/end').write(b'x'); print('written')", partial_of
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == ("written\n", "")
