"""The public names: one table in `softseg_dist`, from which its stub is written.

python tests/unit/test_public_names.py    # writes softseg_dist/__init__.pyi anew
"""

from __future__ import annotations

from pathlib import Path

import pytest
from public_classes import assert_covered, public_classes

import softseg_dist
from softseg_dist import Activation, Augmentation, DataSet, Frozen, Loss, Network, Smoothing, Uncertainty
from softseg_dist.data.splits import Splits

STUB = Path(softseg_dist.__file__).with_suffix(".pyi")


def stub() -> str:
    """What type checkers and editors read of the package."""
    lines = ['"""The public names, for type checkers. Written from the table in `__init__.py`: do not edit."""', ""]
    lines += [f"from {module} import {name} as {name}" for module, names in softseg_dist.PUBLIC.items() for name in names]
    return "\n".join(
        [*lines, "", "PUBLIC: dict[str, tuple[str, ...]]", "__version__: str", "NUMERICS: int", "__all__: list[str]", ""]
    )


def test_the_stub_is_what_the_table_says() -> None:
    assert STUB.read_text() == stub(), "run python tests/unit/test_public_names.py"


def test_every_public_name_resolves() -> None:
    assert all(getattr(softseg_dist, name) is not None for name in softseg_dist.__all__)
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = softseg_dist.NoSuchName


BASES = Activation, Augmentation, DataSet, Loss, Network, Smoothing, Splits, Uncertainty  # each has a property suite
SETTINGS = {"Each", "Optim", "Patch", "Preprocess", "Race", "Recipe", "Resources", "Search", "Split", "Study", "TuneEach"}


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_a_suite_without_a_public_class_fails(base: type, monkeypatch: pytest.MonkeyPatch) -> None:
    known = public_classes(base)
    instances = [kind.__new__(kind) for kind in known]
    assert_covered(base, instances)
    made_up = type("MadeUp", (next(iter(known)),), {"__module__": "softseg_dist.made_up"})
    monkeypatch.setattr(softseg_dist, "MadeUp", made_up, raising=False)
    monkeypatch.setattr(softseg_dist, "__all__", [*softseg_dist.__all__, "MadeUp"])
    with pytest.raises(AssertionError, match=rf"property suite of {base.__name__} does not run over MadeUp"):
        assert_covered(base, instances)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_every_base_class_has_a_suite_that_asks_for_all_of_its_public_classes(base: type) -> None:
    suites = [p.name for p in Path(__file__).parent.rglob("test_*.py") if f" assert_covered({base.__name__}, " in p.read_text()]
    assert len(suites) == 1


def test_what_a_study_is_made_of_has_a_suite_or_is_a_setting() -> None:
    kinds = public_classes(Frozen) - {Frozen}
    assert {kind.__name__ for kind in kinds if not issubclass(kind, BASES)} == SETTINGS


if __name__ == "__main__":
    STUB.write_text(stub())
