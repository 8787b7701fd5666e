"""The command `softseg submit`: a study on a cluster, from a machine outside it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softseg_dist.cli.options import FitsPerGpu, Json, MaxWait
from softseg_dist.words import arguments, next_command

if TYPE_CHECKING:
    from softseg_dist.sources import Sources
    from softseg_dist.study_file import StudyFile


def submit(
    study: Annotated[Path, typer.Argument(help="A study file, which is sent to the cluster")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://HEAD:8265")],
    data_root: Annotated[str | None, typer.Option(help="Folder of the head with the data set")] = None,
    out: Annotated[str, typer.Option(help="Folder of the head for runs, or a URI")] = "~/runs",
    stores: Annotated[str, typer.Option(help="Folder of the head for prepared data, or a URI")] = "~/stores",
    workers_per_fit: Annotated[int | None, typer.Option(min=1, help="As of run")] = None,
    gpus_per_fit: Annotated[float | None, typer.Option(min=0, help="As of run")] = None,
    fits_per_gpu: FitsPerGpu = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="As of run")] = None,
    max_wait: MaxWait = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server that the head can reach")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="As of run")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit, print how to follow and stop the job, and end")] = False,
    as_json: Json = False,
) -> None:
    """Run a study on a cluster, from a machine outside it. Paths without a scheme are paths of the cluster's head.

    The study file is sent, with the helper modules and given splits beside it. The softseg_dist of the head, of the same version,
    runs it, also after this command has ended.
    """
    from softseg_dist.engine.ray_submit import follow
    from softseg_dist.engine.ray_submit import submit as start_job
    from softseg_dist.study_file import load_study

    sources = with_given_splits(load_study(study))  # reports mistakes here, before the cluster is used
    options: dict[str, object] = {"workers_per_fit": workers_per_fit, "gpus_per_fit": gpus_per_fit, "fits_per_gpu": fits_per_gpu}
    options |= {"max_concurrent": max_concurrent, "max_wait": max_wait, "tracking_uri": tracking_uri}
    flags = arguments(options | {"debug": debug, "json": as_json})
    job = start_job(sources, address, {"--data-root": data_root, "--out": out, "--stores": stores}, flags)
    try:
        code = 0 if no_wait else follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        no_wait, code = True, 130
    if no_wait and as_json:
        typer.echo(json.dumps({"job": job.id, "address": job.address, **job.commands}))
    elif no_wait:
        typer.echo(f"Job {job.id} continues without this command.")
        for what, command in job.commands.items():
            typer.echo(f"  {what} it: {command}")
    elif debug and code == 0 and not as_json:
        typer.echo("\n".join(after_debug()))
    raise typer.Exit(code)


def after_debug() -> list[str]:
    """The last line of a command with --debug: the command without it. A job on a cluster has none: its submitter has its own."""
    from softseg_dist.engine.context import SUBMITTED_BY
    from softseg_dist.places import redacted

    again = next_command(*(word for word in sys.argv[1:] if word != "--debug"))
    return [] if SUBMITTED_BY in os.environ else [f"Next     {redacted(again)}"]


def with_given_splits(file: StudyFile) -> Sources:
    """The texts of a study file, and the files of given splits beside it; one with an absolute path is to be on the head."""
    from softseg_dist.data.splits import GivenSplits

    rules = [rule for rule in (file.study.splits, file.study.nested) if isinstance(rule, GivenSplits)]
    beside = {rule.file: Path(file.path).parent / rule.file for rule in rules if not Path(rule.file).is_absolute()}
    return replace(file.sources, texts={**file.sources.texts, **{name: path.read_text() for name, path in beside.items()}})
