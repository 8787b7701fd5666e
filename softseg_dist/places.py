"""Places: files and folders on any file system that pyarrow supports, given by a path or a URI such as s3://bucket/runs.

S3 takes endpoint, region and credentials as the AWS tools do (AWS_ENDPOINT_URL, AWS_REGION, ...), GCS as Google's do. Credentials
in a URI of S3 move to the environment of this process when it is parsed: what is stored, sent or shown has none (see `Address`).
A failure of a remote file system is an OSError with the errno EIO that names the place. Files are written whole or not at all
(`Place.write`, `replace_file`); a full disk is an OSError with its errno whatever library was writing.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import quote, unquote

import pyarrow
from pyarrow import fs

from softseg_dist.errors import UserError, in_words

FLAT = ("s3", "gcs", "abfs")  # object stores: they have no folders that must be made first
GCS_RETRY_S = 60
CHUNK_BYTES = 8 * 2**20  # what is copied at a time
FULL_BYTES = 2**16  # a disk with less than this left is full
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
PARTIAL = re.compile(r"\.(\d{1,9})-([0-9a-f]{6})\..+")
LEFT_S = 86400.0  # no file takes that long to write
PLACES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")  # in their names an @ may stand for other things
SECRET = re.compile(r"secret|token|pass|pwd|key|sig|cred|auth|sas|jwt", re.IGNORECASE)  # names of items in a query
AWS = {"user": "AWS_ACCESS_KEY_ID", "password": "AWS_SECRET_ACCESS_KEY"}
_moved: dict[str, str] = {}  # credentials that this process has taken from a URI


@dataclass(frozen=True)
class Address:
    """An address as it may be stored and shown: without login and secret items of its query.

    Only `original` and `secrets` have them. It cannot be pickled, so that they stay in this process.
    """

    shown: str
    original: str = field(repr=False)  # for the client that connects
    secrets: dict[str, str] = field(repr=False, compare=False)

    @classmethod
    def of(cls, text: str) -> Address:
        """Parse an address; a path is one too. Raises UserError, without the text, if it is not clear where its password ends."""
        scheme, mark, rest = text.partition("://")
        if not mark or scheme == "file":
            return cls(text, text, {})
        login, rest = _login(scheme, rest)
        user, colon, password = login.partition(":")
        main, _, query = rest.partition("?")
        public, secrets = [], {}
        for item in query.partition("#")[0].split("&"):
            name, mark, value = item.partition("=")
            if value and not SECRET.search(unquote(name)) and "@" not in unquote(value):
                public.append(item)
            elif hidden := value or (name if not mark else ""):
                secrets[unquote(name) if mark else ""] = unquote(hidden)
        kept = f"{login}@" if login and scheme in PLACES and scheme != "s3" and not colon else ""  # a container, a user
        if login and not kept:
            secrets |= {"user": unquote(user)} | ({"password": unquote(password)} if colon else {})
        main = main if scheme in PLACES or main.startswith("/") else main.partition("#")[0]
        given = f"{scheme}://{quote(user, '%')}{colon}{quote(password, '%')}@{rest}" if login else text
        return cls("?".join(filter(None, (f"{scheme}://{kept}{main}", "&".join(public)))), given, secrets)

    def redact(self, text: str) -> str:
        """A text of that client without the secrets."""
        text = text.replace(self.original, self.shown)
        secrets = {value for name, value in self.secrets.items() if name != "user" or "password" not in self.secrets}
        for secret in sorted(secrets, key=len, reverse=True):
            quoted = [(re.escape(char), "".join(f"%{byte:02x}" for byte in char.encode())) for char in secret]
            text = re.sub("".join(f"(?:{char}|(?i:{code}))" for char, code in quoted), "***", text)
        return re.sub(r"(?<=://)[^/\s]*@", "", text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an address may hold a password: send what it shows")


def _login(scheme: str, rest: str) -> tuple[str, str]:
    """What stands before the host, and the rest. A login with a / or ? in it is understood if there is one way to."""
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" not in rest or not host or (scheme in PLACES and not {":", "@"} & set(host)):
        return "", rest
    is_port = scheme != "s3" and host.partition(":")[2].isdigit()
    if rest.count("@") > host.count("@") and (rest.count("@") > 1 or ":" not in host or is_port):
        write = "write @ as %40, / as %2F, ? as %3F and # as %23 in user, password, path and query"
        raise UserError(f"{scheme}://...: it is not clear where the password of this address ends; {write}")
    return rest.rpartition("@")[::2]


def redacted(command: str) -> str:
    """A command line whose addresses are as they may be shown."""

    def shown(word: str) -> str:
        before, mark, rest = word.partition("://")
        scheme = re.split(r"[^\w+.-]", before)[-1]
        try:
            return before.removesuffix(scheme) + Address.of(scheme + mark + rest).shown if mark else word
        except UserError:
            return f"{before}://..."

    if "://" not in command:
        return command
    try:
        words = shlex.split(command)
    except ValueError:  # not one that a shell takes
        words = command.split()
    return shlex.join(map(shown, words))


def without_credentials(where: str | Path) -> str:
    """A path or URI as it may be stored, sent and shown: the keys of an S3 URI move to the environment of this process.

    Raises UserError, without showing them, for other schemes and if two URIs have different keys: a process has one environment.
    """
    address = Address.of(str(where))
    if not address.secrets:
        return str(where)
    keys = {AWS[name]: value for name, value in address.secrets.items() if name in AWS and value}
    if not address.shown.startswith("s3://") or len(keys) < len(AWS) or address.secrets.keys() - AWS.keys():
        do = "take them from the environment, as the tools of its provider do; in an s3 URI KEY:SECRET@ is understood"
        raise UserError(f"{address.shown}: the credentials in this address are not supported; {do}")
    if _moved and _moved != keys:
        raise UserError(f"{address.shown} has other credentials than an address before it; one process takes one login of S3")
    os.environ.pop("AWS_SESSION_TOKEN", None)
    os.environ.update(keys)
    _moved.update(keys)
    return address.shown


def cache_folder() -> Path:
    """Where this machine keeps copies of what lies elsewhere: SOFTSEG_CACHE, or ~/.cache/softseg. May be removed at any time."""
    return Path(os.environ.get("SOFTSEG_CACHE") or Path.home() / ".cache" / "softseg")


def make_folder(folder: Path) -> None:
    """Make a folder for results. Raises UserError that says what to do if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}; give another --out") from error


def working_folder(run: Place) -> Path:
    """This machine's folder for what only the driver of a run needs: the run folder itself, or one in the cache if it is remote."""
    if run.path is not None:
        return run.path
    name = run.uri.partition("?")[0].rpartition("/")[2]
    return cache_folder() / "runs" / f"{name}-{hashlib.sha256(run.uri.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Place:
    """A file or a folder. `uri` is an absolute path or a URI; `path` is None on a filesystem that is not this machine's."""

    uri: str
    path: Path | None
    _files: Any = field(repr=False, compare=False)
    _root: str = field(repr=False, compare=False)

    @classmethod
    def at(cls, where: str | Path) -> Place:
        """The place of a path or URI. Raises UserError if it is a URI that pyarrow does not know."""
        text = without_credentials(where)
        if "://" not in text:
            path = Path(text).absolute()
            return cls(str(path), path, fs.LocalFileSystem(), str(path))
        more = ""
        if text.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in text:
            more = f"{'&' if '?' in text else '?'}retry_limit_seconds={GCS_RETRY_S}"  # else it tries for 15 minutes without network
        try:
            files, root = fs.FileSystem.from_uri(text + more)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{text}: cannot be used as a folder: {in_words(error)}") from error
        head, mark, query = text.partition("?")
        local = Path(root) if isinstance(files, fs.LocalFileSystem) else None
        return cls(head.rstrip("/") + mark + query, local, files, root.rstrip("/"))

    def __truediv__(self, name: str) -> Place:
        head, mark, query = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        local = None if self.path is None else self.path / name
        return Place(f"{head}/{name}{mark}{query}", local, self._files, f"{self._root}/{name}")

    def __str__(self) -> str:
        return self.uri

    def read(self) -> bytes | None:
        """The content of the file; None if there is no file."""
        try:
            with self._named("read"), self._files.open_input_stream(self._root) as stream:
                return stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            if self.path is None or not (self.path.is_dir() or self.path.is_symlink()):
                raise
            raise UserError(f"{self} must be a file, got a folder or a link in a circle; remove it, or restore it") from error

    def write(self, content: bytes) -> None:
        """Make the file hold `content`: whole or as it was, even after a crash. Makes the folders above it."""
        if self.path is None:
            self._upload(io.BytesIO(content))
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, lambda partial: partial.write_bytes(content))

    def is_file(self) -> bool:
        """Whether there is a file here."""
        return self._kind() == fs.FileType.File

    def names(self, *, folders: bool = False) -> list[str]:
        """Sorted names of the files in this folder, or of the folders in it."""
        kind = fs.FileType.Directory if folders else fs.FileType.File
        return sorted(entry.base_name for entry in self._list(recursive=False) if entry.type == kind)

    def walk(self) -> dict[str, float]:
        """When the files below this folder were written, in seconds since 1970, by names relative to it: `fits/hard/000.json`."""
        files = (entry for entry in self._list(recursive=True) if entry.type == fs.FileType.File)
        return {entry.path[len(self._root) + 1 :]: (entry.mtime_ns or 0) / 1e9 for entry in files}

    def delete(self) -> None:
        """Remove the file, or the folder with what it holds; nothing happens if there is neither."""
        with self._named("remove"):
            kind = self._kind()
            if kind == fs.FileType.Directory:
                self._files.delete_dir(self._root)
            elif kind == fs.FileType.File:
                self._files.delete_file(self._root)

    def pull(self, to: Path) -> None:
        """Copy the file to `to` on this machine, whole or not at all. Raises FileNotFoundError if it is not there."""
        to.parent.mkdir(parents=True, exist_ok=True)
        with self._named("read"), self._files.open_input_stream(self._root) as data:

            def copy(partial: Path) -> None:
                with partial.open("wb") as file:
                    shutil.copyfileobj(data, file, CHUNK_BYTES)

            replace_file(to, copy)

    def push(self, source: Path) -> None:
        """Copy the file `source` of this machine here."""
        if self.path is not None:
            Place.at(source).pull(self.path)
            return
        with source.open("rb") as file:
            self._upload(file)

    def _upload(self, data: IO[bytes]) -> None:
        with self._named("write"):
            if self._files.type_name not in FLAT:
                self._files.create_dir(self._root.rpartition("/")[0], recursive=True)
            with self._files.open_output_stream(self._root) as stream:  # appears when the stream is closed, not before
                shutil.copyfileobj(data, stream, CHUNK_BYTES)

    def _kind(self) -> Any:
        with self._named("read"):
            return self._files.get_file_info(self._root).type

    def _list(self, *, recursive: bool) -> list[Any]:
        with self._named("read"):
            selector = fs.FileSelector(self._root, recursive=recursive, allow_not_found=True)
            return self._files.get_file_info(selector)

    @contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        """Errors of a remote filesystem in one form; of this machine's disk, as they are."""
        try:
            yield
        except OSError as error:
            if self.path is not None or error.errno is not None:
                raise
            raise OSError(errno.EIO, f"cannot {doing} it: {in_words(error)}", self.uri) from error


def partial_of(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f".{os.getpid()}-{HOST}.{path.name}")


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sweep_partials(folder: Path) -> None:
    """Remove unfinished files, in a folder and below, of processes of this machine that have ended, and of others after a day."""
    for path in folder.rglob(".[0-9]*"):
        with suppress(OSError):  # its writer has just finished, or the folder may not be written
            if found := PARTIAL.fullmatch(path.name):
                gone = found[2] == HOST and not is_running(int(found[1]))
                if gone or time.time() - path.stat().st_mtime > LEFT_S:
                    path.unlink()


def is_running(process: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # of another user
    return True


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(partial)` and rename `partial` to `path`, durably; nothing is left behind if `write` raises.

    An OSError about `partial` names `path`. It has the errno ENOSPC or EDQUOT if the disk is full, whatever `write` makes of that:
    safetensors hides it in its text, torch does not tell it, and writing, unlike opening, does not say which file.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        write(partial)
        _sync(partial)
        partial.replace(path)
        with suppress(OSError):  # some file systems cannot do that with a folder
            _sync(path.parent)
    except Exception as error:
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(hidden[1]) if hidden else None
        if number is None and shutil.disk_usage(path.parent).free < FULL_BYTES:
            number = errno.ENOSPC
        about_it = isinstance(error, OSError) and error.filename in (None, str(partial))
        if number in (errno.ENOSPC, errno.EDQUOT) or (number is not None and about_it):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)
