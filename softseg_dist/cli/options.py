"""Arguments and options that several commands share, and how errors are printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text


def as_shown(place: str) -> str:
    """The callback of an option for a path or URI: its credentials go no further."""
    from softseg_dist.places import without_credentials  # imports pyarrow

    return without_credentials(place) if "://" in place else place


StudyArg = Annotated[Path, typer.Argument(help="A study file, e.g. studies/s001_quickstart.py")]
RunArg = Annotated[str, typer.Argument(callback=as_shown, help="A run folder or its URI, e.g. s3://lab/runs/s001")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that holds the study's data set")]
Out = Annotated[str, typer.Option(help="Folder for runs, or its URI; the run folder is OUT/<study name>")]
Stores = Annotated[str, typer.Option(help="Folder for prepared data, or its URI, e.g. s3://lab/stores")]
Debug = Annotated[bool, typer.Option("--debug", help="Run 2 splits, 2 epochs and few subjects as a test, in this process")]
Local = Annotated[bool, typer.Option("--local", help="Run one fit at a time in this process, without Ray; breakpoints work")]
MaxWait = Annotated[float | None, typer.Option(min=0, help="Seconds to wait for a machine; default: 600 where a cluster grows")]
FitsPerGpu = Annotated[int | None, typer.Option(min=1, help="Fits that share a GPU in one process")]
Trust = Annotated[bool, typer.Option("--trust", help="Execute the study's code, although you have not run it on this machine")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines")]
Address = Annotated[str | None, typer.Option(help="A running Ray: auto (of this machine) or HOST:PORT; default: start one here")]


class Patient:
    """A stream that goes mute when it cannot be written any more (`| head`, a lost terminal), so that what runs goes on."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of a file."""
        return self._tried(self._stream.write, text) or 0

    def flush(self) -> None:
        """As of a file."""
        self._tried(self._stream.flush)

    def _tried(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError:  # what is left in its buffer, and what child processes write, goes nowhere, too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def open_streams() -> None:
    """Standard streams that were closed at the start (`>&-`, some daemons) lead nowhere: no file of the run gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115 - until this process ends
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def say(level: Literal["error", "warning"], message: str) -> None:
    """One line on standard error."""
    line = Text(f"{level}: ", style={"error": "bold red", "warning": "bold yellow"}[level])
    Console(stderr=True, soft_wrap=True, highlight=False).print(line.append(message, style="not bold default"))
