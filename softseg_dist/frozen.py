"""Frozen: validated, immutable objects that are called directly and say in JSON exactly what they are.

Every loss, activation, augmentation, network, data set, recipe and study is one. The JSON of an object names its class
under "type", so that a field declared as `Loss` comes back as the `AdaptiveWing` it was. Classes and functions of a study
are named "<module>:<name>" and carry a digest of all code of the study that they reach (see `sources`).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, reduce
from importlib.machinery import PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, ClassVar, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_serializer, model_validator

import softseg_dist
from softseg_dist.errors import UserError
from softseg_dist.sources import Sources

STUDY_MODULES = "softseg_study."  # study files live in sys.modules under this prefix and their stem
TEXT_MODULES: dict[str, ModuleType] = {}  # the modules that were made from the texts of `Sources`, by name
SOURCES = "__softseg_sources__"  # the variable of such a module that holds its `Sources`
INSTALLED = {"site-packages", "dist-packages"}  # the folders of packages that pip or the system has installed
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def digest(text: str | bytes, length: int = 12) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of `text`."""
    data = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:length]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sealed(value: dict[str, Any]) -> str:
    """JSON behind its own digest, so that damage to it is seen."""
    text = canonical_json(value)
    return digest(text) + text


def unsealed(text: bytes) -> dict[str, Any]:
    """The inverse of `sealed`. Raises ValueError if the text was changed."""
    if digest(text[12:]) != text[:12].decode():
        raise ValueError("its description was changed")
    return cast("dict[str, Any]", json.loads(text[12:]))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields in the JSON of an object, nested ones joined by dots, the objects of a list by number.

    >>> dict(leaves({"loss": {"type": "AdaptiveWing", "omega": 14.0}, "augment": [{"type": "Flip"}]}))
    {'loss': 'AdaptiveWing', 'loss.omega': 14.0, 'augment.0': 'Flip'}
    """
    if isinstance(value, Mapping):
        if path and "type" in value:
            yield path, value["type"]
        for name, item in value.items():
            if name not in ("type", "code"):
                yield from leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


def grouped(pairs: Iterable[tuple[K, V]]) -> defaultdict[K, list[V]]:
    """The second of each pair by the first, in their order; [] for what is none."""
    groups = defaultdict[K, list[V]](list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def tag_of(thing: type | FunctionType) -> str:
    """`AdaptiveWing` for what the package defines, `s009_mine:MyLoss` for what a study (or a test) defines."""
    module = thing.__module__
    if module.startswith("softseg_dist."):
        return thing.__qualname__
    if module == "__main__" and (file := getattr(sys.modules[module], "__file__", None)):
        module = Path(file).stem
    return f"{module.removeprefix(STUDY_MODULES)}:{thing.__qualname__}"


def thing_of(tag: str) -> Any:
    """The class or function that `tag_of` named, in a module that is loaded or installed; None if there is none."""
    module, _, name = tag.partition(":")
    found: Any = TEXT_MODULES.get(STUDY_MODULES + module) or TEXT_MODULES.get(module) or sys.modules.get(module)
    main = sys.modules["__main__"]
    if found is None and Path(getattr(main, "__file__", None) or "").stem == module:
        found = main
    return reduce(lambda outer, part: getattr(outer, part, None), name.split("."), found or _installed(module))


def _installed(module: str) -> ModuleType | None:
    """A module of an installed package, which only the process that has made the study may have imported so far."""
    folders = [entry for entry in sys.path if INSTALLED & set(Path(entry).parts)]
    with suppress(ImportError):
        return importlib.import_module(module) if PathFinder.find_spec(module.partition(".")[0], folders) else None
    return None


def has_name(thing: type | FunctionType) -> bool:
    """Is a class or function what its module holds under its name? Else no other process finds it by `tag_of`."""
    first, *rest = thing.__qualname__.split(".")
    return reduce(lambda found, part: getattr(found, part, None), rest, _namespace(thing).get(first)) is thing


def _namespace(thing: type | FunctionType) -> Mapping[str, Any]:
    """The variables of the module that defines a class or function: that one, even if another has taken its place."""
    if isinstance(thing, type):
        return vars(getattr(thing, "__softseg_module__", None) or sys.modules[thing.__module__])
    return cast("Mapping[str, Any]", getattr(inspect.unwrap(thing), "__globals__", {}))


def sources_of(thing: type | FunctionType) -> Sources | None:
    """The texts that define a thing of the user; None for installed packages. Raises UserError if its module has no file."""
    own = _namespace(thing).get(SOURCES)
    if own is not None or thing.__module__.startswith("softseg_dist."):
        return cast("Sources | None", own)
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    if thing.__module__.partition(".")[0] in sys.stdlib_module_names or INSTALLED & set(Path(file or "").parts):
        return None
    if file is None or not Path(file).is_file():
        raise UserError(f"{thing.__qualname__} has no source file; put it in a file, and import it from there")
    return _sources_in(Path(file), thing.__module__, Path(file).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _sources_in(path: Path, module: str, modified_ns: int) -> Sources:
    if module == "__main__":
        return Sources.beside(path)
    return Sources.beside(path, path.parents[module.count(".") + (path.name == "__init__.py")])


def code_of(thing: type | FunctionType) -> str | None:
    """Digest of all code of the user that a class or function reaches; None for those of installed packages."""
    if (sources := sources_of(thing)) is None:
        return None
    return _code(sources, tag_of(thing).partition(":")[0], thing.__qualname__)


@lru_cache(maxsize=4096)
def _code(sources: Sources, module: str, name: str) -> str:
    reached = sources.reached(module, name)
    return digest(canonical_json(sorted((*key, definition.text) for key, definition in reached.items())))


def _subclasses(cls: type[Frozen]) -> Iterator[type[Frozen]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


class Frozen(BaseModel):
    """Base of all objects of a study file: frozen, strict about unknown fields, comparable, printable, JSON both ways.

    >>> from softseg_dist import AdaptiveWing
    >>> AdaptiveWing(omega=8).replace(theta=0.4)
    AdaptiveWing(omega=8.0, theta=0.4)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    short: ClassVar[str] = ""  # the name of this object in a candidate's name: "wing" in "soft-normrelu-wing"
    __softseg_module__: ClassVar[ModuleType | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.__softseg_module__ = sys.modules.get(cls.__module__)
        if "short" in cls.model_fields:
            raise UserError(f'{cls.__name__}: short is no field; write it without a type, such as short = "wing"')

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict) or "type" not in data:
            return handler(data)
        fields = {k: _found(v) for k, v in data.items() if k not in ("type", "code")}
        if data["type"] == tag_of(cls):
            return handler(fields)
        if ":" in data["type"]:
            known = [thing_of(data["type"])]
        elif data["type"] in softseg_dist.__all__:
            known = [getattr(softseg_dist, data["type"])]  # imports the module that defines it
        else:
            known = [child for child in _subclasses(cls) if tag_of(child) == data["type"]]
        for child in known:
            if isinstance(child, type) and issubclass(child, cls):
                return child.model_validate(fields)
        raise ValueError(f"{cls.__name__} of type {data['type']!r} is unknown: load the study file that defines it first")

    @model_serializer(mode="plain")
    def _tagged(self) -> dict[str, Any]:
        cls = type(self)
        head = {"type": tag_of(cls)} | ({"code": code} if (code := code_of(cls)) else {})
        values = {name: getattr(self, name) for name in cls.model_fields}
        functions = {k: {"function": tag_of(v), "code": code_of(v)} for k, v in values.items() if isinstance(v, FunctionType)}
        return head | values | functions

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Only what differs from the defaults, so that objects print as one would write them."""
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) != field.get_default(call_default_factory=True, validated_data={}):
                yield name, value

    def __str__(self) -> str:
        return repr(self)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed. Raises pydantic.ValidationError on an unknown field or bad value."""
        return type(self)(**({name: getattr(self, name) for name in type(self).model_fields} | changes))

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that are equal if and only if the JSON of two objects is."""
        return digest(canonical_json(self.model_dump(mode="json")))


def _found(value: Any) -> Any:
    """A value from its JSON. Raises ValueError if it is a function, and the file that defines it is not loaded."""
    if not isinstance(value, Mapping) or value.keys() != {"function", "code"}:
        return value
    if not isinstance(function := thing_of(value["function"]), FunctionType):
        raise ValueError(f"function {value['function']!r} is unknown: load the study file that defines it first")
    return function
