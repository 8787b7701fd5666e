"""GPU tests and the GPU benchmark run on a machine that has torch, monai, numpy, scipy, nibabel, pyarrow and pydantic alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(HERE / "bare.py"), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_gpu_tests_are_collected() -> None:
    done = bare("-m", "pytest", "--collect-only", "-m", "gpu", "tests/gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {line.partition("::")[0].rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line} == files


@pytest.mark.parametrize("package", ["ray", "mlflow", "optuna", "pandas", "safetensors", "hypothesis"])
def test_what_it_lacks_cannot_be_imported_in_these_tests(package: str) -> None:
    done = bare("-m", package)
    assert f"No module named {package!r}" in done.stderr
