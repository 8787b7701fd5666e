"""participants.tsv: who took part, and at which site. Read whatever program saved it; what cannot be read is said."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from softseg_dist.data.source_files import check_regular, nfc, pointer
from softseg_dist.errors import UserError
from softseg_dist.frozen import grouped
from softseg_dist.words import count, listed

TITLES = ("participant_id", "participant", "subject_id", "subject", "id")  # of the column of persons: the first that there is
UNKNOWN = ("", "n/a", "na", "nan")  # sites that are not known


def read_participants(path: Path, column: str, persons: Sequence[str], *, expected: bool) -> tuple[dict[str, str], list[str]]:
    """Folder of a person (`sub-01`) -> site, where a table names it; and what should be looked at in the table, in sentences.

    Args:
        path: in UTF-8, UTF-16 or Latin-1; columns are separated by tabs, commas, semicolons or blanks.
        column: title of the column of sites; upper and lower case do not matter.
        persons: the names of their folders; the table may leave out "sub-" and leading zeros.
        expected: whether a table without this column is worth a warning.

    Nothing is raised: without a table, or with one that cannot be read, no site is known.
    """
    if not path.exists() and not path.is_symlink():
        return {}, []
    try:
        check_regular(path)
        content = path.read_bytes()
    except (UserError, OSError) as error:
        return {}, [f"no site is known: {error}"]
    if what := pointer(content):
        return {}, [f"no site is known: {path} is {what}"]
    table = _table(nfc(_decoded(content)))
    titles = [_title(cell) for cell in table[0]] if table else []
    who = next((titles.index(title) for title in TITLES if title in titles), None)
    if who is None:
        begins = "is one of a person" if table and _folders(persons, table[0]) else f"is {' '.join(titles)!r}"
        return {}, [f"no site is known: {path.name} needs the titles participant_id and {column}, but its first line {begins}"]
    where = titles.index(_title(column)) if _title(column) in titles else None
    padded = [[*row, *("" for _ in titles)] for row in table[1:]]
    rows = [(row[who], "" if where is None else row[where]) for row in padded]
    sites, warnings = _of_rows(path.name, rows, persons)
    if where is None:
        warnings += [f"{path.name} has no column {column!r} of sites; there are {listed(titles)}"] if expected else []
    elif without := [person for person in persons if person not in sites]:
        known = f"sites for {len(persons) - len(without)} of {count(len(persons), 'person')}"
        warnings.append(f"{path.name} has {known}; none for {listed(without)}")
    return sites, warnings


def _of_rows(name: str, rows: Sequence[tuple[str, str]], persons: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Folder -> site, and what is odd in rows of person and site."""
    folders = _folders(persons, [person for person, _ in rows])
    known = ((folders[person], site) for person, site in rows if person in folders and site.lower() not in UNKNOWN)
    found = grouped(dict.fromkeys(known))
    sites = {folder: of_one[0] for folder, of_one in found.items()}
    several = {folder: " and ".join(of_one) for folder, of_one in found.items() if len(of_one) > 1}
    warnings = [f"{name} gives {folder} the sites {of_one}; the first one counts" for folder, of_one in several.items()]
    if nowhere := dict.fromkeys(person for person, _ in rows if person and person not in folders):
        warnings.append(f"{name} names {listed([*nowhere])}: there is no such folder")
    if nameless := sum(not person for person, _ in rows):
        warnings.append(f"{name} has {count(nameless, 'row')} without a person")
    return sites, warnings


def _folders(persons: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Name in a table -> folder: as it is, with "sub-", or but for case and leading zeros where that means one person."""
    known, names = set(persons), [*names]
    found = {name: folder for name in names for folder in (name, f"sub-{name}") if folder in known}
    loosely = grouped((_bare(person), person) for person in sorted(known - set(found.values())))
    return found | {name: loosely[_bare(name)][0] for name in names if name not in found and len(loosely[_bare(name)]) == 1}


def _bare(name: str) -> str:
    return re.sub(r"^(sub[-_]?)?0*", "", name.casefold())


def _title(cell: str) -> str:
    return nfc(cell).strip().lower().replace(" ", "_")


def _table(text: str) -> list[list[str]]:
    """Rows of cells. Each line is read alone, so that a stray quote costs no other row."""
    lines = [line for line in text.splitlines() if line.strip()]
    separator = max("\t,;", key=lines[0].count) if lines else "\t"
    return [[cell.strip(" \"'") for cell in _cells(line, separator if separator in lines[0] else "")] for line in lines]


def _cells(line: str, separator: str) -> list[str]:
    if not separator:
        return line.split()
    is_quoted = separator != "\t" and line.count('"') % 2 == 0  # tables of tabs have no quotes
    try:
        return next(csv.reader([line], delimiter=separator, quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE))
    except csv.Error:  # a cell of more than 131,072 characters
        return line.split(separator)


def _decoded(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace")
    if b"\0" in content[:64]:  # UTF-16 without a mark: Latin letters have a zero byte before or behind
        return content.decode("utf-16-be" if content[0] == 0 else "utf-16-le", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
