"""Contract with Ray: the private names that the package uses exist; other versions are refused; deaths are told apart."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import ray

from softseg_dist.engine import context
from softseg_dist.engine.context import SUBMITTED_BY, check_ray
from softseg_dist.engine.ray_cluster import node_is_gone
from softseg_dist.engine.ray_private import cause_in, connect, lost_actors, private_ray
from softseg_dist.errors import UserError
from softseg_dist.interrupts import interruptible

USED = {
    "ray._private.node": ("Node.get_gcs_client", "Node.start_api_server", "Node.start_monitor"),
    "ray._private.ray_constants": (
        "DASHBOARD_ADDRESS",
        "DEBUG_AUTOSCALING_STATUS",
        "ENABLE_RAY_CLUSTER",
        "KV_NAMESPACE_DASHBOARD",
        "LOG_PREFIX_ACTOR_NAME",
    ),
    "ray._private.services": ("ConsolePopen",),
    "ray._private.state": ("actors", "state._connect_and_get_accessor", "state.get_draining_nodes"),
    "ray._private.utils": ("get_dashboard_dependency_error", "set_sigterm_handler"),
    "ray._private.worker": ("_worker_logs_enabled",),
    "ray._raylet": ("AuthenticationTokenLoader.instance", "AuthenticationTokenLoader.reset_cache", "Config.initialize"),
    "ray.autoscaler.v2.utils": ("is_autoscaler_v2",),
    "ray.core.generated.gcs_pb2": ("PlacementGroupTableData.FromString", "PlacementGroupTableData.PlacementGroupState"),
    "ray.experimental.internal_kv": ("_internal_kv_get",),
    "ray.job_config": ("JobConfig._runtime_env_has_working_dir",),
    "ray.tune.execution.class_cache": ("ENV_VARS_TO_PROPAGATE",),
    "ray.tune.experiment": ("Trial.error_file", "Trial.is_finished"),
    "ray.tune.progress_reporter": ("TrialProgressCallback",),
}
MADE = {  # by constructors
    "ray.tune.execution.tune_controller.TuneController": (
        "_failed_trials",
        "_live_trials",
        "_stopped_trials",
        "_trials",
        "_trials_to_cache",
    ),
    "ray.tune.experiment.Trial": ("trial_id",),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in USED.items() for name in names])
def test_a_name_that_the_package_uses_exists_in_this_ray(module: str, name: str) -> None:
    reduce(getattr, name.split("."), importlib.import_module(module))


@pytest.mark.parametrize("owner", MADE)
def test_an_object_has_what_the_package_uses_of_it(owner: str) -> None:
    module, _, name = owner.rpartition(".")
    made = getattr(importlib.import_module(module), name).__init__.__code__.co_names
    assert {*MADE[owner]} <= {*made}


def test_another_ray_is_refused_with_the_version_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ray()
    monkeypatch.setattr(context, "RAY", "2.1")
    with pytest.raises(UserError, match=r"^Ray \S+ is not supported: pip install .*==2\.1\.\*\", or run with --local$"):
        check_ray()


def test_a_job_of_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUBMITTED_BY, "0.0.1")
    with pytest.raises(UserError, match=r"submitted by softseg_dist 0\.0\.1, but the cluster has"):
        check_ray()


def test_the_cause_of_a_death_is_read_from_what_ray_says() -> None:
    text = "ray.exceptions.RayTaskError(ValueError): ray::x\n  File ...\nValueError: the fit broke\n"
    assert cause_in(text) == "ValueError: the fit broke"
    assert "low on memory" in cause_in("Task was killed due to the node running low on memory.")
    assert cause_in("The actor died unexpectedly") == ""
    assert lost_actors(f"The actor {'0a' * 16} is unavailable: The actor is temporarily unavailable") == ["0a" * 16]
    assert lost_actors("The actor died unexpectedly") == []


def test_a_user_without_a_name_or_a_home_folder_has_what_ray_and_torch_ask_for() -> None:
    nobody = "import pwd; pwd.getpwuid = {}.__getitem__"  # as in a container that runs as any user
    code = f"{nobody}; import softseg_dist, getpass, pathlib, os; print(pathlib.Path.home(), getpass.getuser() == str(os.getuid()))"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "/ True\n"


def test_a_signal_waits_until_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def init(address: str) -> None:
        ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)
        started.append(address)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt), interruptible():
        connect(address="a machine")
    assert started == ["a machine"]


def test_a_ray_that_does_not_start_is_one_line_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=r"Ray does not start .*timed out during startup.*--local"), private_ray({}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_machine_is_gone_if_ray_says_so_or_if_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as answers, socket.socket() as silent:
        for one in (answers, silent):
            one.bind(("127.0.0.1", 0))
        answers.listen()
        ports = {"runs": answers.getsockname()[1], "vanished": silent.getsockname()[1], "dead": answers.getsockname()[1]}
        common = {"NodeManagerAddress": "127.0.0.1"}
        nodes = [{"NodeID": name, "NodeManagerPort": port, "Alive": name != "dead", **common} for name, port in ports.items()]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        gone = [node_is_gone(of) for of in (set(), {"runs"}, {"runs", "vanished"}, {"runs", "dead"}, {"unknown"})]
    assert gone == [False, False, True, True, True]
