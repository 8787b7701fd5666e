"""The list of features, tests/features.txt, as unit and engine tests read it."""

from __future__ import annotations

import re
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
SECTION = re.compile(r"\[(.+)\]")
REMOVED = re.compile(r"^### Removed$(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)


def listed() -> dict[str, list[str]]:
    """The features of tests/features.txt by section. What follows two spaces in a line is its description."""
    sections: dict[str, list[str]] = {}
    for line in LIST.read_text().splitlines():
        if heading := SECTION.fullmatch(line):
            sections[heading[1]] = section = []
        elif line and not line.startswith("#"):
            section.append(line.partition("  ")[0])
    return sections


def removed(changelog: str) -> set[str]:
    """The features that a changelog names in backticks under "Removed"."""
    return {name for text in REMOVED.findall(changelog) for name in re.findall(r"`([^`\n]+)`", text)}


def listed_files() -> dict[str, bool]:
    """Listed files that were not removed. True: every run leaves them; a description that begins with "if" names a condition."""
    lines = [line.partition("  ") for line in LIST.read_text().splitlines()]
    descriptions = {name: text for name, _, text in lines}
    names = [name for name in listed()["files"] if name not in removed(CHANGELOG.read_text())]
    return {name: not descriptions[name].startswith("if ") for name in names}


def pattern_of(name: str) -> re.Pattern[str]:
    """What a listed name stands for: `<fit>` is any part of a file's name, `<files>` any path.

    >>> bool(pattern_of("runs/<study>/<study>.py").fullmatch("runs/tiny/tiny.py"))
    True
    """
    parts = re.split(r"(<.*?>)", name)
    return re.compile("".join({"<files>": ".+"}.get(p, "[^/]+") if p.startswith("<") else re.escape(p) for p in parts))
