"""A cluster of two nodes: folders that both can use pass, one that is another on each node is refused with the node's name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import BUCKET

from softseg_dist.engine.ray_cluster import check_reach, probe
from softseg_dist.places import Place

pytestmark = pytest.mark.engine


def refused(tmp_path: Path, folders: dict[str, str]) -> str:
    """What two nodes, in the working directories `here` and `there`, make of folders."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir(exist_ok=True)
    program = Path(__file__).parent / "two_nodes.py"
    command = [sys.executable, str(program), str(tmp_path / "here"), str(tmp_path / "there"), json.dumps(folders)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    said: str = json.loads(ended.stdout.splitlines()[-1])
    return said


def test_a_shared_disk_and_s3_can_be_used_by_all_nodes(s3: dict[str, str], tmp_path: Path) -> None:
    folders = {"--out": str(tmp_path / "runs/tiny"), "--stores": f"s3://{BUCKET}/reach"}
    assert refused(tmp_path, folders) == ""
    assert list((tmp_path / "runs/tiny").iterdir()) == []
    assert Place.at(f"s3://{BUCKET}/reach").names() == []


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux's /proc")
def test_a_folder_of_one_node_is_refused_with_what_to_do(tmp_path: Path) -> None:
    said = refused(tmp_path, {"--stores": str(tmp_path / "stores"), "--out": "/proc/self/cwd/runs"})
    assert said.startswith("--out /proc/self/cwd/runs: 1 of 2 nodes of the cluster cannot use it: ")
    assert "does not see it" in said
    assert "a disk that all nodes share, or a URI such as s3://bucket/folder" in said
    assert "\n" not in said
    assert list((tmp_path / "here/runs").iterdir()) == []
    assert not (tmp_path / "there/runs").exists()


def test_one_node_is_not_asked(shared_ray: None, tmp_path: Path) -> None:
    check_reach({"--out": tmp_path / "runs"})
    assert not (tmp_path / "runs").exists()


def test_a_probe_says_what_keeps_it_from_using_a_folder(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"")
    assert probe(str(tmp_path), "token", "trace") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    assert probe(str(tmp_path / "elsewhere"), "token", "trace") == "does not see it"
    assert probe(str(tmp_path), "token", "token/trace").startswith("cannot use it: ")  # as if it might not be written
    assert probe("wherever://x", "token", "trace").startswith("cannot use it: wherever://x")
