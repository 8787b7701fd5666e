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
    "frozen": {"errors"},
    "places": {"errors"},
    "numerics": {"errors", "frozen"},
    "data": {"errors", "frozen", "places"},
    "study": {"errors", "frozen", "numerics", "data"},
    "study_file": {"errors", "frozen", "study"},
    "training": {"errors", "frozen", "numerics", "data", "study"},
    "search": {"errors", "frozen", "places", "numerics", "data", "study", "study_file", "training"},
    "report": {"errors", "frozen", "places", "numerics", "data", "study", "training", "search"},
    "prediction": {"errors", "data", "study_file", "training"},
    "plan": {"errors", "frozen", "data", "study", "study_file", "search"},
    "preparation": {"data", "study"},
    "pipeline": {
        "ensembles",
        "final_model",
        "holdout",
        "preparation",
        "errors",
        "frozen",
        "places",
        "numerics",
        "data",
        "study",
        "study_file",
        "training",
        "search",
        "report",
    },
    "final_model": {"errors", "places", "data", "search", "study", "training"},
    "ensembles": {"errors", "final_model", "numerics", "search", "study", "training"},
    "holdout": {"errors", "data", "search", "study", "training", "final_model"},
    "nested": {
        "errors",
        "frozen",
        "places",
        "study",
        "study_file",
        "training",
        "search",
        "report",
        "holdout",
        "pipeline",
        "preparation",
    },
    "cli_options": set(),
    "cli_compare": {"cli_options", "pipeline", "report"},
    "cli_models": {"cli_options", "search", "pipeline", "prediction"},
    "cli_submit": {"cli_options", "study_file", "search"},
    "cli": {
        "errors",
        "data",
        "study_file",
        "search",
        "report",
        "pipeline",
        "nested",
        "plan",
        "preparation",
        "cli_options",
        "cli_compare",
        "cli_models",
        "cli_submit",
    },
}
OWNERS = {
    "nibabel": ("data/volume.py",),
    "pyarrow.fs": ("places.py",),
    "pyarrow.ipc": ("data/store.py", "data/records.py"),
    "optuna": ("search/optuna_study.py",),
    "ray": (
        "search/run.py",
        "search/cluster.py",
        "search/reach.py",
        "search/submit.py",
        "search/orphans.py",
        "search/packs.py",
        "search/pack_size.py",
        "training/workers.py",
    ),
    "mlflow": ("search/tracking_server.py",),
    "monai": ("numerics/networks.py", "numerics/patches.py", "numerics/surface.py"),
    "matplotlib": (
        "report/look.py",
        "report/figures.py",
        "report/diagrams.py",
        "report/pictures.py",
        "report/page.py",
        "data/montage.py",
    ),
    "jinja2": ("report/page.py",),
    "typer": ("cli.py", "cli_compare.py", "cli_models.py", "cli_options.py", "cli_submit.py"),
    "safetensors": ("training/model.py",),
    "yaml": ("plan.py",),
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
    if layer == "__init__":
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
    assert users <= set(OWNERS[package])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_under_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_importing_the_package_and_its_command_line_loads_no_heavy_package() -> None:
    code = "import sys, softseg_dist, softseg_dist.cli; print(*{'torch', 'ray', 'mlflow', 'optuna', 'monai'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_every_public_name_resolves() -> None:
    assert all(getattr(softseg_dist, name) is not None for name in softseg_dist.__all__)
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = softseg_dist.NoSuchName
