"""A real run of a study with helper modules: they travel to every worker, an edit is refused, a new name runs it beside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import softseg, softseg_here

pytestmark = pytest.mark.engine

STUDY = """
from lab.networks import Point
from softseg_dist import *
import weights

class Weighted(Brier):
    def per_sample(self, prediction, target):
        return weights.scaled(super().per_sample(prediction, target))

STUDY = Study(
    name="helped", question="?", data=Phantom(subjects=6, size=(16, 16), num_slices=2), preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2), candidates={"a": Recipe(network=Point(), loss=Weighted(), optim=Optim(epochs=1, batch_size=8))},
)
"""
WEIGHTS = "def scaled(x):\n    return 3.0 * x\n"
NETWORKS = '''
import inspect
from torch import nn
from softseg_dist import Network

class Point(Network):
    """One number for each voxel."""
    def build(self, in_channels, out_channels, dim):
        assert "One number for each voxel" in inspect.getsource(type(self))
        return nn.Conv2d(in_channels, out_channels, 1)
    def last_bias(self, module, num_logits):
        return module.bias
'''


def write(folder: Path, name: str = "helped", weights: str = WEIGHTS) -> Path:
    (folder / "study/lab").mkdir(parents=True, exist_ok=True)
    (folder / "study/weights.py").write_text(weights)
    (folder / "study/lab/networks.py").write_text(NETWORKS)
    (folder / "study/helped.py").write_text(STUDY.replace('name="helped"', f'name="{name}"'))
    return folder / "study/helped.py"


def losses(run: Path) -> list[float]:
    files = sorted((run / "fits/a").glob("*/history.jsonl"))
    return [json.loads(file.read_text().splitlines()[0])["loss"] for file in files]


def test_helper_modules_travel_and_an_edit_is_refused_or_runs_beside(tmp_path: Path) -> None:
    for name in ("scipy", "weights", "json"):  # in the folder of the command, where no process may find them
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of notes')")
    of_users = {"RAY_TRAIN_V2_ENABLED": "0", "TUNE_RESULT_DIR": "/none", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}  # for other work
    ran = softseg("run", write(tmp_path), "--workers-per-fit", 2, "--json", cwd=tmp_path, env=os.environ | of_users)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    run = tmp_path / "runs/helped"
    assert [json.loads((run / f"fits/a/00{split}.json").read_text())["num_workers"] for split in (0, 1)] == [2, 2]
    texts = {path: path.read_text() for path in (run / "sources").iterdir()}
    assert {STUDY, WEIGHTS, NETWORKS} <= set(texts.values())

    edited = write(tmp_path, weights=WEIGHTS.replace("3.0", "300.0"))
    refused = softseg_here("run", edited, cwd=tmp_path)
    assert refused.returncode == 2
    line = "weights.py, line 2, scaled: return 3.0 * x -> return 300.0 * x (used by 1 (candidates.a.loss))"
    assert line in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {path: path.read_text() for path in (run / "sources").iterdir()} == texts

    before = losses(run)
    beside = softseg("run", write(tmp_path, "beside", WEIGHTS.replace("3.0", "300.0")), "--debug", cwd=tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert losses(run) == before
    assert losses(tmp_path / "runs/beside-debug")[0] > 50 * before[0], "every worker has computed with the helper of its study"

    (tmp_path / "elsewhere").mkdir()
    image = tmp_path / "elsewhere/new.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(16, 16, 2)).astype(np.float32), np.eye(4)), image)
    command = ["predict", run / "model", image, "--out", tmp_path / "maps"]
    with pytest.MonkeyPatch.context() as of_another_user:
        of_another_user.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert "lab/networks.py" in softseg_here(*command, cwd=image.parent).stderr
    predicted = softseg(*command, cwd=image.parent)
    assert predicted.returncode == 0, predicted.stderr
