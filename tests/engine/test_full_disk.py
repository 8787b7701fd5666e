"""A disk that fills up under a study: one clear line, a valid ledger, and the same command goes on when there is room.

The disk is a small tmpfs in a mount namespace of its own, which needs no privileges where the kernel allows it to users.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import STUDY, table, write

pytestmark = pytest.mark.engine
SIZES = ("700k", "1200k", "1600k")  # full at the first fit, in the middle, and in the report
FULL = "No space left on device; what has finished is kept, the same command goes on"
SCRIPT = f"""
set -u
mount -t tmpfs -o size={SIZES[0]} none "$1"
for size in {" ".join(SIZES)} 64m; do
    mount -o remount,size=$size "$1"
    "$2" -m softseg_dist.cli.main run tiny.py --out "$1" --json > $size.out 2> $size.err
    echo $? > $size.rc
    "$2" -m softseg_dist.cli.main status "$1/tiny" --json > $size.status 2>&1
    cp -r "$1/tiny/fits" $size.fits
done
cp -r "$1" end
"""


def namespaces_allowed() -> bool:
    """Whether this user may mount a tmpfs in a namespace of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not namespaces_allowed(), reason="this kernel does not let users mount a tmpfs in their own namespace")
def test_a_full_disk_stops_the_study_with_one_line_and_more_room_lets_it_go_on(tmp_path: Path) -> None:
    write(tmp_path, STUDY, epochs=4)
    (tmp_path / "disk").mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SCRIPT, "bash", str(tmp_path / "disk")]
    subprocess.run([*command, sys.executable], cwd=tmp_path, env=os.environ, timeout=550, check=True)
    ended: set[str] = set()
    for size in SIZES:
        said = (tmp_path / f"{size}.err").read_text()
        assert ((tmp_path / f"{size}.rc").read_text().strip(), said.count("\n")) == ("2", 1), said
        assert FULL in said
        for path in (tmp_path / f"{size}.fits").glob("*/*.json"):
            json.loads(path.read_text())  # the ledger is valid: every file of it is whole
        assert not list((tmp_path / f"{size}.fits").rglob(".*")), "nothing half written is left"
        now = {f"{path.parent.name}/{path.name}" for path in (tmp_path / f"{size}.fits").glob("*/[0-9]*.json")}
        assert ended <= now, "what has finished is kept"
        ended = now
    assert len(ended) > 0
    assert (tmp_path / "64m.rc").read_text().strip() == "0", (tmp_path / "64m.err").read_text()
    assert json.loads((tmp_path / "64m.status").read_text())["finished"] == 8
    assert len(table(tmp_path / "end/tiny")["candidate"].unique()) == 4
    assert (tmp_path / "end/tiny/report/index.html").is_file()
