"""What was measured beside its targets: the table that ends `make bench`, and the tables of docs/benchmarks.md.

Run:  python tests/benchmarks/summary.py                         all that lies in out/, with its targets
      python tests/benchmarks/summary.py --keep store staple     these results, or `all`, go from out/ to results/
      python tests/benchmarks/summary.py --write                 docs/benchmarks.md shows what lies in results/

Short runs (see `record.Result`) are in the first table, unjudged; they are not kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from record import OUT, RESULTS, Headline, Machine, Result, read

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
BLOCK = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
VERDICTS = {True: "met", False: "not met", None: ""}


def main(keep: Sequence[str], write: Path | None) -> None:
    """Print the table, or do what is asked instead."""
    if keep:
        _keep(keep)
    if write is not None:
        write.write_text(written(write.read_text(), read(RESULTS)))
    if not keep and write is None:
        print(table(read(OUT)))


def table(results: Sequence[Result]) -> str:
    """One line per headline: benchmark, figure, measured, target, and whether it is met."""
    rows = [("benchmark", "figure", "measured", "target", "", "date")]
    for result in results:
        for headline in result.headlines:
            value = result.figures[headline.key]
            verdict = "short run" if result.short and headline.target else VERDICTS[headline.met(value)]
            rows.append((result.name, headline.what, headline.formatted(value), headline.target, verdict, result.date))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) for row in rows)


def written(text: str, results: Sequence[Result]) -> str:
    """`text` with the tables of `results` between its two markers. Raises ValueError if it has none."""
    if not BLOCK.search(text):
        raise ValueError(f"no lines {BEGIN} and {END}: put them where the tables shall be")
    return BLOCK.sub(lambda _: markdown(results), text)


def markdown(results: Sequence[Result]) -> str:
    """One table per machine, under a line that names it."""

    def place(result: Result) -> tuple[str, int, str]:
        return result.machine.gpu, result.machine.cores, result.machine.processor

    blocks = []
    for _, group in groupby(sorted(results, key=lambda result: (place(result), result.name)), key=place):
        of_one = list(group)
        rows = [
            f"| {headline.what} | {' | '.join(_measured(headline, result))} | `{result.command}` |"
            for result in of_one
            for headline in result.headlines
        ]
        head = f"{_named(of_one)}\n\n| what | measured | target | command |\n|---|---|---|---|\n"
        blocks.append(head + "\n".join(rows) + "\n")
    return "\n" + "\n".join(blocks) + "\n"


def _measured(headline: Headline, result: Result) -> tuple[str, str]:
    """The value, and the target with a mark if it is missed."""
    value = result.figures[headline.key]
    return headline.formatted(value), headline.target + ("; **missed**" if headline.met(value) is False else "")


def _named(results: Sequence[Result]) -> str:
    """The machine of `results`, what ran on it, and when."""
    machine = max((result.machine for result in results), key=lambda machine: machine.memory_gb)
    dates = sorted({result.date for result in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{machine.hardware}; {_versions([result.machine for result in results])}{when}:"


def _versions(machines: Sequence[Machine]) -> str:
    found = (("torch", {m.torch for m in machines}), ("Python", {m.python for m in machines}))
    named = [f"{name} {' and '.join(sorted(filter(None, versions)))}" for name, versions in found if any(versions)]
    return "".join(f"{part}, " for part in named)


def _keep(names: Sequence[str]) -> None:
    """Take results over. Raises SystemExit if one is not there, or is a short run only."""
    RESULTS.mkdir(exist_ok=True)
    found = {result.name: result for result in read(OUT) if not result.short}
    if missing := set(names) - {"all"} - found.keys():
        sys.exit(f"out/ has no complete run of {', '.join(sorted(missing))}; it has {', '.join(found) or 'none'}")
    for name in found if "all" in names else names:
        (RESULTS / found[name].file_name).write_bytes((OUT / found[name].file_name).read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE, metavar="FILE", help="default: docs/benchmarks.md")
    options = parser.parse_args()
    main(options.keep, options.write)
