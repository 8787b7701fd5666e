"""The documents: links lead somewhere, cited files exist, examples are right, and the list of modules is current."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml

import softseg_dist

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from make_architecture import PACKAGE, PAGE, ROOT, first_line, written

SKIPPED = {"__pycache__", "runs", "stores", "build", "out", "results"}  # made by tools, or data
KINDS = {".md", ".py", ".pyi", ".toml", ".sh", ".yaml", ".html", ".cff", ".sbatch"}
MODULE = re.compile(r"`(\w+)\.([a-z_]+)(?:\.\w+)*(?:\(\))?`")
MADE_BY_USERS = {"study.py"}  # names that stand for a file of the reader's
BASES = (ROOT, PACKAGE, ROOT / "tests", ROOT / "tests/unit", ROOT / "cluster")
MOST_LINES = 150  # of the README
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CITED = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w.-]+\.md)\b|(?<![\w./-])((?:[\w-]+/)+\w+\.py)\b|`(\w+\.py)`")


def texts() -> list[Path]:
    """Every text of the repository, without what tools leave behind."""
    found = [path for path in ROOT.rglob("*") if path.suffix in KINDS or path.name in ("Makefile", "run")]
    return sorted(path for path in found if path.is_file() and not _is_skipped(path.relative_to(ROOT)))


def _is_skipped(path: Path) -> bool:
    folders = path.parts[:-1]
    return any(part in SKIPPED or part.endswith(".egg-info") or (part[0] == "." and part != ".ci") for part in folders)


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


@pytest.mark.parametrize("link", links(), ids=lambda link: f"{name_of(link.page)}:{link.target}")
def test_a_link_leads_to_a_file_and_a_heading_that_exist(link: Link) -> None:
    parts = urlsplit(link.target)
    if parts.scheme:
        assert parts.scheme == "https"
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link.target
        return
    target = (link.page.parent / parts.path).resolve() if parts.path else link.page
    assert target.exists(), f"{link.target} leads to no file"
    assert target.is_relative_to(ROOT), f"{link.target} leads out of the repository"
    assert not parts.fragment or parts.fragment in anchors(target), f"{target.name} has no heading for #{parts.fragment}"


@pytest.mark.parametrize("path", [path for path in TEXTS if path != Path(__file__)], ids=name_of)
def test_a_cited_file_exists(path: Path) -> None:
    assert not missing_citations(path.read_text(encoding="utf-8"), path)


def missing_citations(text: str, path: Path) -> list[str]:
    """The files that a text names by `name.md`, `folder/name.py` or, in backticks, `name.py`, and that are not there."""
    cited = {"".join(groups) for groups in CITED.findall(text)} - MADE_BY_USERS
    return sorted(name for name in cited if not _exists(name, path))


def _exists(name: str, path: Path) -> bool:
    """A name alone may be that of any text; a path starts at one of `BASES`, unless its folder is none of ours."""
    if "/" in name:
        bases = [base for base in (*BASES, path.parent) if (base / name).parents[name.count("/") - 1].exists()]
        return not bases or any((base / name).exists() for base in bases)
    return any(text.name == name for text in TEXTS)


@pytest.mark.parametrize("path", [path for path in TEXTS if path.suffix in (".py", ".md")], ids=name_of)
def test_a_cited_module_exists(path: Path) -> None:
    cited = set(MODULE.findall(path.read_text(encoding="utf-8")))
    packages = {package: {module.stem for module in (PACKAGE / package).glob("[a-z]*")} for package, _ in cited}
    missing = [(package, name) for package, name in cited if packages[package] and name not in packages[package]]
    assert not missing


def test_a_citation_of_a_missing_file_is_found() -> None:
    text = "As in NOTHING.md, `nowhere.py`, tests/unit/test_nothing.py, README.md and `study.py`."
    assert missing_citations(text, ROOT / "README.md") == ["NOTHING.md", "nowhere.py", "tests/unit/test_nothing.py"]


def test_the_list_of_modules_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert written(text) == text, "run python docs/make_architecture.py"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_a_module_says_in_its_first_line_what_it_is(path: Path) -> None:
    assert re.fullmatch(r".{10,140}[.:;?)]", first_line(path)), "a docstring needs a whole sentence as first line"


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= MOST_LINES


def test_every_data_set_of_the_readme_is_one() -> None:
    table = README.partition("| your data |")[2].partition("\n\n")[0]
    lines = re.findall(r"`((?:Bids|Phantom)\([^`]*\))`", table)
    assert len(lines) >= 6
    for line in lines:
        assert eval(line, {name: getattr(softseg_dist, name) for name in ("Bids", "Phantom")}).classes


@pytest.mark.data
def test_the_real_data_sets_of_the_readme_have_cases(real_data: Path) -> None:
    lines = re.findall(r"`(Bids\(\"(?:gm_challenge|hippocampus_msd)\"[^`]*\))`", README)
    assert len(lines) == 3
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
