"""The command line for tests: in a process of its own, or in this one, which saves the seconds that its imports take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from softseg_dist.cli.main import main

Ended = subprocess.CompletedProcess[str]


def softseg(*args: object, cwd: Path, **kwargs: object) -> Ended:
    """`softseg ARGS` as a shell starts it."""
    command = [sys.executable, "-P", "-m", "softseg_dist.cli.main", *map(str, args)]  # `cwd` is not on its path
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)  # type: ignore[call-overload, no-any-return]


def softseg_here(*args: object, cwd: Path, env: dict[str, str] | None = None) -> Ended:
    """`softseg ARGS` in this process: for commands that start no Ray. `env` replaces the environment meanwhile."""
    words, out, err, code = ["softseg", *map(str, args)], StringIO(), StringIO(), 0
    environment = patch.dict(os.environ, env or {}, clear=env is not None)
    with chdir(cwd), environment, patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def catches(process: int, kind: signal.Signals) -> bool:
    """Has a process a handler for a signal? The first instant of a command belongs to Python."""
    caught = Path(f"/proc/{process}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (kind - 1) & 1)
