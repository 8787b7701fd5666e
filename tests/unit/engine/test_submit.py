"""What a submitted study has printed is said once, however often the connection is lost; how a job ended is an exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

from softseg_dist.cli.submit import after_debug
from softseg_dist.engine.context import SUBMITTED_BY
from softseg_dist.engine.ray_submit import Job, _exit_code, _Log, submit
from softseg_dist.errors import UserError
from softseg_dist.sources import Sources
from softseg_dist.words import next_command

JOB = Job("http://head:8265", "raysubmit_1")


class Server:
    """Tells a log in pieces, as Ray's does: from the beginning with every connection."""

    def __init__(self, text: str) -> None:
        self.text = text

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for start in range(0, len(self.text), 4):
            yield self.text[start : start + 4]


def ended(status: JobStatus, code: int | None) -> int:
    return _exit_code(JOB, JobDetails(type=JobType.SUBMISSION, entrypoint="x", status=status, driver_exit_code=code))


def test_a_log_is_said_once_over_lost_connections() -> None:
    said: list[str] = []
    log = _Log(said.append)
    for text in ("1/6 a", "1/6 a/000\n2/6", "1/6 a/000\n2/6 a/001\n"):
        asyncio.run(log.follow(Server(text), JOB.id))
    assert "".join(said) == "1/6 a/000\n2/6 a/001\n"


def test_a_job_ends_with_the_exit_code_of_its_run() -> None:
    assert ended(JobStatus.SUCCEEDED, 0) == 0
    assert [ended(JobStatus.FAILED, code) for code in (1, 2, 130)] == [1, 2, 130]
    assert ended(JobStatus.STOPPED, None) == 130
    with pytest.raises(UserError, match="no softseg command"):
        ended(JobStatus.FAILED, 127)
    with pytest.raises(UserError, match="raysubmit_1 ended before its study did, submitting it again goes on"):
        ended(JobStatus.FAILED, -9)


def test_a_debug_run_ends_with_the_command_without_debug_but_not_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "my study.py", "--tracking-uri", "http://me:secret@lab", "--local"]
    monkeypatch.setattr(sys, "argv", ["softseg", *words, "--debug"])
    words[3] = "http://lab"  # credentials come from the environment
    assert after_debug() == [f"Next     {next_command(*words)}"]
    monkeypatch.setenv(SUBMITTED_BY, "0.2.0")
    assert after_debug() == [], "the study file of a job lies in a folder of the job"


def test_a_job_is_followed_and_stopped_by_commands_of_ray() -> None:
    assert JOB.commands == {
        "follow": next_command("job", "logs", JOB.id, "--follow", "--address", JOB.address, program="ray"),
        "stop": next_command("job", "stop", JOB.id, "--address", JOB.address, program="ray"),
    }


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001"])
def test_an_address_that_is_no_dashboard_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="like http://HEAD:8265"):
        submit(Sources("s.py", {"s.py": ""}), address, {})


def test_a_cluster_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(UserError, match="does not answer or refuses") as refused:
        submit(Sources("s.py", {"s.py": ""}), "http://127.0.0.1:9", {})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("place", ["address", "out", "flag"])
def test_a_job_takes_no_credentials_as_its_command_can_be_read(place: str) -> None:
    given = {"address": "http://head:8265", "out": "s3://lab/runs", "flag": "http://lab:5000"}
    given[place] = given[place].replace("://", "://me:planted@")
    with pytest.raises(UserError, match="takes no credentials") as refused:
        submit(Sources("s.py", {"s.py": ""}), given["address"], {"--out": given["out"]}, ["--tracking-uri", given["flag"]])
    assert "planted" not in str(refused.value)
