"""Run Python as on a bare GPU machine: `python bare.py FILE [ARGUMENT ...]`, or `-m MODULE`, sees few of the packages installed."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import ClassVar

INSTALLED = ("torch", "monai", "numpy", "scipy", "nibabel", "pyarrow", "pydantic", "pytest")


class FewPackages(PathFinder):
    """Finds what is there on `sys.path`, but for `hidden`."""

    hidden: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is None and fullname in cls.hidden:
            return None
        return super().find_spec(fullname, path, target)


def missing() -> set[str]:
    """Everything that can be imported here but belongs neither to what is installed there nor to what that needs."""
    there, todo = {"softseg-dist"}, list(INSTALLED)
    while todo:
        name = _normal(todo.pop())
        if name not in there:
            there.add(name)
            todo += _needs(name)
    owners = metadata.packages_distributions().items()
    return {package for package, of in owners if not there & {_normal(name) for name in of}}


def _needs(name: str) -> list[str]:
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # needed on other systems only
        return []
    return [found[0] for need in needs if "extra ==" not in need and (found := re.match(r"[\w.-]+", need))]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    FewPackages.hidden = missing()
    sys.meta_path[sys.meta_path.index(PathFinder)] = FewPackages
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
