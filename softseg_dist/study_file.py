"""Load a study file from its path: no package, no PYTHONPATH, the same text in the driver and in every worker.

Workers get the file's text, not its path, so that losses and other classes defined in it work on any machine.
"""

from __future__ import annotations

import linecache
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from softseg_dist.errors import UserError
from softseg_dist.frozen import STUDY_MODULES, digest
from softseg_dist.study import Study

_loading = threading.RLock()


@dataclass(frozen=True)
class StudyFile:
    """A study file as loaded: its stem names its module, its text goes to the workers."""

    path: str
    stem: str
    text: str
    study: Study


def load_study(path: str | Path) -> StudyFile:
    """The `STUDY` of a study file. Raises UserError with file, line and cause if the file does not give one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such study file")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a Python file: {error}") from None
    module = load_source(path.stem, text, str(path))
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(f"{path}: a study file sets STUDY = Study(...); found {type(study).__name__}")
    return StudyFile(str(path), path.stem, text, study)


def load_source(stem: str, text: str, path: str | None = None) -> ModuleType:
    """Run the text of a study file as module `softseg_study.<stem>`; once per text and process.

    Raises UserError with line and cause if the text cannot be run.
    """
    with _loading:  # fits that run side by side in one process load it at once
        known = sys.modules.get(STUDY_MODULES + stem)
        if known is not None and known.__dict__.get("__softseg_text__") == digest(text):
            return known
        return _run_source(STUDY_MODULES + stem, text, path or f"{stem}.py")


def _run_source(name: str, text: str, file: str) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = file
    module.__dict__["__softseg_text__"] = digest(text)
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # so that inspect finds the source
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        exec(compile(text, file, "exec"), module.__dict__)
    except Exception as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise UserError(f"{file}, line {_line(error, file)}: {describe(error)}") from error
    return module


def describe(error: Exception) -> str:
    """One line that says what is wrong, in the words of pydantic where it knows the field and the value."""
    if not isinstance(error, ValidationError):
        return " ".join(f"{type(error).__name__}: {error}".split()) if not isinstance(error, UserError) else str(error)
    first, more = error.errors()[0], error.error_count() - 1
    place = ".".join([error.title, *map(str, first["loc"])])
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("value_error", "missing") else f", got {first['input']!r:.80}"
    return f"{place}: {message}{value}" + (f" (and {more} more)" if more else "")


def _line(error: Exception, file: str) -> int:
    if isinstance(error, SyntaxError):
        return error.lineno or 0
    lines = [frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else 0
