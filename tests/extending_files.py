"""The files that docs/extending.md shows, by name."""

from __future__ import annotations

import re
from pathlib import Path

import softseg_dist

PAGE = (Path(softseg_dist.__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
FILES = {name: f"# file: {name}\n{text}" for name, text in re.findall(r"```python\n# file: (\S+)\n(.*?)```", PAGE, re.DOTALL)}
