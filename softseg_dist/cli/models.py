"""Commands about models and fits: train a model on all subjects, predict with one, run fits anew and compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from softseg_dist.cli.options import Address, Json, Local, MaxWait, RunArg, Trust, say
from softseg_dist.errors import UserError


def refit(
    run: RunArg,
    candidate: Annotated[str | None, typer.Option(help="Candidate to train; default: the winner")] = None,
    gpus_per_fit: Annotated[float | None, typer.Option(min=0, help="GPUs of each worker")] = None,
    address: Address = None,
    max_wait: MaxWait = None,
    local: Local = False,
    trust: Trust = False,
) -> None:
    """Train a final model: a candidate of a run on all subjects that are not held out."""
    from softseg_dist.engine.progress import PlainLines
    from softseg_dist.pipeline import RunOptions, refit_run

    options = RunOptions(gpus_per_fit=gpus_per_fit, address=address, max_wait_s=max_wait, local=local)
    typer.echo(str(refit_run(run, candidate, options, PlainLines(sys.stdout), trust)))


def verify(
    run: RunArg,
    fits: Annotated[str, typer.Option(metavar="N|all", help="How many finished fits to run anew")] = "3",
    seed: Annotated[int, typer.Option(help="Another one draws other fits")] = 0,
    gpus_per_fit: Annotated[float | None, typer.Option(min=0, help="GPUs of each worker")] = None,
    address: Address = None,
    max_wait: MaxWait = None,
    local: Local = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run some fits of a run anew, with one worker and apart from the run, and compare every row with the recorded one."""
    from softseg_dist.engine.progress import PlainLines
    from softseg_dist.pipeline import RunOptions
    from softseg_dist.verification import verify_run

    if fits != "all" and not (fits.isdecimal() and int(fits)):
        raise UserError(f"--fits takes a number from 1 on, or all, got {fits!r}")
    options = RunOptions(gpus_per_fit=gpus_per_fit, address=address, max_wait_s=max_wait, local=local)
    progress = PlainLines(sys.stderr if as_json else sys.stdout)
    checks = verify_run(run, None if fits == "all" else int(fits), options, progress, seed, trust)
    if as_json:
        typer.echo(json.dumps([vars(check) for check in checks]))
    raise typer.Exit(1 if any(check.verdict == "differs" for check in checks) else 0)


def predict(
    model: Annotated[Path, typer.Argument(help="A model folder, e.g. runs/s001_quickstart/model, or its run")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="NIfTI (PNG, TIFF); channels of one image as A.nii,B.nii")],
    out: Annotated[Path, typer.Option(help="Folder for the maps")],
    center_mask: Annotated[list[Path] | None, typer.Option(help="Mask to centre the crop on, if needed: once per image")] = None,
    spacing_mm: Annotated[str | None, typer.Option(metavar="X,Y[,Z]", help="Voxel size of PNG and TIFF, whatever they say")] = None,
    binary: Annotated[str | None, typer.Option(metavar="RULE|NUMBER", help="Also write masks, by a rule or at a number")] = None,
    candidate: Annotated[str | None, typer.Option(help="Candidate of a run whose model is used; default: the winner")] = None,
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Predict the mean over all fits of the candidate")] = False,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also write the entropy (bits) over several maps")] = False,
    samples: Annotated[int | None, typer.Option(min=2, help="Number of predictions of one model for --uncertainty")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU if there is one")] = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Predict the soft maps of new images with a study's model, on the grids of the images."""
    from softseg_dist.prediction import predict_images

    predictions = []
    for done in predict_images(
        model,
        [[Path(channel) for channel in image.split(",")] for image in images],
        out,
        center_masks=center_mask or (),
        spacing_mm=tuple(spacing_mm.split(",")) if spacing_mm else (),
        binary=binary,
        candidate=candidate,
        ensemble=ensemble,
        uncertainty=uncertainty,
        samples=samples,
        device=device,
        trust=trust,
    ):
        predictions.append(done)
        if done.error:
            say("error", done.error)
        elif done.covered < 1:
            say("warning", f"{done.image}: the model's crop covers {done.covered:.1%} of it; the maps are 0 outside")
        if done.unlike:
            say("warning", f"{done.image}: {done.unlike}; look at the maps before you use them")
        if not as_json:
            for path in (*done.maps.values(), *done.masks.values(), *done.entropies.values()):
                typer.echo(str(path))
    if as_json:
        typer.echo(json.dumps([vars(done) for done in predictions], default=str))
    raise typer.Exit(2 if any(done.error for done in predictions) else 0)
