"""Drain this machine's Ray node when the cloud announces that it takes the machine back.

    python drain_on_notice.py --cloud aws      beside Ray on a spot machine: asks every 5 s, drains once, ends
    python drain_on_notice.py --cloud gcp
    python drain_on_notice.py --now 100        drain now, then wait up to 100 s for what runs (a pod's preStop hook)

A drained node gets no new fits, and its loss counts as a preemption, not as a failure of the fit. Needs Python and the
command `ray` only; with token authentication it finds the token as every Ray process does (RAY_AUTH_TOKEN_PATH).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
GCP_SECONDS = 30  # what Compute Engine leaves a preempted machine; AWS says when, two minutes ahead
TIMEOUT_S = 3.0
PROC = Path("/proc")
# Processes of Ray that never end by themselves: waiting for them would be waiting for the deadline.
ALWAYS_THERE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def aws_notice(base: str) -> float | None:
    """Seconds until EC2 stops this machine; None if nothing is announced. Asks in the way of IMDSv2: a token first."""
    token = _ask(f"{base}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    answer = _ask(f"{base}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token or ""})
    if answer is None:
        return None
    when = datetime.fromisoformat(json.loads(answer)["time"])
    return (when - datetime.now(UTC)).total_seconds()


def gcp_notice(base: str) -> float | None:
    """Seconds until Compute Engine stops this machine; None if nothing is announced."""
    answer = _ask(f"{base}/computeMetadata/v1/instance/preempted", "GET", {"Metadata-Flavor": "Google"})
    return GCP_SECONDS if answer == "TRUE" else None


NOTICES = {"aws": aws_notice, "gcp": gcp_notice}


def raylets(address: str | None = None) -> list[tuple[str, str]]:
    """Node id and GCS address of every Ray node of this machine (of the cluster at `address`), as their raylets were started."""
    found = []
    for words in _commands():
        if Path(words[0]).name != "raylet":
            continue
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        found.append((flags["node_id"], flags["gcs-address"]))
    return [node for node in found if address in (None, node[1])]


def drain(seconds: float, message: str, address: str | None = None) -> bool:
    """Tell every Ray node of this machine that it ends in `seconds`; False if there is none, or one did not take it."""
    nodes = raylets(address)
    accepted = [_drain(node, gcs, seconds, message) for node, gcs in nodes]
    return bool(nodes) and all(accepted)


def _drain(node: str, address: str, seconds: float, message: str) -> bool:
    command = ["ray", "drain-node", "--address", address, "--node-id", node, "--reason-message", message]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(max(0, int(seconds)))]
    done = subprocess.run(command, capture_output=True, text=True)
    outcome = "drained" if done.returncode == 0 else f"not drained: {done.stderr.strip().splitlines()[-1:]}"
    print(f"{message}, in {seconds:.0f} s: node {node} {outcome}", flush=True)
    return done.returncode == 0


def wait_for_fits(deadline: float) -> None:
    """Return when no worker of Ray runs anything on this machine any more, or at `deadline` (monotonic seconds)."""
    while time.monotonic() < deadline and any(_is_busy(words[0]) for words in _commands()):
        time.sleep(1)


def watch(cloud: str, base: str, every_s: float, address: str | None = None) -> None:
    """Ask until a notice has come and the node is drained."""
    reachable = True
    while True:
        try:
            seconds = NOTICES[cloud](base)
            if not reachable:
                print(f"{base} answers again", flush=True)
            reachable = True
            if seconds is not None and drain(seconds, f"{cloud} takes this machine back", address):
                return
        except OSError as error:  # the service restarts at times: the next question may be answered
            if reachable:
                print(f"{base} does not answer ({error}); asking on", flush=True)
            reachable = False
        time.sleep(every_s)


def _ask(url: str, method: str, headers: dict[str, str]) -> str | None:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return str(response.read().decode()).strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:  # what both services say as long as there is nothing to say
            return None
        raise


def _commands() -> list[list[str]]:
    lines = []
    for path in PROC.glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace").split("\0"))
        except OSError:  # it ended between listing and reading
            continue
    return lines


def _is_busy(title: str) -> bool:
    return title.startswith("ray::") and not title.startswith(ALWAYS_THERE)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Drain this machine's Ray node before the cloud takes the machine back.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cloud", choices=sorted(NOTICES), help="whose notices to watch for")
    what.add_argument("--now", type=float, metavar="SECONDS", help="drain now; wait so long for what still runs")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="time between two questions")
    parser.add_argument("--address", metavar="HOST:PORT", help="only nodes of the cluster whose head is there")
    parser.add_argument("--metadata", metavar="URL", help="where the metadata service is, if not where it always is")
    options = parser.parse_args()
    if options.cloud:
        watch(options.cloud, options.metadata or METADATA[options.cloud], options.every, options.address)
        return
    deadline = time.monotonic() + options.now
    drained = drain(options.now, "this node is being stopped", options.address)
    wait_for_fits(deadline)
    sys.exit(not drained)


if __name__ == "__main__":
    main()
