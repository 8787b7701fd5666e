"""What the scripts of cluster/ do, run against stand-ins for what only a cluster has: SLURM, a cloud's metadata service, `ray`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node, start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

CLUSTER = Path(__file__).parents[3] / "cluster"
WATCHER = CLUSTER / "spot/drain_on_notice.py"
# A program that writes its words to a file, one line of JSON per call.
RECORDER = """#!{python} -S
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder for programs that stand in for those of a cluster; it comes first on PATH."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(bench: Path, name: str, then: str = "") -> None:
    path = bench / "bin" / name
    path.write_text(RECORDER.format(python=sys.executable) + then)
    path.chmod(0o755)


def environment(bench: Path, **more: str) -> dict[str, str]:
    path = f"{bench / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CALLS": str(bench / "calls"), "HOME": str(bench)} | more


def calls(bench: Path, name: str) -> list[list[str]]:
    text = (bench / "calls").read_text() if (bench / "calls").exists() else ""
    return [words[1:] for words in map(json.loads, text.splitlines()) if words[0] == name]


# ---- slurm/study.sbatch

SRUN = """
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1:]
if "symmetric-run" in words:
    at = words.index("ray")
    words = words[:at] + words[words.index("--") + 1:]  # the head's part of `ray symmetric-run`
os.execvp(words[0], words)
"""
APPTAINER = """
assert os.environ["PYTHONNOUSERSITE"] == "1"
os.execvp(sys.argv[6], sys.argv[6:])  # after: exec --nv --bind FOLDERS IMAGE
"""
ADDRESSES = """
named = os.path.basename(sys.argv[0]) == "getent"
shown = os.environ.get("NODES", "127.0.1.1 10.1.0.5") if named else os.environ.get("OWN", "")
for address in shown.split():
    print(f"{address}       STREAM {sys.argv[-1]}" if named else address)
sys.exit(0 if shown else 2)
"""
SOFTSEG = """
import signal
def stop(number, frame):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(["stopped"]) + "\\n")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("training", flush=True)
if os.environ["LASTS"] == "long":
    signal.pause()
sys.exit(int(os.environ["LASTS"]))
"""


@pytest.fixture
def slurm(bench: Path) -> Path:
    stand_in(bench, "srun", SRUN)
    stand_in(bench, "scontrol", 'print("node1\\nnode2") if sys.argv[1] == "show" else None\n')
    stand_in(bench, "softseg", SOFTSEG)
    stand_in(bench, "apptainer", APPTAINER)
    for name in ("getent", "hostname"):
        stand_in(bench, name, ADDRESSES)
    return bench


def submit(bench: Path, lasts: str, **more: str) -> subprocess.Popen[str]:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    place = {"SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "1", "LASTS": lasts}
    command = ["bash", str(CLUSTER / "slurm/study.sbatch"), "study.py", str(bench / "shared"), "--gpus-per-fit", "1"]
    return subprocess.Popen(
        command, env=environment(bench, **job, **place, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["out of time", "preempted"])
def test_a_job_told_to_stop_lets_fits_write_checkpoints_and_queues_again(slurm: Path, number: int) -> None:
    with submit(slurm, "long") as job:
        assert job.stdout is not None
        assert "training" in job.stdout.readline()
        job.send_signal(number)
        assert job.wait(timeout=60) == 130
    assert calls(slurm, "stopped") == [[]]
    assert calls(slurm, "scontrol")[-1] == ["requeue", "4711"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_that_ends_by_itself_ends_as_the_study_did_and_is_not_queued_again(slurm: Path, code: int) -> None:
    with submit(slurm, str(code)) as job:
        assert job.wait(timeout=60) == code
    assert [words[0] for words in calls(slurm, "scontrol")] == ["show"]


def test_a_job_starts_the_study_on_the_shared_disk_with_a_token(slurm: Path) -> None:
    with submit(slurm, "0") as job:
        job.wait(timeout=60)
    shared = slurm / "shared"
    flags = ["--address", "auto", "--out", f"{shared}/runs", "--stores", f"{shared}/stores", "--gpus-per-fit", "1"]
    assert calls(slurm, "softseg") == [["run", "study.py", *flags]]
    token = shared / ".slurm-4711/auth_token"
    assert len(token.read_text()) >= 32
    assert token.stat().st_mode & 0o077 == 0


def test_ray_takes_the_words_of_the_job(slurm: Path) -> None:
    with submit(slurm, "0") as job:
        job.wait(timeout=60)
    [words] = [words for words in calls(slurm, "srun") if "symmetric-run" in words]
    before = words[words.index("symmetric-run") + 1 : words.index("--")]
    assert before[:4] == ["--address", "10.1.0.5:24711", "--min-nodes", "2"]  # as the other node knows the head
    [asked] = [words for words in calls(slurm, "srun") if "getent" in words]
    assert asked == ["--nodes=1", "--ntasks=1", "--nodelist=node2", "getent", "ahostsv4", "node1"]
    parameters = start.make_context("start", curate_and_validate_ray_start_args(before)).params
    assert (parameters["num_cpus"], parameters["num_gpus"]) == (8, 1)


def test_a_job_of_one_node_that_is_127_0_1_1_to_itself_takes_an_address_of_its_network(slurm: Path) -> None:
    with submit(slurm, "0", NODES="127.0.1.1", OWN="fd00::2 10.1.0.8 172.17.0.1") as job:
        assert job.wait(timeout=60) == 0
    [words] = [words for words in calls(slurm, "srun") if "symmetric-run" in words]
    assert words[words.index("--address") + 1] == "10.1.0.8:24711"


def test_a_job_whose_head_is_reached_by_nobody_ends_with_its_name(slurm: Path) -> None:
    with submit(slurm, "0", NODES="127.0.1.1", OWN="127.0.0.1") as job:
        said = job.communicate(timeout=60)[0]
    assert job.returncode == 2
    assert "error: node1 has no IPv4 address" in said
    assert calls(slurm, "softseg") == []


def test_a_job_in_an_image_sees_study_run_and_temporary_folder_and_is_told_to_stop(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(slurm)
    with submit(slurm, "long", SOFTSEG_IMAGE="softseg.sif") as job:
        assert job.stdout is not None
        assert "training" in job.stdout.readline()
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 130
    assert calls(slurm, "stopped") == [[]]
    [outside] = [words for words in calls(slurm, "srun") if "symmetric-run" in words]
    folders = f"{slurm},{slurm / 'shared'},/tmp/softseg-4711"
    assert outside[1:8] == ["apptainer", "exec", "--nv", "--bind", folders, "softseg.sif", "ray"]
    [words] = calls(slurm, "softseg")
    assert words[:2] == ["run", str(slurm / "study.py")]


# ---- onprem/start-node.sh


@pytest.mark.parametrize(("role", "head"), [("head", True), ("worker", False)])
def test_a_node_of_your_own_starts_with_the_token(bench: Path, role: str, head: bool) -> None:
    stand_in(bench, "ray", 'assert os.environ["RAY_AUTH_MODE"] == "token" and open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()\n')
    (bench / ".ray").mkdir()
    (bench / ".ray/auth_token").write_text("t" * 32)
    command = ["bash", str(CLUSTER / "onprem/start-node.sh"), role, "10.0.0.5"]
    subprocess.run(command, env=environment(bench, RAY_AUTH_TOKEN_PATH=""), check=True)
    [[verb, *words]] = calls(bench, "ray")
    parameters = start.make_context(verb, words).params
    assert parameters["head"] is head
    if head:
        assert (parameters["dashboard_host"], parameters["num_cpus"], parameters["port"]) == ("127.0.0.1", 0, 6379)
    else:
        assert parameters["address"] == "10.0.0.5:6379"


@pytest.mark.parametrize(("role", "known"), [("head", "127.0.1.1"), ("worker", "::1"), ("worker", "")])
def test_a_node_is_not_started_at_an_address_that_others_do_not_reach(bench: Path, role: str, known: str) -> None:
    stand_in(bench, "ray")
    stand_in(bench, "getent", ADDRESSES)
    (bench / "token").write_text("t" * 32)
    command = ["bash", str(CLUSTER / "onprem/start-node.sh"), role, "node1"]
    env = environment(bench, RAY_AUTH_TOKEN_PATH=str(bench / "token"), NODES=known)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"node1 is {known or 'unknown'} here" in done.stderr
    assert "`hostname -I`" in done.stderr
    assert calls(bench, "ray") == []


def test_a_node_without_a_token_is_not_started(bench: Path) -> None:
    stand_in(bench, "ray")
    command = ["bash", str(CLUSTER / "onprem/start-node.sh"), "head", "10.0.0.5"]
    done = subprocess.run(command, env=environment(bench, RAY_AUTH_TOKEN_PATH=""), capture_output=True, text=True)
    assert done.returncode == 2
    assert "ray get-auth-token --generate" in done.stderr
    assert calls(bench, "ray") == []


# ---- aws/prepare.sh, gcp/prepare.sh

# Answers of the clouds' command lines: nothing there yet, or everything there, as STATE says.
AWS = """
words, new = sys.argv[1:], os.environ["STATE"] == "new"
if words[1] in ("get-role", "head-bucket") and new:
    sys.exit(254)
asked = next((word for word in words if "Account" in word or "VpcId" in word or "GroupId" in word or "Cidr" in word), "")
answers = {"Account": "123456789012", "Vpcs[0].VpcId": "vpc-1", "SecurityGroups[0].GroupId": "None" if new else "sg-1"}
answers |= {"GroupId": "sg-1"}
print("198.51.100.9/32" if "Cidr" in asked and not new else answers.get(asked, "ami-1" if words[0] == "ssm" else ""))
"""
GCLOUD = """
words, new = sys.argv[1:], os.environ["STATE"] == "new"
if "describe" in words and new:
    sys.exit(1)
if "images" in words:
    print("projects/deeplearning-platform-release/global/images/common-cu129-ubuntu-2204-nvidia-580-v20260818")
"""
OURS = "203.0.113.7/32"


@pytest.mark.engine
@pytest.mark.parametrize("state", ["new", "known"])
@pytest.mark.parametrize(("cloud", "words"), [("aws", ["us-east-1"]), ("gcp", ["project", "us-central1-a"])])
def test_prepare_writes_a_launcher_file_for_ray_and_opens_ssh_to_one_address(
    bench: Path, cloud: str, words: list[str], state: str
) -> None:
    program = {"aws": "aws", "gcp": "gcloud"}[cloud]
    stand_in(bench, program, {"aws": AWS, "gcp": GCLOUD}[cloud])
    command = ["bash", str(CLUSTER / cloud / "prepare.sh"), *words, "bucket", "registry.example", OURS]
    done = subprocess.run(command, env=environment(bench, STATE=state), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FILL_IN_" not in done.stdout
    config = yaml.safe_load(done.stdout)
    validate_config(prepare_config(config))
    assert config["docker"]["image"].startswith("registry.example/softseg:")
    opened = [call for call in calls(bench, program) if OURS in call]
    assert len(opened) == 1
    assert ("22" in opened[0]) or ("tcp:22" in opened[0]) or ("update" in opened[0])
    assert not [word for call in calls(bench, program) for word in call if "FILL_IN" in word or word == "0.0.0.0/0"]
    if cloud == "aws" and state == "known":  # the address of last time may no longer come in
        assert [call for call in calls(bench, program) if "198.51.100.9/32" in call and "revoke" in call[1]]
    token = bench / ".softseg" / cloud / "auth_token"
    assert len(token.read_text()) >= 32
    assert token.stat().st_mode & 0o077 == 0


# The oldest Linux driver for a version of CUDA, from table 3 of "CUDA Toolkit 13.0 Release Notes"
# (docs.nvidia.com/cuda/archive/13.0.0/cuda-toolkit-release-notes), and the CUDA of the PyTorch that we pin: torch 2.13.0 from PyPI
# requires cuda-toolkit==13.0.3 (its METADATA).
OLDEST_DRIVER = {"13.0": "580.65.06"}
CUDA_OF_TORCH = {"2.13.0": "13.0"}


def driver_check(cloud: str) -> str:
    config = yaml.safe_load((CLUSTER / cloud / "cluster.yaml").read_text())
    [gpu] = [node for node in config["available_node_types"].values() if "GPU" in node["resources"]]
    login, check = gpu["initialization_commands"]
    assert config["initialization_commands"] == [login]
    return str(check)


def test_a_machine_with_a_gpu_needs_the_driver_of_the_pinned_torch(bench: Path) -> None:
    lock = dict(line.split("==") for line in (CLUSTER.parent / "requirements.lock").read_text().split())
    oldest = OLDEST_DRIVER[CUDA_OF_TORCH[lock["torch"]]]
    command = driver_check("aws")
    assert command == driver_check("gcp").replace("gcp/prepare.sh", "aws/prepare.sh")
    assert set(re.findall(r"\d{3}\.\d+\.\d+", command)) == {oldest}
    stand_in(bench, "nvidia-smi", 'print(os.environ["DRIVER"]) if "DRIVER" in os.environ else sys.exit(9)\n')
    stand_in(bench, "timeout", "sys.exit(124)\n")
    for driver, code in [(oldest, 0), ("595.91.07", 0), ("580.9.01", 1), ("", 1)]:
        more = {"DRIVER": driver} if driver else {}
        done = subprocess.run(["bash", "-c", command], env=environment(bench, **more), capture_output=True, text=True)
        assert done.returncode == code, driver
        assert (f"got {driver or 'none'};" in done.stderr) == bool(code)


def test_the_images_on_google_have_a_driver_of_the_branch_that_the_pinned_torch_needs() -> None:
    text = (CLUSTER / "gcp/prepare.sh").read_text()
    [wanted] = re.findall(r"--filter 'family ~ \"(\S+)\"'", text)
    families = {f"common-cu129-ubuntu-2204-nvidia-{branch}" for branch in (535, 550, 570, 575, 580, 595, 610)}
    branch = min(OLDEST_DRIVER.values()).split(".")[0]
    assert {family for family in families if re.search(wanted, family)} == {f for f in families if f[-3:] >= branch}
    config = yaml.safe_load((CLUSTER / "gcp/cluster.yaml").read_text())
    node = config["available_node_types"]["gpu_spot"]["node_config"]
    assert node["metadata"]["items"] == [{"key": "install-nvidia-driver", "value": "True"}]


@pytest.mark.parametrize(("cloud", "words"), [("aws", ["us-east-1"]), ("gcp", ["project", "us-central1-a"])])
@pytest.mark.parametrize("address", ["0.0.0.0/0", "203.0.113.7"])
def test_prepare_opens_ssh_to_no_more_than_a_network(bench: Path, cloud: str, words: list[str], address: str) -> None:
    for program in ("aws", "gcloud"):
        stand_in(bench, program)
    command = ["bash", str(CLUSTER / cloud / "prepare.sh"), *words, "bucket", "registry", address]
    done = subprocess.run(command, env=environment(bench), capture_output=True, text=True)
    assert done.returncode == 2
    assert address in done.stderr
    assert not (bench / "calls").exists()


def test_mlflow_does_not_start_without_a_password(bench: Path) -> None:
    stand_in(bench, "mlflow")
    settings = {"MLFLOW_DATABASE": "postgresql://database/mlflow", "MLFLOW_ARTIFACTS": "s3://bucket/mlflow"}
    settings |= {"MLFLOW_ALLOWED_HOSTS": "localhost:5000", "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32}
    command = ["sh", str(CLUSTER / "mlflow/start.sh")]
    done = subprocess.run(command, env=environment(bench, **settings), capture_output=True, text=True)
    assert done.returncode != 0
    assert "MLFLOW_AUTH_ADMIN_PASSWORD" in done.stderr
    assert calls(bench, "mlflow") == []
    env = environment(bench, **settings, MLFLOW_AUTH_ADMIN_PASSWORD="p" * 16, TMPDIR=str(bench))
    subprocess.run(command, env=env, check=True)
    [words] = calls(bench, "mlflow")
    assert words[: words.index("--host")] == ["server", "--app-name", "basic-auth"]
    assert (bench / "basic_auth.ini").stat().st_mode & 0o077 == 0


# ---- spot/drain_on_notice.py


class Metadata(BaseHTTPRequestHandler):
    """The metadata services of both clouds; the second question about a preemption is answered by a notice."""

    notice: str
    asked: int

    def do_PUT(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer("a-token")

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer("TRUE" if self.asked > 1 else "FALSE")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.asked > 1:
            self._answer(self.notice if self.headers["X-aws-ec2-metadata-token"] == "a-token" else "")
        else:
            self.send_error(404)

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@contextmanager
def metadata_service() -> Iterator[str]:
    when = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
    handler = type("Handler", (Metadata,), {"notice": json.dumps({"action": "terminate", "time": when}), "asked": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def raylet(node: str, address: str) -> Iterator[None]:
    """A process that looks like a raylet to who reads its command line; it waits for the end of its input."""
    words = ["/ray/raylet", "-c", "read -r", "-", f"--node_id={node}", f"--gcs-address={address}"]
    with subprocess.Popen(words, executable="/bin/bash", stdin=subprocess.PIPE):
        yield


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", range(100, 121)), ("gcp", range(30, 31))])
def test_a_notice_drains_the_node_once_with_the_time_that_is_left(bench: Path, cloud: str, seconds: range) -> None:
    stand_in(bench, "ray")
    node, address = "ab" * 28, "10.9.8.7:6379"
    watcher = [sys.executable, str(WATCHER), "--cloud", cloud, "--every", "0.01", "--address", address]
    with metadata_service() as url, raylet(node, address):
        done = subprocess.run([*watcher, "--metadata", url], env=environment(bench), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    [[verb, *words]] = calls(bench, "ray")
    parameters = drain_node.make_context(verb, words).params  # Ray's own parser
    assert parameters["node_id"] == node
    assert parameters["address"] == address
    assert parameters["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert parameters["deadline_remaining_seconds"] in seconds
