"""Run Python as on a bare GPU machine: `python bare.py FILE [ARGUMENT ...]`, or `-m MODULE`, sees few of the packages installed."""

from __future__ import annotations

import re
import runpy
import sys
from importlib import metadata
from importlib.abc import MetaPathFinder

INSTALLED = ("torch", "monai", "numpy", "scipy", "nibabel", "pyarrow", "pydantic", "pytest")


class Missing(MetaPathFinder):
    """Finds nothing, and keeps others from finding it."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


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
    sys.meta_path.insert(0, Missing(missing()))
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
