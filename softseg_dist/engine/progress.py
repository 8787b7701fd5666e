"""Progress displays of a run: a live table on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from statistics import fmean
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from softseg_dist.training.task import FitResult
from softseg_dist.words import duration

LINE_EVERY_S = 10.0  # plain lines: at most one per fit and this long


def progress_for(stream: TextIO, *, as_json: bool = False, live: bool = True) -> Progress:
    """The progress display that suits `stream`; not `live` where the terminal may be needed for a debugger."""
    if as_json:
        return JsonLines(stream)
    return LiveTable(stream) if live and stream.isatty() else PlainLines(stream)


class Progress:
    """Gets the events of a search and counts fits; subclasses show them on `stream`, this one nothing. `key`: `candidate/split`."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self.total = self.num_done = self.num_before = 0
        self.planned_fits: dict[str, int] = {}  # of each candidate
        self.scores: defaultdict[str, list[float | None]] = defaultdict(list)  # of its fits that have ended; None: it has failed
        self.running: dict[str, dict[str, float]] = {}
        self.started = time.monotonic()

    def start(self, total: int, done: Sequence[FitResult]) -> None:
        """The search begins: `total` fits in all, of which `done` ended in earlier sessions."""
        self.total, self.num_before, self.started = total, len(done), time.monotonic()
        self.num_done, self.scores = 0, defaultdict(list)  # of an earlier search
        for result in done:
            self._count(result)
        self.show("start", total=total, done=len(done))

    def planned(self, candidate: str, fits: int, total: int) -> None:
        """A candidate is known that will run so many fits; the study now has `total`."""
        self.total = total
        self.planned_fits[candidate] = fits

    def epoch(self, key: str, metrics: dict[str, float]) -> None:
        """A running fit has finished an epoch."""
        self.running[key] = metrics
        self.show("epoch", fit=key, metrics=metrics)

    def finished(self, result: FitResult) -> None:
        """A fit has ended, with a score or failed."""
        self.gone(result.key)
        self._count(result)
        shown = {name: getattr(result, name) for name in ("state", "reason", "score", "test_score", "duration_s", "attempt")}
        self.show("fit", fit=result.key, done=self.num_done, total=self.total, **shown)

    def gone(self, key: str) -> None:
        """A fit no longer runs and has no result: its process died, or it was interrupted."""
        self.running.pop(key, None)

    def note(self, text: str) -> None:
        """A line for the user."""
        self.show("note", text=text)

    def close(self) -> None:
        """The search is over; notes may follow."""
        self.show("end", done=self.num_done, total=self.total)

    def show(self, event: str, **fields: Any) -> None:
        """Show one event, as a line of `JsonLines` has it."""

    def remaining_s(self) -> float | None:
        """Time left, from the pace of this session; None before its first fit has ended."""
        ended = self.num_done - self.num_before
        return (self.total - self.num_done) * (time.monotonic() - self.started) / ended if ended else None

    def _count(self, result: FitResult) -> None:
        self.num_done += 1
        self.scores[result.candidate].append(result.score)


class JsonLines(Progress):
    """One JSON object per line: {"event": "start" | "epoch" | "fit" | "note" | "end", ...}."""

    @override
    def show(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)


class PlainLines(Progress):
    """One line per event, for log files and pipes."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        super().__init__(stream)
        self._last: dict[str, float] = {}

    @override
    def show(self, event: str, **fields: Any) -> None:
        if text := self._line(event, fields):
            print(text, file=self._stream, flush=True)

    def _line(self, event: str, fields: dict[str, Any]) -> str:
        if event == "start":
            return f"{self.total} fits" + (f", {self.num_before} of them done before" if self.num_before else "")
        if event == "epoch" and (now := time.monotonic()) - self._last.setdefault(fields["fit"], now) >= LINE_EVERY_S:
            self._last[fields["fit"]] = now
            return f"{fields['fit']}  {describe(fields['metrics'])}"
        if event == "fit":
            left = self.remaining_s()
            eta = f"  {duration(left)} left" if left and self.num_done < self.total else ""
            outcome = f"failed: {fields['reason']}"
            if fields["score"] is not None:
                outcome = f"score {fields['score']:.4f}  ({duration(fields['duration_s'])})"
            return f"{self.num_done}/{self.total}  {fields['fit']}  {outcome}{eta}"
        return str(fields.get("text", ""))


class LiveTable(Progress):
    """The time left, the running fits and a table of candidates, redrawn in place; what is too long for the terminal is cut."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        super().__init__(stream)
        self._console, self._ends = Console(file=stream, markup=False, emoji=False), False
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4, transient=False)

    @override
    def start(self, total: int, done: Sequence[FitResult]) -> None:
        super().start(total, done)
        self._live.start()

    @override
    def note(self, text: str) -> None:
        self._live.console.print(text, highlight=False)

    @override
    def close(self) -> None:
        self._ends = True
        self._live.stop()

    def render(self) -> RenderableType:
        """The display as it stands. Called from rich's own thread, so it works on copies."""
        left = self.remaining_s()
        lines = [Text(f"{self.num_done}/{self.total} fits" + (f", {duration(left)} left" if left else ""))]
        lines += [Text(f"  {key}  {describe(metrics)}", style="dim") for key, metrics in sorted(self.running.copy().items())]
        table = Table("candidate", "fits", "mean score", box=None, header_style="bold", pad_edge=False)
        height = None if self._ends else self._console.height  # rich lays all rows out before it cuts, at every look
        for name, planned in islice(self.planned_fits.copy().items(), height):
            ended = self.scores.get(name, [])
            scores = [score for score in ended if score is not None]
            failed = f", {len(ended) - len(scores)} failed" if len(scores) < len(ended) else ""
            table.add_row(name, f"{len(ended)}/{planned}{failed}", f"{fmean(scores):.4f}" if scores else "")
        return Group(*lines, table)


def describe(metrics: dict[str, float]) -> str:
    """`epoch 3  loss 0.1235  brier_skill 0.8123`."""
    numbers = [f"{name} {value:.4g}" for name, value in metrics.items() if name != "epoch"]
    return "  ".join([f"epoch {metrics['epoch']:.0f}", *numbers] if "epoch" in metrics else numbers)
