"""Places: one set of properties on a local folder, on a file:// URI and on a real S3 server."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from s3_server import BUCKET

from softseg_dist import places
from softseg_dist.errors import UserError
from softseg_dist.pipeline import RunOptions, provenance
from softseg_dist.places import Address, Place, partial_of, redacted, without_credentials


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
    code = f"from softseg_dist.places import Place; Place.at('s3://{BUCKET}/end').write(b'x'); print('written')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == ("written\n", "")


SHOWN = {  # an address: how it is shown, and the secrets in it
    "https://mlflow.lab:5000/a": ("https://mlflow.lab:5000/a", []),
    "https://me:secret@mlflow.lab:5000/a": ("https://mlflow.lab:5000/a", ["me", "secret"]),
    "https://TOKEN@lab": ("https://lab", ["TOKEN"]),
    "https://u:p%40@host/?token=SECRET&x=1": ("https://host/?x=1", ["SECRET", "u", "p@"]),
    "http://lab/?SECRET#access_token=SECRET": ("http://lab/", ["SECRET"]),
    "postgresql://user:p/ss@host/db?sslmode=require&sslpassword=w": ("postgresql://host/db?sslmode=require", ["w", "user", "p/ss"]),
    "mysql://user:p@ss@host/db": ("mysql://host/db", ["user", "p@ss"]),
    "sqlite:////tmp/a@b.db": ("sqlite:////tmp/a@b.db", []),
    "s3://KEY:SE/CR/ET@lab/runs?region=eu": ("s3://lab/runs?region=eu", ["KEY", "SE/CR/ET"]),
    "s3://KEY:12/3@lab/runs": ("s3://lab/runs", ["KEY", "12/3"]),
    "s3://lab/a@b:c": ("s3://lab/a@b:c", []),
    "s3://lab/runs?endpoint_override=k:s@minio": ("s3://lab/runs", ["k:s@minio"]),
    "gs://anonymous@lab/runs": ("gs://anonymous@lab/runs", []),
    "abfs://box:pw@account/runs": ("abfs://account/runs", ["box", "pw"]),
    "runs/me@home?": ("runs/me@home?", []),
}


@pytest.mark.parametrize("text", SHOWN)
def test_an_address_is_shown_without_its_secrets(text: str) -> None:
    address, (shown, secrets) = Address.of(text), SHOWN[text]
    assert (address.shown, list(address.secrets.values())) == (shown, secrets)
    assert Address.of(shown).shown == shown
    assert Address.of(address.original).secrets == address.secrets
    for leak in (str(address), repr(address), address.redact(f"cannot open {address.original} or {text}: {secrets[-1:]}")):
        assert not [secret for secret in secrets if len(secret) > 2 and secret in leak.replace("sslpassword", "")], leak
    with pytest.raises(TypeError, match="may hold a password"):
        pickle.dumps(address)


@pytest.mark.parametrize(
    "text", ["postgresql://user:p@ss/w?rd@host/db", "http://u:1/2@host", "https://u:p@host/?t=a@b", "s3://K:S@lab/a@b"]
)
def test_an_address_is_refused_if_it_is_not_clear_where_its_password_ends(text: str) -> None:
    with pytest.raises(UserError, match=r"^\w+://\.\.\.: it is not clear where the password of this address ends"):
        Address.of(text)
    assert redacted(f"softseg run s.py --out '{text}'") == f"softseg run s.py --out {text.partition(':')[0]}://..."


def test_a_command_is_recorded_without_secrets() -> None:
    told = "softseg run s.py --tracking-uri http://lab --out me@lab"
    assert provenance(told)["command"] == told
    assert RunOptions(command=told.replace("http://lab", "'http://me:se cret@lab'")).command == told
    assert redacted("softseg evaluate s.py --predictions=a=s3://K:S/1@lab/a") == "softseg evaluate s.py --predictions=a=s3://lab/a"
    assert redacted("it's http://me:secret@lab").endswith("http://lab")


def test_keys_of_s3_move_to_the_environment_and_those_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_moved", {})
    for name in (*places.AWS.values(), "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "another")
    shown = "s3://lab/runs?region=eu-west-1&endpoint_override=minio:9000"
    given = shown.replace("//", "//KEY:SE/CRET@") + "&session_token="
    options = RunOptions(out=given, stores="s3://KEY:SE%2FCRET@lab/stores", tracking_uri="http://me:secret@lab")
    assert (options.out, options.stores) == (shown, "s3://lab/stores")
    assert "cret" not in repr(options).lower().replace("secrets", "")
    keys = {name: os.environ.get(name) for name in (*places.AWS.values(), "AWS_SESSION_TOKEN")}
    assert keys == {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "SE/CRET", "AWS_SESSION_TOKEN": None}
    wrong = {"s3://OTHER:KEY@lab": "has other credentials", "gs://lab/a?access_token=X": "are not supported"}
    wrong |= {"s3://KEY@lab/a": "are not supported", "abfs://c:X@a/b": "are not supported"}
    for where, rule in wrong.items():
        with pytest.raises(UserError, match=rule) as refused:
            without_credentials(where)
        assert not {"OTHER", "KEY", "X"} & set(str(refused.value).replace("KEY:SECRET@", ""))
    with pytest.raises(UserError, match="do not reach a cluster that runs already"):
        RunOptions(out=given, address="auto")


def test_a_key_in_a_uri_opens_a_bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_moved", {})
    place = Place.at(f"s3://{s3['AWS_ACCESS_KEY_ID']}:{s3['AWS_SECRET_ACCESS_KEY']}@{BUCKET}/keys")
    (place / "a").write(b"x")
    assert (str(place), (place / "a").read()) == (f"s3://{BUCKET}/keys", b"x")


def test_a_place_is_absolute_once_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place.at("runs") / "a"
    monkeypatch.chdir("/")
    place.write(b"here")
    assert (str(place), (tmp_path / "runs/a").read_bytes()) == (str(tmp_path / "runs/a"), b"here")
