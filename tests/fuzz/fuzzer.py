"""Damage everything that is read, with a seed, and say how each input ended: `make fuzz`, or

    python tests/fuzz/fuzzer.py --inputs 10000 --seed 0          # writes fuzz.json
    python tests/fuzz/fuzzer.py --seed 0 --only 4711             # one input again, with its traceback

same         read as the undamaged one
changed      an input of the user that is another valid one, or a file of ours that was sealed again after the change
refused      one line that names the file
made again   read as the undamaged one, and a warning or a note said so; or left out, which was said
absent       a file of ours is not there any more, as before it was written
accepted     FAILURE: a file of ours was changed, and believed
unclear      FAILURE: refused in several lines, in 500 characters or more, or without the name of the file or its folder
traceback, hang (10 s), memory (1 GB)    FAILURE
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "engine"))
from commands import softseg_here
from damage import damage
from kinds import KINDS, Kind

from softseg_dist.errors import UserError

RIGHT = ("same", "changed", "refused", "made again", "absent")
WRONG = ("accepted", "unclear", "traceback", "hang", "memory")
LONGEST_S, MOST_BYTES, LONGEST_MESSAGE = 10.0, 2**30, 500
BY_COMMAND = 50  # one in so many goes through the command line
TIMES = re.compile(r'"quiet_s": [\d.e-]+|[\w. ]+ ago|"seconds": [\d.e-]+')  # differ from one call to the next
VOUCHED = 0.3  # of the inputs that can be are sealed again
RESULT, PAGE = Path(__file__).with_name("result.json"), Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- fuzz: written by tests/fuzz/fuzzer.py --write -->", "<!-- end of fuzz -->"


class Hang(BaseException):
    """Raised by the alarm."""


@dataclass(frozen=True)
class Ended:
    """How an input ended: its number, kind, damaged file, what was done, and what came of it."""

    number: int
    kind: str
    file: str
    done: str
    end: str
    detail: str = ""
    seconds: float = 0.0


def digest(value: Any) -> str:
    """Of what a reader has understood."""
    hashed = hashlib.sha256()
    _feed(hashed, value)
    return hashed.hexdigest()


def _feed(hashed: Any, value: Any) -> None:
    hashed.update(type(value).__name__.encode())
    if isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, pd.DataFrame):
        hashed.update(value.to_csv(index=False).encode())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(hashed, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _feed(hashed, (str(key), value[key]))
    elif isinstance(value, (list, tuple)):
        for one in value:
            _feed(hashed, one)
    else:
        hashed.update(repr(value).encode())


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def limits() -> Iterator[None]:
    """An alarm, and no more than so much memory."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if status := Path("/proc/self/status"):
        used = 1024 * int(status.read_text().partition("VmSize:")[2].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MOST_BYTES, most))  # threads reserve more than they use
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _bytes(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


class Fuzzer:
    """Valid inputs of all kinds in a folder, and the digests of what is read from them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.kinds = {kind.name: kind for kind in KINDS}
        self.digests: dict[str, str] = {}
        self.shown: dict[str, str] = {}
        for number, kind in enumerate(KINDS):
            valid = folder / f"valid{number}" / "x"
            valid.mkdir(parents=True)
            kind.make(valid)
            self.digests[kind.name] = digest(kind.reader(self._copy(kind), []))

    def _copy(self, kind: Kind) -> Path:
        """Where the reader finds it: the same path each time, for paths are part of some answers."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / f"valid{KINDS.index(kind)}", work, copy_function=shutil.copyfile)
        return work / "x"

    def one(self, number: int, show: bool = False) -> Ended:
        """Damage one input and read it. The same number gives the same input."""
        draw = Random(f"{self.seed}/{number}")
        kind = draw.choices(KINDS, [kind.share for kind in KINDS])[0]
        folder = self._copy(kind)
        path = draw.choice([path for path in sorted(folder.glob(draw.choice(kind.of))) if path.is_file()])
        name, was = path.relative_to(folder).as_posix(), path.read_bytes()
        vouched = kind.vouch is not None and path.suffix in (".json", ".safetensors") and draw.random() < VOUCHED
        done = kind.vouch(path, draw) if vouched and kind.vouch else damage(path, draw)
        untouched = path.is_file() and path.read_bytes() == was
        by_command = bool(kind.commands) and draw.random() < self.share_by_command
        words = draw.choice(kind.commands).replace("{}", str(folder)) if by_command else ""
        started = time.monotonic()
        if words:
            end, detail = self._by_command(kind, words, path, folder, show)
        else:
            end, detail = self._read(kind, path, folder, show)
        if end == "accepted":
            gone = done in ("missing", "loop", "folder")
            end = "same" if untouched else "changed" if not kind.own or vouched else "absent" if gone else end
        done = f"{words.split()[0]}: {done}" if words else done
        return Ended(number, kind.name, name, done, end, detail, time.monotonic() - started)

    @property
    def share_by_command(self) -> float:
        """Of the kinds that a command reads, so that of all inputs one in `BY_COMMAND` does."""
        return sum(kind.share for kind in KINDS) / BY_COMMAND / sum(kind.share for kind in KINDS if kind.commands)

    def _read(self, kind: Kind, path: Path, folder: Path, show: bool) -> tuple[str, str]:
        said: list[str] = []
        before = _bytes("VmRSS")
        found, end, detail = None, "", ""
        logger, handler = logging.getLogger("softseg_dist"), Warnings(said)
        logger.addHandler(handler)
        try:
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = digest(kind.reader(folder, said))
        except UserError as error:
            end, detail = self._refusal(str(error), path, folder)
        except Hang:
            end, detail = "hang", traceback.format_exc()[-300:]
        except MemoryError:
            end, detail = "memory", traceback.format_exc()[-300:]
        except BaseException as error:  # noqa: BLE001 - every other one is a defect
            end, detail = "traceback", f"{type(error).__name__}: {error}"[:300]
            if show:
                traceback.print_exc()
        finally:
            logger.removeHandler(handler)
        if _bytes("VmHWM") - before > MOST_BYTES:
            return "memory", f"{(_bytes('VmHWM') - before) / 2**30:.2g} GB; {end} {detail}"
        if end:
            return end, detail
        named = any(path.name in text or path.stem.partition(".")[0] in text for text in said)
        if found == self.digests[kind.name]:
            return ("made again" if named else "same"), ""
        return ("made again" if named else "accepted"), ""

    def _refusal(self, text: str, path: Path, folder: Path) -> tuple[str, str]:
        named = path.name in text or folder.name in text or str(folder) in text or path.parent.name in text
        clear = "\n" not in text.strip() and len(text.replace(str(self.folder), "")) < LONGEST_MESSAGE and named
        return ("refused", "") if clear else ("unclear", text[:400])

    def _by_command(self, kind: Kind, words: str, path: Path, folder: Path, show: bool) -> tuple[str, str]:
        try:
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ended = softseg_here(*words.split(), cwd=folder)
        except Hang:
            return "hang", words
        except BaseException as error:  # noqa: BLE001 - every other one is a defect
            if show:
                traceback.print_exc()
            return "memory" if isinstance(error, MemoryError) else "traceback", f"{type(error).__name__}: {error}"[:300]
        if "Traceback" in ended.stderr + ended.stdout:
            return "traceback", ended.stderr[-300:]
        if ended.returncode == 2 and not words.startswith("check") and ended.stderr.count("error:") == 1:
            text = " ".join(ended.stderr.partition("error:")[2].split())  # what a terminal of 80 columns has broken
            return ("refused", "") if len(text.replace(str(self.folder), "")) < LONGEST_MESSAGE else ("unclear", text[:400])
        if ended.returncode not in (0, 1, 2):
            return "unclear", f"exit code {ended.returncode}"
        if path.name in ended.stderr:
            return "made again", ""
        shown = TIMES.sub("", ended.stdout)
        return ("same" if shown == self._shown(kind, words) else "accepted"), shown[:200]

    def _shown(self, kind: Kind, words: str) -> str:
        """What the command prints about the undamaged input."""
        if words not in self.shown:
            self.shown[words] = TIMES.sub("", softseg_here(*words.split(), cwd=self._copy(kind)).stdout)
        return self.shown[words]

    def run(self, inputs: int, first: int = 0) -> list[Ended]:
        """All of them, in order."""
        return [self.one(number) for number in range(first, first + inputs)]


@contextmanager
def fuzzing(seed: int) -> Iterator[Fuzzer]:
    """A fuzzer in a temporary folder, with a cache of its own."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        os.environ |= {"SOFTSEG_CACHE": f"{folder}/cache", "XDG_CONFIG_HOME": f"{folder}/configuration"}
        try:
            yield Fuzzer(Path(folder), seed)
        finally:
            os.environ.clear()
            os.environ.update(before)


def summary(ended: Sequence[Ended], seed: int) -> dict[str, Any]:
    """The counts by kind and end, and each failure."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in ended:
        counts[one.kind][one.end] += 1
    by_command = sum(": " in one.done and one.done.partition(":")[0] in COMMANDS for one in ended)
    failures = [dataclasses.asdict(one) for one in ended if one.end in WRONG]
    kinds = [kind.name for kind in KINDS if kind.name in counts]
    rows = {name: {end: counts[name][end] for end in (*RIGHT, *WRONG) if counts[name][end]} for name in kinds}
    return {"seed": seed, "inputs": len(ended), "by_command": by_command, "counts": rows, "failures": failures}


def table(found: Mapping[str, Any]) -> str:
    """The counts, in Markdown."""
    ends = [*RIGHT, "failures"]
    rows = [f"| what is read | inputs | {' | '.join(ends)} |", "|---|" + "---:|" * (len(ends) + 1)]
    counted = {kind: Counter(of) for kind, of in found["counts"].items()}
    for kind, of in (*counted.items(), ("**all**", sum(counted.values(), Counter()))):
        failures = sum(of[end] for end in WRONG)
        rows.append(f"| {kind} | {of.total()} | {' | '.join(str(of[end]) for end in RIGHT)} | {failures} |")
    return "\n".join(rows)


COMMANDS = {words.split()[0] for kind in KINDS for words in kind.commands}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    parser.add_argument("--out", type=Path, default=Path("fuzz.json"), help="the counts, as JSON")
    parser.add_argument("--write", action="store_true", help="only show the committed result.json in docs/faults.md")
    given = parser.parse_args()
    if given.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        text = table(json.loads(RESULT.read_text()))
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
        return
    with fuzzing(given.seed) as fuzzer:
        if given.only is not None:
            print(fuzzer.one(given.only, show=True))
            return
        started, ended = time.process_time(), []
        for number in range(given.inputs):
            ended.append(one := fuzzer.one(number))
            if one.end in WRONG:
                print(f"{one.number} {one.kind}, {one.file}, {one.done}: {one.end}: {one.detail}", flush=True)
        found = summary(ended, given.seed)
    seconds = defaultdict[str, float](float)
    for one in ended:
        seconds[one.kind] += one.seconds
    print({kind: round(total, 1) for kind, total in seconds.items()})
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    used_s, failures = time.process_time() - started, len(found["failures"])
    print(f"{given.inputs} inputs in {used_s:.0f} s of processor time, {failures} failures: {given.out}")
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
