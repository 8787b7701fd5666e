"""The public names: one table in `softseg_dist`, from which its stub is written.

python tests/unit/test_public_names.py    # writes softseg_dist/__init__.pyi anew
"""

from __future__ import annotations

from pathlib import Path

import pytest

import softseg_dist

STUB = Path(softseg_dist.__file__).with_suffix(".pyi")


def stub() -> str:
    """What type checkers and editors read of the package."""
    lines = ['"""The public names, for type checkers. Written from the table in `__init__.py`: do not edit."""', ""]
    lines += [
        f"from {module} import {name} as {name}" for module, names in softseg_dist.PUBLIC.items() for name in names
    ]
    return "\n".join(
        [
            *lines,
            "",
            "PUBLIC: dict[str, tuple[str, ...]]",
            "__version__: str",
            "NUMERICS: int",
            "__all__: list[str]",
            "",
        ]
    )


def test_the_stub_is_what_the_table_says() -> None:
    assert STUB.read_text() == stub()


def test_every_public_name_resolves() -> None:
    assert all(getattr(softseg_dist, name) is not None for name in softseg_dist.__all__)
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = softseg_dist.NoSuchName


if __name__ == "__main__":
    STUB.write_text(stub())
