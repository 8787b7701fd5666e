"""GPU tests and the GPU benchmark run on a machine that has torch, monai, numpy, scipy, nibabel, pyarrow and pydantic alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_runs_and_tells_no_figure() -> None:
    written = sorted((ROOT / "tests/benchmarks/out").glob("gpu_*"))
    done = bare("tests/benchmarks/bench_gpu.py", "unet3d", "dice", "cost")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no CUDA device: nothing was measured; all parts have run once on the CPU, at tiny sizes\n"
    assert sorted((ROOT / "tests/benchmarks/out").glob("gpu_*")) == written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.long
def test_all_parts_of_the_first_minutes_on_a_gpu_run_without_one(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/bare.py "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    command = [ROOT / "tests/gpu/first_minutes.sh", "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished after 1 epochs" in done.stdout
    assert done.stdout.count("no CUDA device: nothing was measured") == 2


@pytest.mark.parametrize("package", ["ray", "mlflow", "optuna", "pandas", "safetensors", "hypothesis"])
def test_what_it_lacks_cannot_be_imported_in_these_tests(package: str) -> None:
    done = bare("-m", package)
    assert f"No module named {package}" in done.stderr
