"""participants.tsv: sites are found whatever program saved the table, and what is not found is said."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from softseg_dist.data.participants import read_participants

PERSONS = ("sub-01", "sub-02", "sub-03")
TABLE = "participant_id\tage\tsite\nsub-01\t30\tUCL\nsub-02\t31\tZürich\nsub-03\tn/a\tUCL\n"
SITES = {"sub-01": "UCL", "sub-02": "Zürich", "sub-03": "UCL"}


def read(tmp_path: Path, content: str | bytes, column: str = "site", expected: bool = False) -> tuple[dict[str, str], list[str]]:
    path = tmp_path / "participants.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_participants(path, column, PERSONS, expected=expected)


@pytest.mark.parametrize(
    "content",
    [
        TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        TABLE.encode("utf-8-sig"),
        TABLE.encode("utf-16"),
        TABLE.encode("utf-16-le"),
        TABLE.encode("utf-16-be"),
        TABLE.encode("latin-1"),
        unicodedata.normalize("NFD", TABLE),
        TABLE.replace("\t", ","),
        TABLE.replace("\t", ";"),
        TABLE.replace("\t", "  "),
        TABLE.replace("\t", ",").replace("30", '"30, or so"'),
        TABLE.replace("sub-", ""),
        TABLE.replace("sub-0", ""),
        TABLE.replace("sub-", "SUB-"),
        TABLE.replace("participant_id", "Participant ID").replace("site", " SITE "),
        TABLE.replace("participant_id", "subject"),
        TABLE.replace("sub-01", '"sub-01'),
        TABLE.replace("30", '"30'),
        TABLE.replace("30", '"30').replace("\t", ","),
        TABLE.replace("sub-02\t", '"sub-02"\t').replace("UCL", '"UCL"'),
        TABLE.replace("UCL", '"UCL', 1),
        TABLE + "\n\n",
        TABLE + TABLE.partition("\n")[2],
    ],
    ids=lambda content: repr(content)[:60],
)
def test_sites_are_found_whatever_program_saved_the_table(tmp_path: Path, content: str | bytes) -> None:
    assert read(tmp_path, content) == (SITES, [])


@pytest.mark.parametrize(
    ("content", "sites", "warning"),
    [
        (TABLE.replace("Zürich", "n/a"), {"sub-01": "UCL", "sub-03": "UCL"}, "has sites for 2 of 3 persons; none for sub-02"),
        (TABLE.replace("\t31\tZürich", ""), {"sub-01": "UCL", "sub-03": "UCL"}, "has sites for 2 of 3 persons; none for sub-02"),
        (TABLE.replace("sub-03\tn/a\tUCL\n", ""), {"sub-01": "UCL", "sub-02": "Zürich"}, "none for sub-03"),
        (TABLE.replace("\n", "\nsub-09\t1\tA\n", 1), SITES, "participants.tsv names sub-09: there is no such folder"),
        (TABLE + "sub-01\t30\tBerlin\n", SITES, "gives sub-01 the sites UCL and Berlin; the first one counts"),
        (TABLE + "\t30\tBerlin\n", SITES, "has 1 row without a person"),
        (TABLE.partition("\n")[2], {}, "its first line is one of a person"),
        (TABLE.replace("participant_id", "who"), {}, "participant_id and site, but its first line is 'who age site'"),
        ("", {}, "its first line is ''"),
        (TABLE.replace("sub-02\t", "sub-02,"), {"sub-01": "UCL", "sub-03": "UCL"}, "sites for 2 of 3 persons"),
        ("/annex/objects/MD5E-s1--0.tsv\n", {}, "a pointer of git-annex"),
        (bytes(range(256)), {}, "no site is known"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_not_found_is_said(tmp_path: Path, content: str | bytes, sites: dict[str, str], warning: str) -> None:
    found, warnings = read(tmp_path, content)
    assert found == sites
    assert any(warning in text for text in warnings), warnings
    assert all("\n" not in text for text in warnings)


def test_a_column_of_sites_is_missed_only_where_it_was_named(tmp_path: Path) -> None:
    assert read(tmp_path, TABLE.replace("site", "hospital")) == ({}, [])
    assert read(tmp_path, TABLE.replace("site", "hospital"), "Hospital") == (SITES, [])
    (warning,) = read(tmp_path, TABLE, "centre", expected=True)[1]
    assert warning == "participants.tsv has no column 'centre' of sites; there are participant_id, age, site"


def test_a_short_name_means_a_person_only_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text("participant_id\tsite\n1\tA\nsub-2\tB\n02\tC\n")
    sites, warnings = read_participants(path, "site", ("sub-1", "sub-01", "sub-02"), expected=False)
    assert sites == {"sub-1": "A", "sub-02": "C"}
    assert warnings[0] == "participants.tsv names sub-2: there is no such folder"
    assert warnings[1] == "participants.tsv has sites for 2 of 3 persons; none for sub-01"


@pytest.mark.timeout(20)
def test_without_a_table_no_site_is_known_and_what_is_none_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    assert read_participants(path, "site", PERSONS, expected=True) == ({}, [])
    path.symlink_to(tmp_path / "nowhere")
    assert "the link leads nowhere" in read_participants(path, "site", PERSONS, expected=False)[1][0]
    path.unlink()
    os.mkfifo(path)
    assert "got a pipe" in read_participants(path, "site", PERSONS, expected=False)[1][0]
