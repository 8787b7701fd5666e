"""The engine of a fit follows from what was asked for and from the machine, and a result says what it was."""

from __future__ import annotations

import pytest

from softseg_dist import Optim
from softseg_dist.search.changes import of_earlier_versions
from softseg_dist.training.engine import Engine, choose_engine


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_cpu_trains_in_float32_and_has_nothing_to_explain(precision: str) -> None:
    assert choose_engine(Optim(precision=precision), "cpu", 1, 10**6) == Engine()


def test_what_was_asked_for_and_is_not_used_is_explained_in_one_line() -> None:
    engine = choose_engine(Optim(precision="bfloat16"), "cpu", 1, 10**6)
    assert engine.precision == "float32"
    assert len(engine.notes) == 1


def test_an_engine_is_named_by_what_it_uses() -> None:
    assert Engine().name == "float32"
    assert Engine(precision="bfloat16", compiled=True, graph=True).name == "bfloat16, compiled, graph"


def test_a_recipe_of_an_earlier_version_was_trained_in_float32() -> None:
    old = {"label": "soft", "optim": {"type": "Optim", "lr": 0.1}}
    assert of_earlier_versions(old)["optim"]["precision"] == "float32"
    assert of_earlier_versions(old)["patch"] is None
