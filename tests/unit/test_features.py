"""No feature disappears unnoticed, and none appears unlisted: tests/features.txt against the code as it is.

python tests/unit/test_features.py    # adds what is new to tests/features.txt; it removes nothing

A feature that is gone keeps the test red until CHANGELOG.md names it in backticks under a heading "Removed", with the reason.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a program it has tests/unit alone on its path
from features import CHANGELOG, LIST, SECTION, listed, removed

import softseg_dist
from softseg_dist import Frozen
from softseg_dist.cli import main
from softseg_dist.cli.main import app
from softseg_dist.numerics.labels import FUSIONS, check_fusion
from softseg_dist.numerics.metrics import TABLE

ROOT = Path(__file__).parents[2]
PACKAGE = Path(softseg_dist.__file__).parent


def commands() -> Iterator[str]:
    """Commands, their arguments and options, and the values of those that take one of a few: `softseg predict --out`."""
    root = typer.main.get_command(app)
    yield from (f"softseg {option}" for parameter in root.params for option in parameter.opts)
    for name, command in root.commands.items():
        yield f"softseg {name}"
        annotations = get_type_hints(command.callback)
        for parameter in command.params:
            options = [option for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("-")]
            for option in options or [parameter.metavar or parameter.name.upper()]:
                yield f"softseg {name} {option}"
                values = literals(annotations.get(parameter.name))
                yield from (f"softseg {name} {option} {value}" for value in values)


def study_options() -> Iterator[str]:
    """Fields of the public objects, and the values of those that take one of a few: `Optim.schedule="cosine"`."""
    for name in softseg_dist.__all__:
        cls = getattr(softseg_dist, name)
        if not inspect.isclass(cls) or not issubclass(cls, Frozen):
            continue
        for field, info in cls.model_fields.items():
            yield f"{name}.{field}"
            yield from (f"{name}.{field}={value!r}".replace("'", '"') for value in literals(info.annotation))
    yield from (f'Recipe.fusion="{check_fusion(fusion)}"' for fusion in (*FUSIONS, "rater:<name>"))
    yield from (f'Study.objective="{objective}"' for objective in TABLE if TABLE[objective].may_lead)


def literals(annotation: Any) -> Iterator[Any]:
    """The values of every Literal within a type."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from literals(part)


def make() -> Iterator[str]:
    """Targets of the Makefile, variables that it reads or that its comments name: `make test`, `make PYTHON=`."""
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)", text, re.MULTILINE)
    assert targets is not None
    yield from (f"make {target}" for target in targets[1].split())
    variables = [*re.findall(r"^([A-Z]+) *\?=", text, re.MULTILINE), *re.findall(r"make .* ([A-Z]+)=", text)]
    yield from (f"make {variable}=" for variable in variables)


def clusters() -> Iterator[str]:
    """Files under cluster/."""
    yield from (str(path.relative_to(ROOT)) for path in (ROOT / "cluster").rglob("*") if path.is_file())


def documents() -> str:
    """The package, the Makefile and the documentation as one text."""
    pages = [
        ROOT / "README.md",
        ROOT / "cluster/README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").glob("*.md"),
        *PACKAGE.rglob("*.py"),
    ]
    return "\n".join(page.read_text() for page in pages)


COMPLETE = {  # sections that the code can list
    "commands": commands,
    "public names": lambda: iter(softseg_dist.__all__),
    "study options": study_options,
    "make": make,
    "cluster": clusters,
}
SECTIONS = (*COMPLETE, "files", "exit codes", "environment")


def present() -> dict[str, set[str]]:
    """The features of the code by section; of the last three sections those of the list that the code or its documents name."""
    found = {section: set(features()) for section, features in COMPLETE.items()}
    known, text = listed(), documents()
    found["files"] = {name for name in known["files"] if all(part in text for part in fixed_parts(name))}
    found["exit codes"] = {code for code in known["exit codes"] if code in str(main.__doc__)}
    found["environment"] = {name for name in known["environment"] if re.search(rf"\b{name}\b", text)}
    return found


def fixed_parts(name: str) -> list[str]:
    """What a file's name has beside placeholders and folders: `.arrow` of `stores/<fingerprint>.arrow`, and `stores`."""
    return [part for part in re.split(r"/|<.*?>", name) if part]


@pytest.fixture(scope="module")
def code() -> dict[str, set[str]]:
    return present()


@pytest.mark.parametrize("section", SECTIONS)
def test_no_feature_is_gone_that_the_changelog_does_not_name(section: str, code: dict[str, set[str]]) -> None:
    gone = set(listed()[section]) - code[section] - removed(CHANGELOG.read_text())
    assert not gone, 'name them in backticks in CHANGELOG.md, under "### Removed", with the reason'


@pytest.mark.parametrize("section", SECTIONS)
def test_every_feature_is_listed(section: str, code: dict[str, set[str]]) -> None:
    new = code[section] - set(listed()[section])
    assert not new, "python tests/unit/test_features.py adds them to tests/features.txt"


def test_only_what_stands_under_removed_counts_as_removed() -> None:
    text = "# Changelog\n## 2\n### Removed\n- `make old`: unused\n### Added\n- `make new`\n## 1\n### Removed\n- `Old.field`\n"
    assert removed(text) == {"make old", "Old.field"}


def test_no_feature_is_listed_twice() -> None:
    names = [name for section in listed().values() for name in section]
    assert sorted(names) == sorted(set(names))


def add_new() -> None:
    """Write what is new in the code into the list, each section in alphabetical order."""
    lines, section, code = [], "", present()
    groups: dict[str, list[str]] = {"": lines}
    for line in LIST.read_text().splitlines():
        if heading := SECTION.fullmatch(line):
            groups[section := heading[1]] = []
        elif line:
            groups[section].append(line)
    for name, known in groups.items():
        have = {line.partition("  ")[0] for line in known}
        new = code.get(name, set()) - have
        groups[name] = sorted([*known, *new]) if name in COMPLETE else [*known, *sorted(new)]
    blocks = ["\n".join(([f"[{name}]"] if name else []) + known) for name, known in groups.items()]
    LIST.write_text("\n\n".join(blocks) + "\n")


if __name__ == "__main__":
    add_new()
