"""Preparation and a training epoch beside nnU-Net v2's, on the 120 volumes of hippocampus_msd.

Run:     SOFTSEG_TEST_DATA=DATA python tests/benchmarks/bench_peer_nnunet.py --peer    (without --peer nothing is measured)
Targets: `softseg prepare` from nothing in a third of the time of fingerprint, plan and preprocessing with as many processes

Preparation: `nnUNetv2_plan_and_preprocess` of the one configuration that is trained, against `softseg prepare` of study s003. What
differs: nnU-Net plans a network and does not resample these volumes; ours resamples them to 2 mm. Start-up counts for both.

Training: voxels per second of nnU-Net's trainer on the CPU and of our `fit`: its planned network, patch size and batch, as many
threads, a few batches; its epoch has 250, to which seconds are scaled. What differs: nnU-Net trains outputs at lower resolutions,
too (deep supervision), and augments a share of its patches (rotation 20 %, noise 10 %, ..., in 3D also blur and low resolution) in
processes of its own beside the training threads; ours augments every patch (affine, flips, noise, contrast, gamma) in its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
from bench_prepare import STUDY, Preparing
from nnunet_sides import CONFIGURATION, NUMBER, Job, lay_out, nnunet, ours, plans, variables
from peers import Side, Watched, add_peer_options, environment, may_run_nnunet, take_turns, version, watch
from record import Headline, record

EPOCH = 250  # batches of nnU-Net's
HEADLINES = (
    Headline(
        key="prepare_ratio",
        what="preparing hippocampus_msd from nothing, against nnU-Net v2's fingerprint, plan and preprocessing",
        unit="times as fast",
        at_least=3,
    ),
    Headline(
        key="train_ratio",
        what="training nnU-Net's 3D network of hippocampus_msd, default precision, against its own trainer on the CPU",
        unit="times the voxels per second",
    ),
    Headline(key="train_float32_ratio", what="the same training in float32", unit="times the voxels per second"),
)


def main(envs: Path, rounds: int, batches: int) -> None:
    """Measure, and print two tables."""
    root = Path(os.environ.get("SOFTSEG_TEST_DATA", ""))
    python, cpus = environment(envs, "nnunetv2"), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = lay_out(folder, root)
        print(f"nnU-Net {version(python, 'nnunetv2')}, {cases} volumes, {cpus} processes or threads")
        figures = prepare(folder, root, python, cpus, rounds)
        figures |= train(folder, root, python, cpus, rounds, batches)
    record("peer_nnunet", figures, HEADLINES)


def prepare(folder: Path, root: Path, python: Path, cpus: int, rounds: int) -> dict[str, float]:
    """Both preparations in turn, each time from nothing; the fastest of each."""
    preparing = Preparing(STUDY, root, folder / "stores")
    command = [str(python.parent / "nnUNetv2_plan_and_preprocess"), "-d", NUMBER, "-c", CONFIGURATION]
    processes = ["-np", str(cpus), "-npfp", str(cpus)]

    def theirs() -> psutil.Popen:
        shutil.rmtree(folder / "preprocessed", ignore_errors=True)
        settings = os.environ | variables(folder)
        return psutil.Popen([*command, *processes], env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def own() -> psutil.Popen:
        shutil.rmtree(preparing.stores, ignore_errors=True)
        return preparing.start(cpus)

    runs: dict[str, list[Watched]] = {"nnunet": [], "ours": []}
    for _ in range(rounds):
        runs["nnunet"].append(watch(theirs))
        runs["ours"].append(watch(own))
    print(f"{'preparation':<40}{'s':>8}{'CPU s':>8}{'memory MB':>11}{'ratio':>8}")
    best = {name: min(run.seconds for run in of) for name, of in runs.items()}
    figures = {"prepare_ratio": best["nnunet"] / best["ours"]}
    for name, of in runs.items():
        used, peak = min(run.processor_s for run in of), max(run.peak_mb for run in of)
        print(f"{name:<40}{best[name]:>8.2f}{used:>8.2f}{peak:>11.0f}{best['nnunet'] / best[name]:>8.2f}", flush=True)
        figures |= {f"prepare_{name}_s": best[name], f"prepare_{name}_processor_s": used, f"prepare_{name}_mb": peak}
    return figures


def train(folder: Path, root: Path, python: Path, cpus: int, rounds: int, batches: int) -> dict[str, float]:
    """Voxels per second of nnU-Net's trainer and of ours, in both precisions."""
    job = Job(folder=str(folder), data_root=str(root), batches=batches, threads=cpus)
    in_float32 = job.replace(optim=job.optim.replace(precision="float32"))
    ways = {"nnunet": (nnunet, job), "ours": (ours, job), "ours_float32": (ours, in_float32)}
    sides = {name: Side(work, of.model_dump_json(), python, cpus, variables(folder)) for name, (work, of) in ways.items()}
    take_turns(sides, rounds)
    planned = plans(folder)
    size, batch = planned["patch_size"], planned["batch_size"]
    print(f"patches of {' x '.join(map(str, size))}, batches of {batch}; an epoch of {EPOCH} batches, from {batches}")
    print(f"{'training':<40}{'voxels/s':>12}{'epoch s':>10}{'memory MB':>11}{'ratio':>8}")
    figures: dict[str, float] = {}
    for name, side in sides.items():
        epoch_s = EPOCH * batch * size[0] * size[1] * size[2] / side.per_s
        ratio = side.per_s / sides["nnunet"].per_s
        print(f"{name:<40}{side.per_s:>12.0f}{epoch_s:>10.0f}{side.memory_mb:>11.0f}{ratio:>8.2f}", flush=True)
        figures |= {f"train_{name}_voxels_per_s": side.per_s, f"train_{name}_mb": side.memory_mb}
    own = {"train_ratio": "ours", "train_float32_ratio": "ours_float32"}
    return figures | {key: sides[name].per_s / sides["nnunet"].per_s for key, name in own.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_peer_options(parser)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, default=2)
    options = parser.parse_args()
    if may_run_nnunet(options.peer):
        main(options.envs, options.rounds, options.batches)
