"""Frozen: validated, immutable objects that are called directly and say in JSON exactly what they are.

Every loss, activation, augmentation, network, data set, recipe and study is one. The JSON of an object names its class
under "type", so that a field declared as `Loss` comes back as the `AdaptiveWing` it was. Classes and functions of a study
file are named "<file stem>:<name>" and carry a digest of their source, so that editing them changes the fingerprint.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_serializer, model_validator

import softseg_dist

STUDY_MODULES = "softseg_study."  # study files live in sys.modules under this prefix and their stem


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


def tag_of(thing: type | FunctionType) -> str:
    """`AdaptiveWing` for what the package defines, `s009_mine:MyLoss` for what a study file (or a test) defines."""
    module = thing.__module__
    if module.startswith("softseg_dist."):
        return thing.__qualname__
    return f"{module.removeprefix(STUDY_MODULES)}:{thing.__qualname__}"


def function_of(tag: str) -> FunctionType:
    """The function of a loaded study file that `tag_of` named. Raises ValueError if its study file is not loaded."""
    module, _, name = tag.partition(":")
    found = getattr(sys.modules.get(STUDY_MODULES + module) or sys.modules.get(module), name, None)
    if not isinstance(found, FunctionType):
        raise ValueError(f"function {tag!r} is unknown: load the study file that defines it first")
    return found


def _code(thing: type | FunctionType) -> str | None:
    """Digest of the source of what is not ours; None for the package's own classes, whose version is recorded elsewhere."""
    return None if thing.__module__.startswith("softseg_dist.") else digest(inspect.getsource(thing))


def _subclasses(cls: type[Frozen]) -> Iterator[type[Frozen]]:
    for child in reversed(cls.__subclasses__()):  # the latest definition first: a study file may be loaded again
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

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict) or "type" not in data:
            return handler(data)
        fields = {k: v for k, v in data.items() if k not in ("type", "code")}
        if data["type"] == tag_of(cls):
            return handler(fields)
        if data["type"] in softseg_dist.__all__:
            getattr(softseg_dist, data["type"])  # imports the module that defines it
        for child in _subclasses(cls):
            if tag_of(child) == data["type"]:
                return child.model_validate(fields)  # type: ignore[return-value]
        raise ValueError(
            f"{cls.__name__} of type {data['type']!r} is unknown: load the study file that defines it first"
        )

    @model_serializer(mode="plain")
    def _tagged(self) -> dict[str, Any]:
        cls = type(self)
        head = {"type": tag_of(cls)} | ({"code": code} if (code := _code(cls)) else {})
        return head | {name: _plain(getattr(self, name)) for name in cls.model_fields}

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


def _plain(value: Any) -> Any:
    if isinstance(value, FunctionType):
        return {"function": tag_of(value), "code": _code(value)}
    return value
