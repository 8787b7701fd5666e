"""How values are written for people: numbers, intervals, p-values, times, sizes, lists and verdicts; and commands for a shell."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

ALPHA = 0.05
MINUS = "\u2212"
SHOWN = {"better": "is better than", "worse": "is worse than", "not shown": "was not shown to differ from"}  # by `verdict`


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """`0.842`, with a true minus sign; what rounds to zero has no sign; an en dash for what does not exist.

    >>> number(0.8417), number(-0.002, signed=True), number(-0.0001, signed=True), number(float("nan"))
    ('0.842', '−0.002', '0.000', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else MINUS if value < 0 else "+" if signed else ""
    return sign + text


def interval(low: float, high: float, digits: int = 3, signed: bool = False) -> str:
    """`0.830 to 0.854`, or `not estimable`."""
    known = math.isfinite(low) and math.isfinite(high)
    return f"{number(low, digits, signed)} to {number(high, digits, signed)}" if known else "not estimable"


def p_value(p: float) -> str:
    """`0.032`, `<0.001`, or an en dash: three decimals are all that a p-value deserves."""
    return "<0.001" if p < 0.001 else number(p)


def p_clause(p: float, name: str = "p") -> str:
    """`p = 0.032` or `p < 0.001`."""
    return f"{name} < 0.001" if p < 0.001 else f"{name} = {p_value(p)}"


def interval_clause(low: float, high: float, signed: bool = False) -> str:
    """`95 % interval 0.830 to 0.854`."""
    return f"95 % interval {interval(low, high, signed=signed)}"


def percent(share: float | None, digits: int = 1, signed: bool = False) -> str:
    """`+3.2 %`, or an en dash."""
    return "–" if share is None or not math.isfinite(share) else f"{number(100 * share, digits, signed)} %"


def count(num: int, noun: str) -> str:
    """`1 split`, `6 splits`."""
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def dimensions(numbers: Sequence[float]) -> str:
    """`48 x 48 x 8`, `0.5 x 0.5`: sizes along axes, with four digits at most where they are not whole."""
    return " x ".join(f"{n:.4g}" if isinstance(n, float) else str(n) for n in numbers)


def listed(names: Sequence[object], most: int = 8, separator: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` names, and how many more there are."""
    more = len(names) - most
    return separator.join(map(str, names[:most])) + (f" and {more} more" if more > 0 else "")


def moment(iso: str) -> str:
    """`2026-11-20 10:04`: a time of the ledger, which is UTC, to the minute.

    >>> moment("2026-11-20T10:04:31+00:00")
    '2026-11-20 10:04'
    """
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M")


def capital(text: str) -> str:
    """The text with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def verdict(mean: float, p_holm: float, sign: int) -> str:
    """What a comparison shows at the 5 % level: "better", "worse" or "not shown" to differ."""
    if not p_holm < ALPHA:  # also when there is no p
        return "not shown"
    return "better" if sign * mean > 0 else "worse"


def duration(seconds: float) -> str:
    """`0.3 s`, `45 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def command(*words: object, **options: object) -> str:
    """A command line as a shell takes it; see `arguments`.

    >>> command("softseg", "run", "my study.py", data_root=None, max_wait=0.5, debug=True)
    "softseg run 'my study.py' --max-wait 0.5 --debug"
    """
    return shlex.join([*map(str, words), *arguments(options)])


def next_command(*words: object, program: str = "softseg", **options: object) -> str:
    """A `command` to run next, here: its program by name if the shell finds that of this environment, or else by path."""
    here, found = Path(sys.executable).parent / program, shutil.which(program)
    by_name = not here.exists() or (found is not None and Path(found).absolute() == here.absolute())
    return command(program if by_name else os.path.relpath(here), *words, **options)


def arguments(options: Mapping[str, object]) -> list[str]:
    """Options of a command line: `max_wait=0.5` is `--max-wait 0.5`, True has no value, None and False are left out."""
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not None and value is not False}
    return [text for name, value in given.items() for text in ([name] if value is True else [name, str(value)])]
