"""Every command that the product prints runs as printed, in folders whose names have spaces; so do those that these print."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from threading import Thread

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from commands import Ended, softseg_here
from mlflow.cli import cli

pytestmark = pytest.mark.engine

STUDY = """
from softseg_dist import *

STUDY = Study(
    name="tiny",
    question="Does it run?",
    data=Bids("my data", image=("T2w", "T1w"), labels={"GM": "label-GM_mask"}),
    preprocess=Preprocess(dim=2, crop=(16, 16), center="label-cord_dseg:2"),
    splits=MonteCarlo(count=COUNT),
    candidates=factorial(Recipe(network=UNet(filters=(4, 8)), optim=Optim(epochs=1, batch_size=8)), label=("hard", "soft")),
    control="hard",
)
"""
PRINTED = re.compile(r"(?:^|\s)((?:\S*/)?(?:softseg|mlflow|python) (?:-m|[a-z]+) .*)$", re.MULTILINE)


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([1, 1, 4, 1])), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two channels, whose crop is centred on a mask, and a new image of it with the names that commands print."""
    root = tmp_path_factory.mktemp("my studies")
    for number in range(6):
        subject, generator, mask = f"sub-{number}", np.random.default_rng(number), np.zeros((20, 18, 4))
        mask[6:12, 6 : 10 + number % 3] = 1
        for part, voxels in {"T2w": generator.normal(size=mask.shape) + mask, "T1w": generator.normal(size=mask.shape)}.items():
            save(root / f"my data/{subject}/anat/{subject}_{part}.nii.gz", voxels)
        for part, voxels in {"label-GM_mask": mask, "label-cord_dseg": 2 * mask}.items():
            save(root / f"my data/derivatives/labels/{subject}/anat/{subject}_T2w_{part}.nii.gz", voxels)
    for source, name in {"T2w": "IMAGE1", "T1w": "IMAGE2"}.items():
        shutil.copy(root / f"my data/sub-0/anat/sub-0_{source}.nii.gz", root / f"{name}.nii.gz")
    shutil.copy(root / "my data/derivatives/labels/sub-0/anat/sub-0_T2w_label-cord_dseg.nii.gz", root / "MASK.nii.gz")
    (root / "my study.py").write_text(STUDY.replace("COUNT", "2"))
    (root / "long.py").write_text(STUDY.replace("COUNT", "200").replace('"tiny"', '"tiny-long"'))
    return root


def execute(line: str, folder: Path) -> Ended:
    """What a line of a shell does. `softseg` runs in this process; `mlflow ui` starts no server: its options alone are tried."""
    program, *words = shlex.split(line)
    assert (folder / program).exists() or shutil.which(program), line
    if Path(program).name == "softseg":
        return softseg_here(*words, cwd=folder)
    if Path(program).name == "mlflow":
        done = CliRunner().invoke(cli, [*words, "--help"])
        return subprocess.CompletedProcess([program, *words], done.exit_code, done.stdout, done.stderr)
    environment = {**os.environ, "BROWSER": "echo %s"}
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


EXECUTED: set[str] = set()  # once is enough


def needs_ray(line: str) -> bool:
    """A run on Ray differs from the local one, which is tried, in nothing that is printed; see tests/engine/test_cli.py."""
    words = shlex.split(line)[1:]
    return words[0] == "run" and not {"--debug", "--local"} & {*words}


def printed_by(words: list[str], folder: Path) -> list[list[str]]:
    """Execute a command and then all that are printed; returns the words of the printed ones, without the program."""
    ended, printed = [softseg_here(*words, cwd=folder)], list[str]()
    while ended:
        done = ended.pop()
        assert done.returncode == 0, (done.args, done.stdout, done.stderr)
        printed += (lines := PRINTED.findall(done.stdout + done.stderr) if done.args[0] == "softseg" else [])
        ended += [execute(line, folder) for line in lines if line not in EXECUTED and not needs_ray(line)]
        EXECUTED.update(lines)
    return [shlex.split(line)[1:] for line in printed]


def test_the_commands_of_a_debug_run_and_of_the_run_that_it_recommends(folder: Path) -> None:
    options = ["my study.py", "--data-root", ".", "--stores", "my stores", "--local"]
    printed, model = printed_by(["run", *options, "--debug"], folder), str(folder / "runs/tiny/model")
    assert ["run", *options] in printed
    assert ["predict", model, "IMAGE1.nii.gz,IMAGE2.nii.gz", "--out", "maps", "--center-mask", "MASK.nii.gz"] in printed
    assert ["report", str(folder / "runs/tiny"), "--json"] in printed
    assert ["ui", "--backend-store-uri", f"sqlite:///{folder}/runs/tiny/mlflow.db"] in printed
    assert any(words[:2] == ["-m", "webbrowser"] for words in printed)
    assert list((folder / "maps").glob("*.nii.gz"))


def test_the_commands_of_all_others(folder: Path) -> None:
    study = ["my study.py", "--data-root", "."]
    assert ["run", *study, "--debug"] in printed_by(["check", *study], folder)
    assert ["plan", *study, "--run", "runs/tiny-debug"] in printed_by(["plan", *study], folder)
    judged = ["evaluate", *study, "--predictions", "ours=runs/tiny", "--out", "my runs"]
    assert ["report", "my runs/tiny-evaluation", "--json"] in printed_by(judged, folder)
    for words in (["prepare", *study], ["refit", "runs/tiny", "--local"], ["report", "runs/tiny"], ["status", "runs/tiny"]):
        assert not printed_by(words, folder)


def test_the_command_of_init(folder: Path) -> None:
    """What `softseg check` prints of this study is tried by tests/engine/test_init.py."""
    told = softseg_here("init", "my data", "--out", "first study.py", cwd=folder)
    (line,) = PRINTED.findall(told.stdout)
    assert shlex.split(line)[1:] == ["check", "first study.py"]
    assert execute(line, folder).returncode == 0
    heads = re.findall(r"softseg \w+ .*?\.py'?", (folder / "first study.py").read_text())
    assert heads == [f"softseg {name} 'first study.py'" for name in ("check", "run", "run")]


def test_the_commands_of_a_run_that_was_interrupted_after_a_fit(folder: Path) -> None:
    def interrupt() -> None:
        while not (folder / "runs/tiny-long/fits/hard/000.json").exists():
            time.sleep(0.05)  # polling a file that the run writes
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    ended = softseg_here("run", "long.py", "--data-root", ".", "--local", cwd=folder)
    assert ended.returncode == 130, ended.stderr
    printed = PRINTED.findall(ended.stdout)
    assert ["report", str(folder / "runs/tiny-long"), "--json"] in [shlex.split(line)[1:] for line in printed]
    for line in printed:
        assert execute(line, folder).returncode == 0, line
