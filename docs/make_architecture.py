"""Write the list of modules in docs/architecture.md, from the first line of each module's docstring.

Run:  python docs/make_architecture.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "softseg_dist"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: begin -->", "<!-- modules: end -->"
BLOCK = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)


def written(text: str) -> str:
    """`text` with the list between its two markers. Raises ValueError if it has none."""
    if not BLOCK.search(text):
        raise ValueError(f"no lines {BEGIN} and {END}: put them where the list shall be")
    return BLOCK.sub(lambda _: listing(), text)


def listing() -> str:
    """One part per package, the top level first, and one line per module."""
    folders = [PACKAGE, *sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE})]
    return "\n" + "\n".join(map(_part, folders)) + "\n"


def _part(folder: Path) -> str:
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    lines = [f"- `{path.name}`: {first_line(path)}" for path in modules]
    return "\n".join([f"**{folder.relative_to(ROOT)}/**: {first_line(folder / '__init__.py')}", "", *lines, ""])


def first_line(path: Path) -> str:
    """Of the docstring of a module; "" without one. An asterisk is no emphasis there."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
