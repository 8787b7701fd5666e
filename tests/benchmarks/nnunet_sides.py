"""nnU-Net's dataset folder, and the two sides of `bench_peer_nnunet.py` that train; both run in nnU-Net's environment.

Both train the network that nnU-Net has planned, on its own patch size and batch; a turn is some batches.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import Turns
from torch import nn

from softseg_dist import BCE, Affine, Bids, Contrast, Dice, Flip, Gamma, Network, Noise, Optim, Preprocess, Recipe, Softmax, Sum
from softseg_dist.data.splits import Split
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.frozen import Frozen
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitTask, Worker

DATASET, NUMBER, CONFIGURATION = "Dataset004_Hippocampus", "4", "3d_fullres"
DATA = Bids(
    "hippocampus_msd", image="T1w", labels={"anterior": "label-hippocampus_dseg:1", "posterior": "label-hippocampus_dseg:2"}
)


class Job(Frozen):
    """What a turn does: so many batches, of which `ours` trains with `optim`."""

    folder: str
    data_root: str
    batches: int
    threads: int
    optim: Optim = Optim(epochs=200, patience=None)


class PlannedNetwork(Network):
    """The network of nnU-Net's plans, given as JSON; without the lower-resolution outputs of deep supervision."""

    short = "planned"
    architecture: str

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        """A new one."""
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        of = json.loads(self.architecture)
        named = of["network_class_name"], of["arch_kwargs"], of["_kw_requires_import"]
        network = get_network_from_plans(*named, in_channels, out_channels, deep_supervision=False)
        return _named_once(network)


def _named_once(network: nn.Module) -> nn.Module:
    """The network without the second names that nnU-Net gives its layers, which computing does not use and files cannot hold."""
    del network.get_submodule("decoder").encoder
    for block in [module for module in network.modules() if hasattr(module, "all_modules")]:
        for name in [name for name, _ in block.named_children() if name != "all_modules"]:
            delattr(block, name)
    return network


def variables(folder: Path) -> dict[str, str]:
    """Where nnU-Net reads and writes."""
    return {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}


def plans(folder: Path) -> dict[str, Any]:
    """What nnU-Net has planned for the configuration that is trained."""
    path = folder / "preprocessed" / DATASET / "nnUNetPlans.json"
    planned: dict[str, Any] = json.loads(path.read_text())["configurations"][CONFIGURATION]
    return planned


def lay_out(folder: Path, data_root: Path) -> int:
    """hippocampus_msd as nnU-Net wants it, by links; returns how many cases there are."""
    images, labels = (folder / "raw" / DATASET / name for name in ("imagesTr", "labelsTr"))
    for new in (images, labels):
        new.mkdir(parents=True)
    source = data_root / "hippocampus_msd"
    scans = sorted(source.glob("sub-*/anat/*_T1w.nii.gz"))
    for scan in scans:
        subject, stem = scan.parts[-3], scan.name.removesuffix(".nii.gz")
        mask = source / "derivatives" / "labels" / subject / "anat" / f"{stem}_label-hippocampus_dseg.nii.gz"
        (images / f"{subject}_0000.nii.gz").symlink_to(scan)
        (labels / f"{subject}.nii.gz").symlink_to(mask)
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(scans),
        "file_ending": ".nii.gz",
    }
    (images.parent / "dataset.json").write_text(json.dumps(about))
    return len(scans)


def nnunet(job_json: str, turns: Turns) -> None:
    """Its trainer's own steps on the CPU, in float32, on batches from its own augmentation processes."""
    from nnunetv2.run.run_training import get_trainer_from_args

    job = Job.model_validate_json(job_json)
    torch.set_num_threads(job.threads)
    trainer = get_trainer_from_args(NUMBER, CONFIGURATION, 0, device=torch.device("cpu"))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    voxels = trainer.batch_size * torch.Size(trainer.configuration_manager.patch_size).numel()
    while True:
        turns.wait()
        for _ in range(job.batches):
            trainer.train_step(next(trainer.dataloader_train))
        turns.report(voxels * job.batches)


def ours(job_json: str, turns: Turns) -> None:
    """`fit` on as many cases as the batches need, whole, cropped to nnU-Net's patch size."""
    job = Job.model_validate_json(job_json)
    planned = plans(Path(job.folder))
    size, batch_size = tuple(planned["patch_size"]), planned["batch_size"]
    preprocess = Preprocess(dim=3, spacing_mm=tuple(planned["spacing"]), crop=size)
    cases = DATA.cases(Path(job.data_root))[: batch_size * job.batches]
    recipe = Recipe(
        network=PlannedNetwork(architecture=json.dumps(planned["architecture"])),
        activation=Softmax(),
        loss=Sum(terms=(Dice(), BCE()), weights=(1, 1)),
        augment=(Affine(degrees=30, scale=0.3, shift=0), Flip(axes=(0, 1, 2)), Noise(), Contrast(), Gamma()),
        optim=job.optim.replace(batch_size=batch_size),
    )

    def report(_: dict[str, float]) -> None:
        turns.report(len(cases) * torch.Size(size).numel())
        turns.wait()

    with tempfile.TemporaryDirectory() as folder:
        store = build_store(Path(folder), cases, DATA, preprocess)
        task = FitTask(
            study="peer", seed=0, candidate="ours", recipe=recipe, objective="dice_dml", store=str(store),
            split=Split(index=0, train=tuple(case.subject for case in cases)), threads=job.threads,
            store_fingerprint=fingerprint(cases, DATA, preprocess), folder=f"{folder}/fit",
        )  # fmt: skip
        turns.wait()
        fit(task, Worker(report=report))
