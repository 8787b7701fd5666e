"""The documents: links lead somewhere, cited files exist, examples are right, and the list of modules is current."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml
from public_classes import public_classes

import softseg_dist

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from make_architecture import PACKAGE, PAGE, ROOT, first_line, written

SKIPPED = {"__pycache__", "runs", "stores", "build", "out", "results"}  # made by tools, or data
KINDS = {".md", ".py", ".pyi", ".toml", ".sh", ".yaml", ".html", ".cff", ".sbatch"}
MODULE = re.compile(r"`(\w+)\.([a-z_]+)(?:\.\w+)*(?:\(\))?`")
MADE_BY_USERS = {"study.py", "hippocampus.py"}  # names that stand for a file of the reader's
BASES = (ROOT, PACKAGE, ROOT / "tests", ROOT / "tests/unit", ROOT / "cluster")
MOST_LINES = 150  # of the README
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CITED = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w.-]+\.md)\b|(?<![\w./-])((?:[\w-]+/)+\w+\.py)\b|`(\w+\.py)`")


def texts() -> list[Path]:
    """Every text of the repository, without what tools leave behind."""
    found = []
    for folder, inside, names in os.walk(ROOT):
        inside[:] = [name for name in inside if not _is_skipped(name)]
        paths = [Path(folder, name) for name in names]
        found += [path for path in paths if path.suffix in KINDS or path.name in ("Makefile", "run")]
    return sorted(found)


def _is_skipped(folder: str) -> bool:
    return folder in SKIPPED or folder.endswith(".egg-info") or (folder[0] == "." and folder != ".ci")


TEXTS = texts()
PAGES = [path for path in TEXTS if path.suffix == ".md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Link(NamedTuple):
    page: Path
    target: str


def links() -> list[Link]:
    return [Link(page, target) for page in PAGES for target in LINK.findall(FENCE.sub("", page.read_text()))]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def problem_of(link: Link) -> str | None:
    parts = urlsplit(link.target)
    if parts.scheme:
        known = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return None if known else "is no address"
    target = (link.page.parent / parts.path).resolve() if parts.path else link.page
    if not target.exists():
        return "leads to no file"
    if not target.is_relative_to(ROOT):
        return "leads out of the repository"
    return f"{target.name} has no such heading" if parts.fragment and parts.fragment not in anchors(target) else None


def test_every_link_leads_to_a_file_and_a_heading_that_exist() -> None:
    problems = {f"{name_of(link.page)}: {link.target}": problem_of(link) for link in links()}
    assert len(problems) > 20
    assert not {link: problem for link, problem in problems.items() if problem}


@pytest.mark.parametrize("target", ["nowhere.md", "../../elsewhere", "README.md#nothing", "http://example.org"])
def test_a_link_that_leads_nowhere_is_found(target: str) -> None:
    assert problem_of(Link(ROOT / "README.md", target))


def test_every_cited_file_exists() -> None:
    missing = {name_of(path): missing_citations(path.read_text(encoding="utf-8"), path) for path in TEXTS if path != Path(__file__)}
    assert len(missing) > 200
    assert not {path: names for path, names in missing.items() if names}


def missing_citations(text: str, path: Path) -> list[str]:
    """The files that a text names by `name.md`, `folder/name.py` or, in backticks, `name.py`, and that are not there."""
    cited = {"".join(groups) for groups in CITED.findall(text)} - MADE_BY_USERS
    return sorted(name for name in cited if not _exists(name, path))


def _exists(name: str, path: Path) -> bool:
    """A name alone may be that of any text; a path starts at one of `BASES`, unless its folder is none of ours."""
    if name.split("/")[0] in SKIPPED:  # an example of what a run leaves
        return True
    if "/" in name:
        bases = [base for base in (*BASES, path.parent) if (base / name).parents[name.count("/") - 1].exists()]
        return not bases or any((base / name).exists() for base in bases)
    return any(text.name == name for text in TEXTS)


def test_every_cited_module_exists() -> None:
    modules = {folder.name: {module.stem for module in folder.glob("[a-z]*")} for folder in PACKAGE.iterdir() if folder.is_dir()}
    texts = [path for path in TEXTS if path.suffix in (".py", ".md")]
    cited = [(name_of(path), *found) for path in texts for found in MODULE.findall(path.read_text(encoding="utf-8"))]
    assert sum(package in modules for _, package, _ in cited) > 10
    assert not [found for found in cited if found[1] in modules and found[2] not in modules[found[1]]]


def test_a_citation_of_a_missing_file_is_found() -> None:
    text = "As in NOTHING.md, `nowhere.py`, tests/unit/test_nothing.py, README.md, `study.py` and runs/mine/mine.py."
    assert missing_citations(text, ROOT / "README.md") == ["NOTHING.md", "nowhere.py", "tests/unit/test_nothing.py"]


def test_the_list_of_modules_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert written(text) == text, "run python docs/make_architecture.py"


def test_every_module_says_in_its_first_line_what_it_is() -> None:
    lines = {name_of(path): first_line(path) for path in PACKAGE.rglob("*.py")}
    broken = {path: line for path, line in lines.items() if not re.fullmatch(r".{10,140}[.:;?)]", line)}
    assert not broken, "a docstring needs a whole sentence as first line"


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= MOST_LINES


def test_every_data_set_of_the_readme_is_one() -> None:
    table = README.partition("| your data |")[2].partition("\n\n")[0]
    lines = re.findall(r"`([A-Z]\w+\([^`]*\))`", table)
    read = [eval(line, {name: getattr(softseg_dist, name) for name in softseg_dist.__all__}) for line in lines]
    assert {type(data) for data in read} == public_classes(softseg_dist.DataSet)
    assert all(data.classes for data in read)


@pytest.mark.data
def test_the_real_data_sets_of_the_readme_have_cases(real_data: Path) -> None:
    lines = re.findall(r"`(Bids\(\"(?:gm_challenge|hippocampus_msd)\"[^`]*\))`", README)
    assert len(lines) == 2
    for line in lines:
        assert len(eval(line, {"Bids": softseg_dist.Bids}).scan(real_data)) >= 8


def test_the_readme_lists_every_loss_activation_augmentation_and_smoothing() -> None:
    table = README.partition("## What varies")[2].partition("\n## ")[0]
    listed = set(re.findall(r"[A-Za-z0-9]+", table))
    bases = {"Activation", "Loss", "Smoothing", "Network", "Uncertainty"}
    kinds = ("activations", "losses", "augmentation", "smoothing", "networks", "patches", "sampling")
    public = {name for kind in kinds for name in softseg_dist.PUBLIC.get(f"softseg_dist.numerics.{kind}", ())}
    assert public - bases <= listed


def test_the_citation_file_has_what_a_citation_needs() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert paper["doi"] == "10.1016/j.media.2021.102038"
    assert paper["doi"] in README
