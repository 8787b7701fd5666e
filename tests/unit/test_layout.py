"""The package keeps its shape: imports point one way, heavy packages have one owner, the top module loads none of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softseg_dist

PACKAGE = Path(softseg_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# What each layer may import of the package; a layer may always import itself.
LAYERS = {
    "errors": set(),
    "sources": {"errors"},
    "frozen": {"errors", "sources"},
    "locks": {"errors"},
    "words": set(),
    "places": {"errors"},
    "numerics": {"errors", "frozen"},
    "data": {"errors", "frozen", "places", "locks"},
    "judging": {"places", "data", "numerics"},
    "study": {"errors", "frozen", "numerics", "data"},
    "study_file": {"errors", "frozen", "sources", "study"},
    "training": {"errors", "frozen", "sources", "places", "numerics", "data", "judging", "study"},
    "record": {"errors", "frozen", "sources", "places", "locks", "words", "data", "study", "training"},
    "search": {"errors", "numerics", "data", "study", "study_file", "training", "record"},
    "tracking": {"errors", "study", "study_file", "training", "record", "engine"},
    "engine": {
        "errors",
        "frozen",
        "places",
        "words",
        "numerics",
        "data",
        "judging",
        "sources",
        "study",
        "study_file",
        "training",
        "record",
        "search",
        "tracking",
    },
    "report": {"errors", "frozen", "words", "numerics", "data", "judging", "study", "training", "record"},
    "prediction": {"errors", "data", "study_file", "training"},
    "pipeline": {
        "errors",
        "places",
        "data",
        "judging",
        "sources",
        "study",
        "study_file",
        "training",
        "record",
        "search",
        "tracking",
        "engine",
        "report",
    },
    "nested": {
        "frozen",
        "places",
        "judging",
        "study",
        "study_file",
        "record",
        "engine",
        "report",
        "pipeline",
    },
    "api": {"errors", "study_file", "record", "engine", "report", "prediction", "pipeline", "nested"},
    "demo": set(softseg_dist.__all__),
    "cli": {
        "api",
        "errors",
        "words",
        "data",
        "study_file",
        "record",
        "tracking",
        "engine",
        "report",
        "prediction",
        "pipeline",
        "nested",
    },
}
OWNERS = {
    "nibabel": ("data/volume.py",),
    "pyarrow.fs": ("places.py",),
    "pyarrow.ipc": ("data/store.py",),
    "optuna": ("search/optuna_study.py",),
    "ray": ("engine/ray_",),
    "mlflow": ("tracking/server.py",),
    "monai": ("numerics/networks.py", "numerics/patches.py", "numerics/structures.py"),
    "matplotlib": ("report/", "data/montage.py"),
    "jinja2": ("report/page.py",),
    "typer": ("cli/",),
    "safetensors": ("training/model.py",),
    "yaml": ("engine/plan.py",),
    "filelock": ("locks.py",),
    "fcntl": (),
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return (
        names | {str(node.module) for node in froms} | {f"{node.module}.{a.name}" for node in froms for a in node.names}
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if path.name == "__init__.py":
        return
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("softseg_dist.")}
    assert ours - {layer} <= LAYERS[layer]


@pytest.mark.parametrize("package", OWNERS)
def test_a_heavy_package_is_imported_by_its_owners_only(package: str) -> None:
    users = {
        str(p.relative_to(PACKAGE))
        for p in FILES
        if any(n == package or n.startswith(package + ".") for n in imported(p))
    }
    assert not [user for user in users if not user.startswith(OWNERS[package])]


def test_importing_the_package_and_its_command_line_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'optuna', 'monai'}"
    code = f"import sys, softseg_dist, softseg_dist.cli.main; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
