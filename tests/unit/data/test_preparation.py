"""Preparing: the same bytes however many processes share the work; what was prepared once, and is intact, is not prepared again."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from softseg_dist.data.cases import Case, CaseData, DataSet
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.layouts import Bids
from softseg_dist.data.phantom import Phantom, PhantomCase
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.processes import _group_limits, num_processors, over_processes
from softseg_dist.data.store import MAGIC, Part, Store, build_store, fingerprint
from softseg_dist.data.volume import write_volume
from softseg_dist.errors import UserError

DATA = Phantom(subjects=5, size=(24, 20), num_slices=3, raters=2)
PREPROCESS = Preprocess(spacing_mm=(0.6, 0.5), crop=(16, 20))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("stores"), DATA.cases(None), DATA, PREPROCESS)


class Log:
    """Prepares one by one, and remembers whom."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, function: Callable[[Part], Path], parts: Sequence[Part]) -> Generator[Path, None, None]:
        for part in parts:
            self.names.append(part.case.name)
            yield function(part)


class Sick(PhantomCase):
    """A case that fails as long as `reason` is not None."""

    reason: BaseException | None = None

    def load(self) -> CaseData:
        if self.reason is not None:
            raise self.reason
        return super().load()


def cases_with_one_sick(reason: BaseException) -> tuple[Case, ...]:
    """The fourth of five."""
    sick = Sick(DATA, 3)
    sick.reason = reason
    return tuple(sick if case.name == sick.name else case for case in DATA.cases(None))


def prepared(folder: Path, data: DataSet = DATA, preprocess: Preprocess = PREPROCESS) -> tuple[Path, list[str]]:
    """The store, and the names of the cases that were prepared for it."""
    log = Log()
    return build_store(folder, data.cases(None), data, preprocess, spread=log), log.names


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.engine
def test_the_store_is_the_same_for_one_process_and_two(built: Path, tmp_path: Path) -> None:
    two = partial(over_processes, workers=2, pays_s=0)
    seen: list[int] = []
    path = build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS, lambda done, *_: seen.append(done), two)
    assert path.read_bytes() == built.read_bytes()
    assert seen == [1, 2, 3, 4, 5]
    assert files(tmp_path) == [built.name]


def test_errors_of_other_processes_come_as_those_of_this_one() -> None:
    shares = over_processes(_reciprocal, [1, 2, 0, 4], workers=2, pays_s=0)
    assert [next(shares), next(shares)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(shares)


def test_a_worker_that_is_killed_leaves_its_tasks_to_this_process() -> None:
    assert list(over_processes(_pid_but_not_twice, [os.getpid()] * 3, workers=2, pays_s=0)) == [os.getpid()] * 3


def _reciprocal(number: int) -> float:
    return 1 / number


def _pid_but_not_twice(driver: int) -> int:
    if os.getpid() != driver:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def test_little_work_starts_no_process() -> None:
    assert set(over_processes(_pid, range(8), workers=2)) == {os.getpid()}


SCRIPT = """
import os
from softseg_dist.data.processes import over_processes
print("script", flush=True)
print(len(set(over_processes(os.path.getsize, [__file__] * 4, workers=2, pays_s=0))))
"""


@pytest.mark.engine
def test_a_script_without_a_guard_is_not_run_again_by_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.returncode) == ("script\n1\n", 0)
    assert ran.stderr == ""


def test_what_cannot_be_sent_stays_in_this_process() -> None:
    tasks = [lambda: 1, lambda: 2]
    assert list(over_processes(lambda task: task(), tasks, workers=2, pays_s=0)) == [1, 2]


def _pid(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("reason", [UserError("cut off"), KeyboardInterrupt(), BrokenPipeError()])
def test_after_a_failure_in_the_middle_finished_cases_are_not_prepared_again(
    built: Path, tmp_path: Path, reason: BaseException
) -> None:
    with pytest.raises(type(reason)):
        build_store(tmp_path, cases_with_one_sick(reason), DATA, PREPROCESS)
    assert not list(tmp_path.glob("*.arrow"))
    path, names = prepared(tmp_path)
    assert names == ["sub-004", "sub-005"]
    assert path.read_bytes() == built.read_bytes()
    assert files(tmp_path) == [built.name]


@pytest.mark.engine
def test_after_a_kill_finished_cases_are_not_prepared_again(built: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from softseg_dist.data.cases import DataSet;"
        "from softseg_dist.data.preprocess import Preprocess; from softseg_dist.data.store import build_store;"
        "data = DataSet.model_validate_json(sys.argv[2]); preprocess = Preprocess.model_validate_json(sys.argv[3]);"
        "kill = lambda done, *_: done == 2 and os.kill(os.getpid(), 9);"
        "build_store(Path(sys.argv[1]), data.cases(None), data, preprocess, kill)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), DATA.model_dump_json(), PREPROCESS.model_dump_json()]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    path, names = prepared(tmp_path)
    assert names == ["sub-003", "sub-004", "sub-005"]
    assert path.read_bytes() == built.read_bytes()
    assert files(tmp_path) == [built.name]


def test_what_was_prepared_ahead_is_used(built: Path, tmp_path: Path) -> None:
    def all_at_once(function: Callable[[Part], Path], parts: Sequence[Part]) -> Generator[Path, None, None]:
        yield from [function(part) for part in parts]

    def stop(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS, stop, all_at_once)
    path, names = prepared(tmp_path)
    assert names == []
    assert path.read_bytes() == built.read_bytes()
    assert files(tmp_path) == [built.name]


def test_a_draft_whose_process_lives_is_left_alone(built: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def build_another(done: int, total: int, name: str) -> None:
        if done == 3:
            seen.append(prepared(tmp_path)[1])

    build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS, build_another)
    assert seen == [["sub-001", "sub-002", "sub-003", "sub-004", "sub-005"]]
    assert (tmp_path / built.name).read_bytes() == built.read_bytes()
    assert files(tmp_path) == [built.name]


def test_a_leftover_that_was_cut_off_gives_what_is_before_the_cut(built: Path, tmp_path: Path) -> None:
    whole = built.read_bytes()
    (tmp_path / ".0.0.draft").write_bytes(whole[: len(whole) // 2])
    (tmp_path / ".1.0.draft").touch()
    (tmp_path / ".2.0.draft").write_bytes(MAGIC + b"and nothing else")
    path, names = prepared(tmp_path)
    assert names in (["sub-003", "sub-004", "sub-005"], ["sub-004", "sub-005"])
    assert path.read_bytes() == built.read_bytes()
    assert files(tmp_path) == [".2.0.draft", built.name]


def test_damaged_numbers_of_a_leftover_are_not_used(built: Path, tmp_path: Path) -> None:
    whole = bytearray(built.read_bytes())
    whole[whole.index(Store.open(built).sample(1).image.tobytes()) + 40] ^= 16
    (tmp_path / ".0.0.draft").write_bytes(whole)
    path, _ = prepared(tmp_path)
    assert path.read_bytes() == built.read_bytes()


def test_a_full_disk_takes_leftovers_with_it(tmp_path: Path) -> None:
    """Else the next run would find less room than the first."""
    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path, cases_with_one_sick(KeyboardInterrupt()), DATA, PREPROCESS)
    with pytest.raises(UserError, match=r"cannot write the store .*: No space left"):
        build_store(tmp_path, cases_with_one_sick(OSError(errno.ENOSPC, "No space left on device")), DATA, PREPROCESS)
    assert files(tmp_path) == []


@pytest.fixture
def bids(tmp_path: Path) -> Bids:
    """Three subjects with files."""
    folder = tmp_path / "bids"
    for number in (1, 2, 3):
        write_subject(folder, number, label=0.5)
    return Bids(str(folder), image="T2w", labels={"GM": "seg"})


def write_subject(folder: Path, number: int, label: float) -> None:
    """An image and its mask."""
    geometry = Geometry((6, 5, 4), np.diag([1.0, 1.0, 2.0, 1.0]))
    image = np.random.default_rng(number).normal(size=(6, 5, 4)).astype(np.float32)
    below = Path(f"sub-{number}") / "anat" / f"sub-{number}_T2w"
    write_volume(folder / f"{below}.nii", image, geometry)
    write_volume(folder / "derivatives" / "labels" / f"{below}_seg.nii", np.full_like(image, label), geometry)


def test_where_one_source_has_changed_only_that_case_is_prepared_again(tmp_path: Path, bids: Bids) -> None:
    stores = tmp_path / "stores"
    first, names = prepared(stores, bids, Preprocess())
    assert names == ["sub-1", "sub-2", "sub-3"]
    assert prepared(stores, bids, Preprocess()) == (first, [])
    write_subject(Path(bids.folder), 2, label=0.25)
    second, names = prepared(stores, bids, Preprocess())
    assert names == ["sub-2"]
    assert second.read_bytes() == build_store(tmp_path / "anew", bids.cases(None), bids, Preprocess()).read_bytes()
    assert first.exists()
    assert Store.open(second).sample(1).raters.max() == 0.25


def test_stores_of_other_values_or_files_for_a_class_are_other_stores(tmp_path: Path, bids: Bids) -> None:
    alike = [{"a": "seg:0", "b": "seg:1"}, {"a": "seg:1", "b": "seg:0"}, {"a": "seg", "b": "seg"}]
    names = {fingerprint(bids.replace(labels=labels).cases(None), bids, Preprocess()) for labels in alike}
    assert len(names) == 3


def test_a_store_gives_its_cases_to_one_of_other_subjects(built: Path, tmp_path: Path) -> None:
    fewer = DATA.cases(None)[1:3]
    build_store(tmp_path, fewer, DATA, PREPROCESS)
    path, names = prepared(tmp_path)
    assert names == ["sub-001", "sub-004", "sub-005"]
    assert path.read_bytes() == built.read_bytes()


def test_a_store_gives_nothing_to_one_that_is_prepared_otherwise(tmp_path: Path) -> None:
    build_store(tmp_path, DATA.cases(None), DATA, PREPROCESS)
    _, names = prepared(tmp_path, preprocess=PREPROCESS.replace(normalize="none"))
    assert len(names) == 5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_processors_that_this_process_may_not_use_do_not_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_processors() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert num_processors() <= len(before)


@pytest.mark.parametrize("group", ["/", "/user.slice/job"])
def test_limits_of_the_control_group_and_of_those_above_count(tmp_path: Path, group: str) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text(f"1:name=systemd:/x\n0::{group}\n")
    (root / group.strip("/")).mkdir(parents=True)
    (root / "cpu.max").write_text("200000 100000\n")
    (root / group.strip("/") / "cpu.max").write_text("max 100000\n" if group != "/" else "150000 100000\n")
    found = _group_limits("cpu.max", root, own)
    assert found == (["150000 100000"] if group == "/" else ["max 100000", "200000 100000"])
    assert _group_limits("memory.max", root, own) == []
    assert _group_limits("cpu.max", root, tmp_path / "none") == found[-1:]
