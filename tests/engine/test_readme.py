"""Every command that the README prints is executed as printed, in order, in one folder; so is its study."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest

from softseg_dist import Phantom
from softseg_dist.study_file import load_study

pytestmark = pytest.mark.engine

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
# What cannot run here, and why. Of a `softseg` command every option must still be one of its --help.
NOT_RUN = {
    "pip install": "an environment of its own: tests/versions.sh",
    "--workers-per-fit": "of a finished study it would train nothing: tests/engine/test_cli.py",
    "--fits-per-gpu": "a GPU: tests/engine/test_packs.py",
    "--address": "a cluster: tests/engine/test_cluster.py",
    "s3://": "a bucket: tests/engine/test_remote.py",
}


class Command(NamedTuple):
    """A line of an indented block; `text` is without its comment."""

    text: str

    @property
    def runs_here(self) -> bool:
        return not any(part in self.text for part in NOT_RUN)


def study_of(text: str) -> str:
    (study,) = re.findall(r"^```python\n(from softseg_dist import \*\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return study


def script_of(text: str) -> str:
    (script,) = re.findall(r"^```python\n(import softseg_dist\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return script


def commands_of(text: str) -> list[Command]:
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ {4}(\S.*)$", outside, re.MULTILINE)
    return [Command(re.split(r"\s+#", line)[0]) for line in lines]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.timeout(1500)  # a minute and a half, if nothing else runs
def test_every_command_of_the_readme_does_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(study_of(README))
    data = Phantom(subjects=1).scan(None)[0].load()
    nib.save(nib.Nifti1Image(np.asarray(data.image[0]), data.affine), tmp_path / "IMAGE.nii.gz")
    (tmp_path / "FOLDER").mkdir()
    for case in load_study(tmp_path / "study.py").study.data.scan(None):  # what another program predicted: a mask of one rater
        found = case.load()
        nib.save(nib.Nifti1Image(found.raters[0, 0].astype(np.uint8), found.affine), tmp_path / "FOLDER" / f"{case.name}.nii.gz")
    for command in commands_of(README):
        if command.runs_here:
            done = run(command.text, tmp_path)
            assert done.returncode == 0, f"{command.text}\n{done.stdout}\n{done.stderr}"
    script = "import nibabel\n\nimage = nibabel.load('IMAGE.nii.gz')\n" + script_of(README) + "print(soft_map.shape)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{data.image[0].shape}\n")
    named = re.findall(r"`((?:report|model|fits)/[\w.]*|results\.parquet|mlflow\.db)`", README)
    assert len(named) == 5
    assert not [name for name in named if not (tmp_path / "runs/soft_or_hard" / name).exists()]
    assert (tmp_path / "montage.png").exists()
    assert list((tmp_path / "maps").glob("*.nii.gz"))
    assert list((tmp_path / "runs/soft_or_hard/report").glob("*.csv"))


def test_every_option_of_a_command_that_cannot_run_here_is_one_of_its_help(tmp_path: Path) -> None:
    rest = [command.text for command in commands_of(README) if not command.runs_here]
    assert len(rest) == 6
    for text in rest:
        program, name, *arguments = shlex.split(text)
        if program == "softseg":
            told = run(f"softseg {name} --help", tmp_path).stdout
            options = [argument for argument in arguments if argument.startswith("--")]
            assert not [option for option in options if not re.search(rf"{option}\b", told)], f"{text}\n{told}"


def test_the_study_of_the_readme_has_at_most_twelve_lines() -> None:
    assert len([line for line in study_of(README).splitlines() if line]) <= 12
