"""A real run of nnU-Net v2 beside one of ours in one report: the same two folds of hippocampus_msd, judged by the same masks.

Run:     SOFTSEG_TEST_DATA=DATA python tests/benchmarks/bench_peer_judged.py --peer [--keep FOLDER]    (without --peer: nothing)
Target:  its training takes at most 20 minutes

The study is `nnunet_study.py`. Its folds go to nnU-Net through `softseg plan --write-splits`. nnU-Net plans and preprocesses its 2D
configuration and trains both folds at once on a thread each: its own trainer, network, augmentation and schedule, but for
batches of 32 slices (it plans 366), few of them, and predictions without mirrored copies. So the table shows that predictions
of nnU-Net are judged as ours are; which program is better after a full training, it does not show.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nnunet_sides import DATASET, NUMBER, lay_out, variables
from peers import add_peer_options, environment, may_run_nnunet, version
from record import Headline, record

from softseg_dist import load

STUDY = Path(__file__).with_name("nnunet_study.py")
FOLDS, BATCH_SIZE, EPOCHS = 2, 32, 10
HEADLINES = (
    Headline(key="train_min", what="training of nnU-Net's 2D network in both folds, a thread each", unit="min", at_most=20),
    Headline(key="nnunet_brier_skill", what="its Brier skill on hippocampus_msd, mean over subjects"),
    Headline(key="ours_brier_skill", what="Brier skill of our small U-Net in the same folds"),
)
# In nnU-Net's environment: its plans with smaller batches, and a fold of its trainer with fewer of them.
SHRINK = """
import json, sys
path, size = sys.argv[1], int(sys.argv[2])
plans = json.load(open(path))
plans["configurations"]["2d"]["batch_size"] = size
json.dump(plans, open(path, "w"))
"""
TRAIN = """
import sys, torch
from nnunetv2.run.run_training import get_trainer_from_args
number, fold, epochs, batches = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
trainer = get_trainer_from_args(number, "2d", fold, device=torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, batches, 1
trainer.run_training()
trainer.inference_allowed_mirroring_axes = None
trainer.perform_actual_validation(save_probabilities=True)
"""


def main(envs: Path, keep: Path | None, batches: int) -> None:
    """Train both, judge both, print what came out."""
    root = Path(os.environ["SOFTSEG_TEST_DATA"]).absolute()
    python = environment(envs, "nnunetv2")
    with tempfile.TemporaryDirectory() as name:
        folder = keep.absolute() if keep else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"nnU-Net {version(python, 'nnunetv2')}, {lay_out(folder, root)} volumes", flush=True)
        splits, runs = folder / "splits_final.json", folder / "runs"
        softseg("plan", STUDY, "--data-root", root, "--write-splits", splits)
        started = time.monotonic()
        train_nnunet(python, folder, splits, batches)
        train_min = (time.monotonic() - started) / 60
        print(f"nnU-Net: {train_min:.1f} min", flush=True)
        softseg("run", STUDY, "--local", "--data-root", root, "--out", runs)
        theirs = folder / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__2d"
        candidates = ["--predictions", f"nnunet={theirs}", "--predictions", f"ours={runs / 'nnunet_beside_ours'}"]
        softseg("evaluate", STUDY, "--data-root", root, *candidates, "--splits", splits, "--out", runs)
        run = load(runs / "nnunet_beside_ours-evaluation")
        print(run.ranking.to_string(), run.tests.to_string(), run.answer, sep="\n")
        skill = run.ranking.set_index("candidate")["mean"]
        record("peer_judged", {"train_min": train_min} | {f"{of}_brier_skill": float(skill[of]) for of in skill.index}, HEADLINES)


def softseg(*arguments: object) -> None:
    """A command of ours, with what it prints. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "softseg_dist.cli.main", *map(str, arguments)], check=True)


def train_nnunet(python: Path, folder: Path, splits: Path, batches: int) -> None:
    """Plan, preprocess, train both folds and predict their test cases, with probabilities."""
    settings = os.environ | variables(folder) | {"nnUNet_n_proc_DA": "1", "OMP_NUM_THREADS": "1", "nnUNet_compile": "f"}
    plan = [str(python.parent / "nnUNetv2_plan_and_preprocess"), "-d", NUMBER, "-c", "2d", "-np", "2", "-npfp", "2"]
    said = (folder / "nnunet.log").open("w")
    subprocess.run(plan, env=settings, check=True, stdout=said, stderr=said)
    prepared = folder / "preprocessed" / DATASET
    shutil.copy(splits, prepared / splits.name)
    subprocess.run([python, "-c", SHRINK, str(prepared / "nnUNetPlans.json"), str(BATCH_SIZE)], check=True)
    train = [str(python), "-c", TRAIN, NUMBER]
    numbers = [str(EPOCHS), str(batches)]
    folds = [subprocess.Popen([*train, str(fold), *numbers], env=settings, stdout=said, stderr=said) for fold in range(FOLDS)]
    ended = [fold.wait() for fold in folds]
    if any(ended):
        raise RuntimeError(f"nnU-Net has failed: {(folder / 'nnunet.log').read_text()[-2000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_peer_options(parser)
    parser.add_argument("--keep", type=Path, help="where the runs stay, to look at; default: nowhere")
    parser.add_argument("--batches", type=int, default=20, help=f"of each of nnU-Net's {EPOCHS} epochs")
    options = parser.parse_args()
    if may_run_nnunet(options.peer):
        main(options.envs, options.keep, options.batches)
