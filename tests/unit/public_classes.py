"""Which classes a property suite must cover: all public ones of its base class, as the package's table of public names says."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import softseg_dist


def public_classes(base: type) -> set[type]:
    """The public classes that implement `base`, without the abstract ones."""
    public = [getattr(softseg_dist, name) for name in softseg_dist.__all__]
    kinds = {thing for thing in public if isinstance(thing, type) and issubclass(thing, base)}
    return {kind for kind in kinds if not inspect.isabstract(kind)}


def assert_covered(base: type, instances: Iterable[object]) -> None:
    """Every public class that implements `base` is the class of one of the `instances` that a property suite runs over."""
    missing = public_classes(base) - {type(instance) for instance in instances}
    names = ", ".join(sorted(kind.__name__ for kind in missing))
    assert not missing, f"the property suite of {base.__name__} does not run over {names}: add an instance to the list in this file"
