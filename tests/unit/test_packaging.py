"""What is installed: a wheel that works without the repository, and a source distribution that holds all of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import softseg_dist

ROOT = Path(softseg_dist.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "from setuptools import build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "stores")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel of the repository as it is."""
    source = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    ran = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    sdist, wheel = sorted((source / "dist").iterdir(), key=lambda path: path.suffix)
    assert (sdist.suffix, wheel.suffix) == (".gz", ".whl")
    return sdist, wheel


@pytest.mark.engine
def test_the_source_distribution_holds_studies_tests_and_documents(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("studies", "tests", "docs", "cluster", "softseg_dist"):
        inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in inside if "__pycache__" not in name} <= names, folder
    assert {"Makefile", "requirements.lock", "README.md", "LICENSE"} <= names


@pytest.mark.engine
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "softseg_dist"
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.engine
def test_the_wheel_answers_and_shows_its_demonstration_without_the_repository(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def softseg(*arguments: str) -> str:
        command = [sys.executable, "-m", "softseg_dist.cli.main", *arguments]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert softseg("--version").strip() == f"softseg_dist {PROJECT['version']}"
    assert "8 candidates, each on 6 splits: 48 fits" in softseg("plan", str(tmp_path / "site/softseg_dist/demo.py"))


def test_the_version_is_one() -> None:
    assert softseg_dist.__version__ == PROJECT["version"]


def test_the_locked_versions_are_versions_that_the_project_accepts() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines)
    extras = [need for needs in PROJECT["optional-dependencies"].values() for need in needs]
    for need in map(Requirement, PROJECT["dependencies"] + extras):
        assert locked[need.name] in need.specifier, need
    assert locked["torch"] == "2.13.0"
