"""Load a study and the helper modules beside its file: the same texts in the driver and in every worker.

Workers get texts, not paths, so that losses and other classes of a study work on any machine. A helper module is imported by
its own name; the study's folder is not on the path of any process.
"""

from __future__ import annotations

import importlib
import json
import linecache
import pickle
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from pydantic import PydanticUserError, ValidationError

from softseg_dist.errors import UserError, in_words
from softseg_dist.frozen import SOURCES, STUDY_MODULES, TEXT_MODULES, Frozen, has_name, sources_of
from softseg_dist.sources import Sources
from softseg_dist.study import Study

_loading = threading.RLock()


@dataclass(frozen=True)
class StudyFile:
    """A study as loaded, and the texts that workers get. `path` names it in messages."""

    path: str
    sources: Sources
    study: Study

    @classmethod
    def of(cls, study: Study) -> StudyFile:
        """A study built in Python. Raises UserError if a class or function in it has no source file, or no name after a restart."""
        name = f"study {study.name}"
        _check_names(study, name)
        mains: set[str] = set()
        texts: dict[str, str] = {}
        for place, thing in _own(study):
            try:
                found = sources_of(thing)
            except UserError as error:
                raise UserError(f"{name}: {place}: {error}") from None
            for file, text in found.texts.items() if found else ():
                if texts.setdefault(file, text) != text:
                    raise UserError(f"{name}: it uses two files that are both named {file}; rename one of them")
            mains |= {found.study} - {""} if found else set()
        if len(mains) > 1:
            raise UserError(f"{name}: it uses classes of several study files, {', '.join(sorted(mains))}; put them in a helper")
        sources = Sources(mains.pop() if mains else "", texts)
        load_sources(sources)
        return cls(name, sources, _restarted(study.bound(Path.cwd()), name))

    def as_sent(self) -> StudyFile:
        """The study as a worker gets it: pickled texts, run anew, and its own JSON. Raises UserError if that fails."""
        sources: Sources = pickle.loads(pickle.dumps(self.sources))
        load_sources(sources, anew=True)
        return replace(self, sources=sources, study=_restarted(self.study, self.path))


def load_study(path: str | Path) -> StudyFile:
    """The `STUDY` of a study file. Raises UserError with file, line and cause if the file does not give one.

    So it does if a class or function in it would have no name after a restart.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such study file")
    sources = Sources.beside(path)
    module = load_sources(sources, path.parent)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(f"{path}: a study file sets STUDY = Study(...); found {type(study).__name__}")
    study = study.bound(path.parent)
    check_restart(study, str(path))
    return StudyFile(str(path), sources, study)


def check_restart(thing: Frozen, where: str) -> None:
    """Raise UserError if `thing` would not come back from its own JSON, in another process, as the same classes.

    `where` begins the message: the study file, or a trial of the search.
    """
    _check_names(thing, where)
    again = _restarted(thing, where)
    if again.fingerprint != thing.fingerprint:
        raise UserError(f"{where}: it comes back from its own JSON as another one: {thing!r:.200} as {again!r:.200}")


def _restarted(thing: Any, where: str) -> Any:
    try:
        return type(thing).model_validate(json.loads(thing.model_dump_json()))
    except ValueError as error:  # pydantic's errors are
        raise UserError(f"{where}: it does not come back from its own JSON: {describe(error)}") from error


def _check_names(thing: Frozen, where: str) -> None:
    for place, part in _own(thing):
        if not isinstance(part, type | FunctionType):
            problem = f"{part!r:.80}, which JSON cannot name; use a function made with def, or a class with fields"
        elif has_name(part):
            continue
        elif "<lambda>" in part.__qualname__:
            problem = "a lambda, which has no name after a restart; use a function made with def, outside of any other"
        elif "<locals>" in part.__qualname__:
            what = f"{part.__qualname__}, which is made in a function and has no name after a restart"
            problem = f"{what}; move it out of the function, and make what varies a field of its class"
        else:
            problem = f"{part.__qualname__}, but this name means something else in its file now; give each its own name"
        raise UserError(f"{where}: {place} is {problem}")


def _own(thing: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The classes and functions in an object that are not of the package, each with its place, such as candidates.a.loss."""
    if isinstance(thing, Frozen):
        if not type(thing).__module__.startswith("softseg_dist."):
            yield place or "it", type(thing)
        inner: Iterator[tuple[str, Any]] = ((name, getattr(thing, name)) for name in type(thing).model_fields)
    elif isinstance(thing, Mapping):
        inner = ((str(name), value) for name, value in thing.items())
    elif isinstance(thing, list | tuple):
        inner = ((str(index), value) for index, value in enumerate(thing))
    else:
        if callable(thing):
            yield place, thing
        return
    for name, value in inner:
        yield from _own(value, f"{place}.{name}" if place else name)


def load_sources(sources: Sources, folder: Path | None = None, *, anew: bool = False) -> ModuleType | None:
    """Run a study file, with its helper modules to be imported by it; once per process, or `anew`. Returns its module.

    Without a study file all helpers are imported. `folder` is where the files are, if they are on this machine.
    Raises UserError with file, line and cause if a text cannot be run.
    """
    study = STUDY_MODULES + Path(sources.study).stem if sources.study else ""
    files = {study if file == sources.study else name: file for name, file in sources.modules.items()}
    with _loading:  # fits that run side by side in one process load it at once
        if _TEXTS not in sys.meta_path:
            sys.meta_path.insert(0, _TEXTS)
        current = all(name in _TEXTS.known and _TEXTS.known[name].sources == sources for name in files)
        if current and not anew:
            return TEXT_MODULES.get(study)
        before, known, made = dict(sys.modules), dict(_TEXTS.known), dict(TEXT_MODULES)
        shown = {name: known[name].shown if current else file for name, file in files.items()}
        if folder is not None:
            shown = {name: str(folder / file) for name, file in files.items()}
        _TEXTS.known |= {name: _Text(sources, file, shown[name]) for name, file in files.items()}
        for name in files:
            sys.modules.pop(name, None)
        try:
            if study:
                module = sys.modules[study] = ModuleType(study)  # its name is not one that can be imported
                _TEXTS.exec_module(module)
            else:
                for name in files:
                    importlib.import_module(name)
        except (Exception, SystemExit) as error:
            place = line_of(error) or shown[study or next(iter(files))]
            _TEXTS.known = known
            TEXT_MODULES.clear()
            TEXT_MODULES.update(made)
            _put_back(files, before)
            raise UserError(f"{place}: {describe(error)}") from error
        _put_back(files.keys() - made.keys(), before)  # what a notebook has imported stays what it is there
        return TEXT_MODULES.get(study)


def _put_back(names: Iterable[str], before: Mapping[str, ModuleType]) -> None:
    for name in names:
        if name in before:
            sys.modules[name] = before[name]
        elif name not in TEXT_MODULES:
            sys.modules.pop(name, None)


class _Text(NamedTuple):
    """A module to be: the file in `sources`, shown under a name in messages and to debuggers."""

    sources: Sources
    file: str
    shown: str


class _Texts(MetaPathFinder, Loader):
    """Imports modules from the text of sources. `known` has them by name."""

    def __init__(self) -> None:
        self.known: dict[str, _Text] = {}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.known:
            return None
        text = self.known[name]
        return spec_from_loader(name, self, origin=text.shown, is_package=text.file.endswith("__init__.py"))

    def exec_module(self, module: ModuleType) -> None:
        known = self.known[module.__name__]
        text = known.sources.texts[known.file]
        module.__file__ = known.shown
        module.__dict__[SOURCES] = known.sources
        lines = text.splitlines(keepends=True)
        linecache.cache[known.shown] = (len(text), None, lines, known.shown)  # so that inspect finds the source
        TEXT_MODULES[module.__name__] = module
        exec(compile(text, known.shown, "exec"), module.__dict__)


_TEXTS = _Texts()


def describe(error: BaseException) -> str:
    """One line that says what is wrong, in the words of pydantic where it knows the field and the value."""
    if isinstance(error, PydanticUserError) and error.code == "model-field-missing-annotation":
        found = error.message.partition("`")[2].partition("`")[0]
        return f"{found}: a field has a type, such as weight: float = 2.0"
    if isinstance(error, TypeError) and "BaseModel.__init__()" in str(error):
        return "arguments are given by name, such as FocalTversky(alpha=0.3)"
    if not isinstance(error, ValidationError):
        return str(error) if isinstance(error, UserError) else in_words(error)
    first, more = error.errors()[0], error.error_count() - 1
    place = ".".join([error.title, *map(str, first["loc"])])
    message = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("value_error", "missing") else f", got {first['input']!r:.80}"
    return f"{place}: {message}{value}" + (f" (and {more} more)" if more else "")


def line_of(error: BaseException) -> str:
    """`s009_mine.py, line 3`: the last line of a study file or helper on the way to an error; "" if there is none."""
    files = {text.shown for text in _TEXTS.known.values()}
    if isinstance(error, SyntaxError) and error.filename in files:
        return f"{error.filename}, line {error.lineno or 0}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}, line {frames[-1].lineno or 0}" if frames else ""
