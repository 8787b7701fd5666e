"""Cases in a table: a row per case, with the paths of its image, or its channels, and of its masks."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from softseg_dist.data.cases import SINGLE_RATER, Case, DataSet, LabelledCase, MaskFile, folder_of, named_values, selected
from softseg_dist.data.files import IGNORE, by_rater, center_mask
from softseg_dist.data.participants import UNKNOWN
from softseg_dist.data.source_files import Spacing, is_file, part_of
from softseg_dist.errors import UserError
from softseg_dist.words import listed


class Table(DataSet):
    """A table of cases (CSV in UTF-8, separated by comma, semicolon or tab) with the columns

    - `case`, the name; `subject`, the person, and `site`, if there are such columns, else each case is a person;
    - `image`, or `image:t1`, `image:t2` and so on: the channels, in their order;
    - `GM` for the mask of a class GM, or `GM:anna`, `GM:ben` for those of raters, who need not have drawn in every case. In a
      cell `:1` or `:1+2` after the path takes values of an integer map, `[0]` the first volume of a 4-D file;
    - `ignore`, if there is such a column, for the voxels that nobody labelled; see `Files`.

    Paths are relative to the table, or absolute. Other columns are not read.

    Args:
        table: the file below the data root (or an absolute path).
        labels: the classes. One with raters and one without may be mixed, as in `Files`.
        exclude, spacing_mm: as for `Files`.

    >>> Table("cases.csv", labels=("GM",)).classes
    ('GM',)
    """

    table: str
    labels: tuple[str, ...] = Field(min_length=1)
    exclude: tuple[str, ...] = ()
    spacing_mm: Spacing = ()

    def __init__(self, table: str, **fields: Any) -> None:
        super().__init__(table=table, **fields)  # type: ignore[call-arg]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.labels

    @property
    def rater_names(self) -> None:
        """See `DataSet.rater_names`: only the table can tell."""

    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        """See `DataSet.scan`. Raises UserError if the table lacks a column, or two rows have one name."""
        path = folder_of(str(Path(self.table).parent), data_root) / Path(self.table).name
        titles, rows = read_table(path)
        columns = {name: [title for title in titles if title.partition(":")[0] == name] for name in ("image", *self.labels)}
        if lacking := [name for name in ("case", *columns) if not columns.get(name, name in titles)]:
            needed = f"a column for case, {listed([*columns])}"
            raise UserError(f"{path} needs {needed}, got no {listed(lacking)}; there are {listed(titles)}")
        if mixed := [label for label in self.labels if len(columns[label]) > 1 and label in columns[label]]:
            raise UserError(f"{path} needs a column {mixed[0]}, or one for each rater, got {listed(columns[mixed[0]])}")
        if not rows or not all(row["case"] for row in rows):
            raise UserError(f"{path} needs rows, each with the name of its case")
        try:
            return selected([self._case(path, row, columns) for row in rows], self.exclude)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def _case(self, path: Path, row: Mapping[str, str], columns: Mapping[str, Sequence[str]]) -> LabelledCase:
        name, files, problems = row["case"], dict[str, MaskFile](), list[str]()
        titles = [*(title for of_one in ("image", *self.labels) for title in columns[of_one]), *({IGNORE} & row.keys())]
        for title in (title for title in titles if row[title]):
            try:
                text, values = named_values(row[title])
            except UserError as error:
                text, values = row[title], ()
                problems.append(f"case {name}: {error} in the column {title} of {path}")
            if values and title in columns["image"]:
                problems.append(f"case {name}: only masks have values, got {row[title]!r} in the column {title} of {path}")
            files[title] = MaskFile(path.parent / text, values)
            if not is_file(part_of(files[title].path)[0]):
                problems.append(f"case {name}: there is no file {files[title].path}, as the column {title} of {path} says")
        drawn = {
            label: {title.partition(":")[2] or SINGLE_RATER: files[title] for title in columns[label] if title in files}
            for label in self.labels
        }
        problems += [f"case {name} has no {title} in {path}" for title in columns["image"] if title not in files]
        problems += [f"case {name} has no mask of {label} in {path}" for label, of_one in drawn.items() if not of_one]
        labels, lacking = by_rater(drawn, {label for label in self.labels if ":" in columns[label][0]})
        problems += [f"case {name} {sentence}" for sentence in lacking]
        center = partial(center_mask, path.parent, {}, drawn)
        images = [files[title].path for title in columns["image"] if title in files]
        subject = row.get("subject") or name
        site = "" if (site := row.get("site", "")).lower() in UNKNOWN else site
        return LabelledCase(name, images, subject, site, labels, problems, center, self.spacing_mm, files.get(IGNORE))


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Titles and rows, without blanks around the cells. Raises UserError that names the file, and the line where that is known."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        table = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=delimiter, strict=True)]
    except FileNotFoundError as error:
        raise UserError(f"there is no table {path}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"a table must be CSV in UTF-8, got {path}: {error}") from error
    titles, rows = (table or [[]])[0], [(number, cells) for number, cells in enumerate(table[1:], start=2) if any(cells)]
    if len(set(titles)) < len(titles):
        raise UserError(f"the columns of {path} must have different titles, got {listed(titles)}")
    if wrong := [f"{len(cells)} in row {number}" for number, cells in rows if len(cells) != len(titles)]:
        raise UserError(f"each row of {path} must have {len(titles)} cells, got {wrong[0]}")
    return titles, [dict(zip(titles, cells, strict=True)) for _, cells in rows]
