"""Seeded damage to files: to bytes, to text, to values of JSON, to fields of a NIfTI header, and to what lies at a path."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from softseg_dist.sealed import FIELD, ITEMS, sealed_json

DEEP = 3000  # levels: more than Python's stack has
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "-0.0", "1e308", "1e999", "9" * 400, "2147483648", "0x10", "1_000", "true", "null", "")
TEXTS = (
    "\0",
    "\ufeff",
    "\u202e",
    "\ud7ff",
    '"',
    "'",
    "{",
    "}",
    "[",
    ",",
    ";",
    "\t",
    "\r",
    "\n\n",
    "=1+1",
    "../../x",
    "%s",
    "\\",
    "é" * 9,
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "x" * 9000, "../../x", "\0", [], {}),
    *([None], {"type": "x"}, [[]], "[red]", -0.5, "nan"),
)
INTEGERS = (0, 1, -1, 2, 7, 255, 32767, -32768, 16384)
FLOATS = (0.0, -1.0, 1e-30, 1e30, 3e38, float("nan"), float("inf"), -float("inf"), 0.5, 353.0, 2.0**24, 2.0**31)
HEADER = {  # offset -> format of a field of NIfTI-1
    **{40 + 2 * axis: "h" for axis in range(8)},  # dim
    **{76 + 4 * axis: "f" for axis in range(8)},  # pixdim
    **dict.fromkeys((70, 72, 252, 254), "h"),  # datatype, bitpix, qform_code, sform_code
    **dict.fromkeys((108, 112, 116), "f"),  # vox_offset, scl_slope, scl_inter
    **{256 + 4 * number: "f" for number in range(18)},  # quaternion, offsets, srow
    **dict.fromkeys((0, 344), "i"),  # sizeof_hdr, magic
    123: "b",  # units
}


def bytes_of(content: bytes, draw: Random) -> tuple[bytes, str]:
    """Damaged bytes, and what was done to them."""
    at, to = sorted((draw.randint(0, len(content)), draw.randint(0, len(content))))
    what = draw.choice(("bits", "cut", "insert", "delete", "zero", "repeat", "append", "empty", "noise", "twice"))
    if what == "bits":
        changed = bytearray(content or b"\0")
        for _ in range(draw.choice((1, 1, 1, 8))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed), what
    return {
        "cut": content[:at],
        "insert": content[:at] + draw.randbytes(draw.randint(1, 40)) + content[at:],
        "delete": content[:at] + content[to:],
        "zero": content[:at] + bytes(to - at) + content[to:],
        "repeat": content[:to] + content[at:],
        "append": content + draw.randbytes(9),
        "empty": b"",
        "noise": draw.randbytes(draw.randint(1, 2000)),
        "twice": content * 2,
    }[what], what


def text_of(content: bytes, draw: Random) -> tuple[bytes, str]:
    """Damaged text, such as a table or a study file."""
    text = content.decode(errors="replace")
    lines, at = text.split("\n"), draw.randint(0, len(text))
    line = draw.randrange(len(lines))
    what = draw.choice(
        ("number", "number", "insert", "word", "line out", "line twice", "swap", "deep", "long", "utf-16", "latin-1")
    )
    numbers, words = list(re.finditer(r"-?\d+(\.\d+)?", text)), list(re.finditer(r"\w+", text))
    if what in ("number", "word") and (found := numbers if what == "number" else words):
        one = draw.choice(found)
        put = draw.choice(NUMBERS) if what == "number" else draw.choice(words).group()
        text = text[: one.start()] + put + text[one.end() :]
    elif what == "line out":
        text = "\n".join(lines[:line] + lines[line + 1 :])
    elif what == "line twice":
        text = "\n".join(lines[: line + 1] + lines[line:])
    elif what == "swap":
        text = "\n".join(draw.sample(lines, len(lines)))
    elif what in ("utf-16", "latin-1"):
        return (text + "é").encode(what, errors="replace"), what
    else:
        put = {"deep": draw.choice("[({-") * DEEP, "long": "x" * 200_000}.get(what) or draw.choice(TEXTS)
        text = text[:at] + put + text[at:]
    return text.encode(errors="replace"), what


def json_of(content: bytes, draw: Random, reseal: str | None = None) -> tuple[bytes, str]:
    """JSON in which one value is another, or is missing, or a list holds it twice; sealed again with `reseal` if it is given."""
    value = json.loads(content)
    if isinstance(value, dict):
        value.pop(FIELD, None)
    spots = [*_spots(value)]
    holder, key = draw.choice(spots)
    what = draw.choice(("value", "value", "value", "value", "out", "twice", "deep"))
    if what == "out":
        del holder[key]
    elif what == "twice" and isinstance(holder, list):
        holder.append(holder[key])
    elif what != "deep":
        holder[key] = draw.choice((*VALUES, _at(draw.choice(spots))))
    if what == "deep":
        holder[key] = "DEEP"
        return json.dumps(value).replace('"DEEP"', "[" * DEEP + "]" * DEEP).encode(), what
    said = f"{what} of {key}" if isinstance(key, str) else f"{what} in a list"
    if reseal is None:
        return json.dumps(value).encode(), said
    return sealed_json(value.get(ITEMS, value) if isinstance(value, dict) and list(value) == [ITEMS] else value, reseal), said


def _spots(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield value, key
        yield from _spots(one)


def _at(spot: tuple[Any, Any]) -> Any:
    return json.loads(json.dumps(spot[0][spot[1]]))


def nifti_of(content: bytes, draw: Random) -> tuple[bytes, str]:
    """A NIfTI file with one to three fields of its header at extremes; compressed as it was."""
    is_gzip = content[:2] == b"\x1f\x8b"
    changed = bytearray(gzip.decompress(content) if is_gzip else content)
    fields = draw.sample(sorted(HEADER), draw.choice((1, 1, 1, 2, 3)))
    for at in fields:
        kind = HEADER[at]
        value = draw.choice(FLOATS) if kind == "f" else draw.choice(INTEGERS)
        struct.pack_into(f"<{kind}", changed, at, max(-128, min(value, 127)) if kind == "b" else value)
    return gzip.compress(changed, 1, mtime=0) if is_gzip else bytes(changed), "header " + ", ".join(map(str, fields))


def lies_at(path: Path, draw: Random) -> str:
    """Put something else in the place of a file."""
    what = draw.choice(("missing", "folder", "loop", "another"))
    if what == "another" and (others := [p for p in sorted(path.parent.rglob("*")) if p.is_file() and p != path]):
        shutil.copyfile(draw.choice(others), path)
        return what
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    return what if what != "another" else "missing"


By = Callable[[bytes, Random], tuple[bytes, str]]
BY_SUFFIX: Mapping[str, By] = {
    **dict.fromkeys((".nii", ".gz"), nifti_of),
    **dict.fromkeys((".json",), json_of),
    **dict.fromkeys((".tsv", ".csv", ".py", ".yaml", ".jsonl"), text_of),
}


def damage(path: Path, draw: Random) -> str:
    """Damage a file; returns what was done."""
    kind = draw.random()
    if kind < 0.1:
        return lies_at(path, draw)
    special = BY_SUFFIX.get(path.suffix) if kind < 0.6 else None
    if special is json_of and draw.random() < 0.3:
        special = text_of
    content, what = (special or bytes_of)(path.read_bytes(), draw)
    path.write_bytes(content)
    return what
