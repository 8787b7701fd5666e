"""Inject faults into real runs, with a seed, carry each run to its end, and say what the fault has cost: `make chaos`, or

    python tests/chaos/chaos.py --faults 100 --seed 0          # writes chaos.json after each fault; goes on where it was stopped
    python tests/chaos/chaos.py --seed 0 --only 47             # one fault again, with what was printed
    python tests/chaos/chaos.py --write                        # shows result.json in docs/faults.md

right         the same command led to the table, model and MLflow runs of an undisturbed run; each end was a documented one
lost          FAILURE: a finished fit is gone, or has another record
repeated      FAILURE: a fit has begun anew although it had a checkpoint
different     FAILURE: another table, model, or MLflow run than without the fault
traceback     FAILURE: one was printed
unclear       FAILURE: another exit code than documented, or not one line that says why
hang          FAILURE: a command that did not end in 240 s
left behind   FAILURE: a process, a port, shared memory, a temporary folder or a file is left 60 s after the end
too late      the run ended before the fault came, three times
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parent))
from flaky import namespaces_allowed
from strikes import KINDS, Kind, Scene, kinds, second_driver
from watched import Command, Watched, hung, mlflow_runs, table

RIGHT = ("right",)
WRONG = ("lost", "repeated", "different", "traceback", "unclear", "hang", "left behind")
LONGEST_S = 240.0  # a command that has not ended by then hangs
MOST_COMMANDS, MOST_TRIES, LONGEST_LINE = 5, 3, 500
AT_ONCE, TOGETHER_S = 2, 0.05  # faults; how soon after a first driver a second one is begun at once
RESULT, PAGE = Path(__file__).with_name("result.json"), Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- chaos: written by tests/chaos/chaos.py --write -->", "<!-- end of chaos -->"


@dataclass(frozen=True)
class Ended:
    """How a fault ended: its number, kind, the run, the moment, what was done, what came of it, and how long it took.

    `commands`: the exit codes. `again_s`: until it trained again.
    """

    number: int
    kind: str
    mode: str
    moment: str
    did: str
    end: str
    detail: str = ""
    commands: tuple[int, ...] = ()
    again_s: float | None = None
    seconds: float = 0.0


def options_of(mode: str) -> tuple[str, ...]:
    """Of `softseg run`."""
    return {"local": ("--local",), "ray": ("--max-concurrent", "2"), "pair": ("--workers-per-fit", "2")}[mode]


def undisturbed(base: Path, mode: str) -> None:
    """A run in `base` that nobody disturbs."""
    (base / "d").mkdir(parents=True)
    watched = Watched(base, base / "d", options_of(mode), {})
    command = watched.start()
    try:
        assert not hung(command, LONGEST_S)
        assert command.done, command.errors
        assert not (left := watched.left(watched.files())), left
    finally:
        watched.close()


def planned(number: int, seed: int) -> tuple[Kind, str, Random]:
    """The kind of a fault, the run that it is for, and what draws the rest."""
    draw, possible = Random(f"{seed}/{number}"), kinds()
    kind = draw.choices(possible, [kind.share for kind in possible])[0]
    return kind, draw.choice(kind.modes), draw


def one(number: int, seed: int, expected: Path, show: bool = False) -> Ended:
    """Inject one fault. The same number gives the same kind, and the same moment, as far as a run is the same."""
    kind, mode, draw = planned(number, seed)
    for _ in range(MOST_TRIES):
        moment = draw.choice(kind.moments)
        delay_s = draw.uniform(0, 5) if moment == "start" else draw.uniform(0, 0.7)
        if kind.strike is second_driver and moment == "start" and draw.random() < 0.5:
            delay_s = draw.uniform(0, TOGETHER_S)
        folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # a short name, for the sockets of Ray
        scene = Scene(draw, folder, mode, moment, delay_s)
        try:
            ended = _carried(number, kind, scene, expected, show)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if ended.end != "too late":
            break
    return ended


def _carried(number: int, kind: Kind, scene: Scene, expected: Path, show: bool) -> Ended:
    started, again_s, codes = time.monotonic(), None, ()
    end, detail = "hang", "the fault itself"
    with kind.around(scene):
        options = (*options_of(scene.mode), *scene.options)
        watched = scene.watched = Watched(scene.folder, scene.disk, options, scene.environment)
        try:
            end, detail = _ended(kind, scene, expected)
            codes = tuple(command.process.wait() for command in watched.commands)
            again_s = _again_s(scene) if kind.trains_again and end == "right" else None
            if show:
                for command in watched.commands:
                    print(command.process.returncode, *(line for _, line in command.lines), *command.errors)
        finally:
            watched.close()
    moment = f"{scene.moment} + {scene.delay_s:.2f} s"
    return Ended(number, kind.name, scene.mode, moment, scene.did, end, detail, codes, again_s, time.monotonic() - started)


def _ended(kind: Kind, scene: Scene, expected: Path) -> tuple[str, str]:
    """Run the command, with the fault, until the study is done; then look at all that it has left."""
    watched, wrong = scene.watched, list[tuple[str, str]]()
    command = watched.start()
    if scene.comes(command):
        kind.strike(scene, command)
    stuck = hung(command, LONGEST_S)
    for undo in reversed(scene.undo):
        undo()
    if scene.struck is None:
        return ("hang", "") if stuck else ("too late", "")
    if stuck:
        return "hang", f"{watched.commands[0].lines[-1:]}"
    if command.process.returncode == -9 and scene.draw.random() < 0.5:  # else the next command comes at once
        until = time.monotonic() + 60
        while (left := watched.processes()) and time.monotonic() < until:
            time.sleep(0.2)
        wrong += [("left behind", f"a killed driver: {left}")] * bool(left)
    wrong += [found for struck in watched.commands if (found := judged(struck, (*kind.codes, *scene.codes), kind.says))]
    while not any(command.done for command in watched.commands):
        if len(watched.commands) >= MOST_COMMANDS:
            return "unclear", f"not done after {MOST_COMMANDS} commands: {wrong}"
        if hung(command := watched.start(), LONGEST_S):
            return "hang", f"command {len(watched.commands)}: {command.lines[-1:]}"
        wrong += [found for found in [judged(command, (0,), "")] if found]
    wrong += [("unclear", said) for finish in scene.at_end if (said := finish())]
    watched.look()
    wrong += compared(scene, expected)
    left = watched.left({str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file()})
    wrong += [("left behind", "; ".join(left))] * bool(left)
    return min(wrong, key=lambda found: _order(found[0])) if wrong else ("right", "")


def _order(end: str) -> int:
    return WRONG.index(end)


def judged(command: Command, codes: Sequence[int], says: str) -> tuple[str, str] | None:
    """What is wrong with the end of a command, if anything is."""
    for reader in command.readers:
        reader.join(5.0)
    text, code = "".join(command.errors), command.process.returncode
    everything = text + "".join(line for _, line in command.lines)
    if "Traceback" in everything:
        return "traceback", everything[max(0, everything.index("Traceback") - 200) :][:1500]
    if code not in codes or (code == 0 and not command.done):
        return "unclear", f"exit code {code}: {text[-300:]}{[line for _, line in command.lines[-2:]]}"
    lines = text.splitlines()
    if len(lines) > 1 or len(text) > LONGEST_LINE or (code == 2 and not (lines and re.search(says, text))):
        return "unclear", f"exit code {code}, {len(lines)} lines: {text[:400]}"
    return None


def compared(scene: Scene, expected: Path) -> list[tuple[str, str]]:
    """What differs from the undisturbed run."""
    watched, run, whole = scene.watched, scene.watched.run, expected / "runs" / scene.watched.run.name
    gone = [name for name in watched.finished if not (run / name).is_file()]
    wrong = [("lost", f"{sorted(watched.changed)} changed, {gone} gone")] * bool(watched.changed or gone)
    wrong += [("repeated", "; ".join(watched.repeated))] * bool(watched.repeated)
    ours, theirs = table(run), table(whole)
    if not ours.equals(theirs):
        first = ours.compare(theirs)[:3] if ours.shape == theirs.shape else ""
        wrong.append(("different", f"the table: {len(ours)} rows, {len(theirs)} expected; {first}"))
    weights = "model/model.safetensors"
    if hashlib.sha256((run / weights).read_bytes()).digest() != hashlib.sha256((whole / weights).read_bytes()).digest():
        wrong.append(("different", "the weights of the final model"))
    records, known = mlflow_runs(scene.database or run / "mlflow.db"), mlflow_runs(whole / "mlflow.db")
    if records != known:
        wrong.append(("different", f"MLflow: {[*(records - known)]} instead of {[*(known - records)]}"[:600]))
    return wrong


def _again_s(scene: Scene) -> float | None:
    """Seconds from the fault until a fit trained again: that which was lost, if one was, else any."""
    assert scene.struck is not None
    events = [(at, event) for command in scene.watched.commands for at, event in command.events if at > scene.struck]
    lost = {event["text"].partition(":")[0] for _, event in events if "trying again" in event.get("text", "")}
    began = scene.watched.commands[1].started if scene.watched.commands[0].process.returncode else scene.struck
    trained = [at for at, event in events if event.get("event") == "epoch" and at > began and (not lost or event["fit"] in lost)]
    return round(trained[0] - scene.struck, 1) if trained else None


def ended_of(found: Mapping[str, Any]) -> Ended:
    """From JSON."""
    return Ended(**{**found, "commands": tuple(found["commands"])})


class Chaos:
    """Faults, two at a time, each in a process of its own."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self._preparing, self._noting = threading.Lock(), threading.Lock()

    def expected(self, mode: str) -> Path:
        """The disk of a run that nobody disturbs: without Ray, but for fits of two workers, whose last digits are others."""
        mode = "pair" if mode == "pair" else "local"
        with self._preparing:
            if not (base := self.folder / mode).is_dir():
                said = self._apart("--undisturbed", mode, "--expected", base)
                assert not said.returncode, said.stdout
        return base / "d"

    def _apart(self, *options: object, show: bool = False) -> subprocess.CompletedProcess[str]:
        """This program, with disks and shared memory of its own where the kernel allows it."""
        own = ["unshare", "--user", "--map-root-user", "--mount"] if namespaces_allowed() else []
        command = [*own, sys.executable, __file__, "--seed", str(self.seed), *map(str, options)]
        return subprocess.run(command, stdout=None if show else subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def one(self, number: int, show: bool = False) -> Ended:
        """A fault in a process of its own, with mounts of its own where the kernel allows it."""
        expected = self.expected(planned(number, self.seed)[1])
        answer = self.folder / f"{number}.json"
        said = self._apart("--only", number, "--expected", expected, "--out", answer, *["--show"] * show, show=show)
        if not answer.is_file():
            detail = f"the fault suite itself: {(said.stdout or '')[-1500:]}"
            return Ended(number, planned(number, self.seed)[0].name, "", "", "", "traceback", detail)
        return ended_of(json.loads(answer.read_text()))

    def run(self, numbers: Sequence[int], out: Path | None = None) -> list[Ended]:
        """All of them; prints each, and writes the summary. What `out` has is not done again, unless it has failed."""
        known = json.loads(out.read_text()) if out is not None and out.is_file() else {"seed": self.seed, "each": []}
        kept = [ended_of(one) for one in known["each"] if known["seed"] == self.seed and one["end"] not in WRONG]
        done = {one.number: one for one in kept if one.number in numbers}

        def kept_so_far() -> list[Ended]:
            ended = [done[number] for number in sorted(done)]
            if out is not None:
                out.write_text(json.dumps(summary(ended, self.seed), indent=1) + "\n")
            return ended

        def inject(number: int) -> None:
            ended = self.one(number)
            print(line(ended), flush=True)
            with self._noting:
                done[number] = ended
                kept_so_far()

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(inject, [number for number in numbers if number not in done]))
        return kept_so_far()


@contextmanager
def chaotic(seed: int) -> Iterator[Chaos]:
    """In a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="e", dir="/tmp") as folder:
        yield Chaos(seed, Path(folder))


def line(ended: Ended) -> str:
    """For the terminal."""
    what = f"{ended.number:4} {ended.kind} ({ended.mode}, {ended.moment}{', ' * bool(ended.did)}{ended.did})"
    return f"{what}: {ended.end} {ended.detail} {list(ended.commands)} {ended.seconds:.0f} s"


def summary(ended: Sequence[Ended], seed: int) -> dict[str, Any]:
    """Each fault, and the counts by kind and end."""
    counts = {kind.name: Counter(one.end for one in ended if one.kind == kind.name) for kind in kinds()}
    missing = [kind.name for kind in KINDS if not counts.get(kind.name)]
    each = [dataclasses.asdict(one) for one in ended]
    return {"seed": seed, "faults": len(ended), "counts": counts, "missing": missing, "each": each}


def table_of(found: Mapping[str, Any]) -> str:
    """The counts, in Markdown."""
    ends = (*WRONG, "too late")
    command = f"python tests/chaos/chaos.py --faults {found['faults']} --seed {found['seed']}"
    rows = [
        f"Counts of `{command}`, on 2 cores:",
        "",
        f"| fault | faults | right | {' | '.join(ends)} | trains again after |",
        "|---|" + "---:|" * (len(ends) + 3),
    ]
    counted = {kind: Counter(of) for kind, of in found["counts"].items() if of}
    for kind, of in (*counted.items(), ("**all**", sum(counted.values(), Counter[str]()))):
        times = [one["again_s"] for one in found["each"] if one["kind"] == kind and one["again_s"] is not None]
        again = f"{statistics.median(times):.1f} s, at most {max(times):.1f} s" if times else ""
        rows.append(f"| {kind} | {of.total()} | {of['right']} | {' | '.join(str(of[end]) for end in ends)} | {again} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first fault")
    parser.add_argument("--only", type=int, help="the number of one fault")
    parser.add_argument("--expected", type=Path, help=argparse.SUPPRESS)  # folder of the undisturbed runs
    parser.add_argument("--undisturbed", help=argparse.SUPPRESS)  # such a run is made there
    parser.add_argument("--show", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("chaos.json"), help="each fault and the counts, as JSON; goes on from it")
    parser.add_argument("--write", action="store_true", help="only show the committed result.json in docs/faults.md")
    given = parser.parse_args()
    if given.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table_of(json.loads(RESULT.read_text()))}\n{END}{rest.partition(END)[2]}")
        return
    if given.expected is not None and namespaces_allowed():
        subprocess.run(["mount", "-t", "tmpfs", "none", "/dev/shm"], check=True)  # so that all that is left there is of this run
    for ignored in (signal.SIGINT, signal.SIGHUP):  # by `nohup`: the commands must not inherit that
        signal.signal(ignored, signal.default_int_handler)
    if given.undisturbed:
        undisturbed(given.expected, given.undisturbed)
        return
    if given.expected is not None:
        given.out.write_text(json.dumps(dataclasses.asdict(one(given.only, given.seed, given.expected, given.show))))
        return
    with chaotic(given.seed) as chaos:
        if given.only is not None:
            print(line(chaos.one(given.only, show=True)))
            return
        started = time.monotonic()
        ended = chaos.run(range(given.first, given.first + given.faults), given.out)
    failures = [one for one in ended if one.end in WRONG]
    print(f"{len(ended)} faults in {time.monotonic() - started:.0f} s, {len(failures)} failures: {given.out}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
