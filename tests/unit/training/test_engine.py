"""The engine of a fit follows from what was asked for and from the machine, and a result says what it was."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from softseg_dist import Optim
from softseg_dist.training.execution import COMPILE_STEPS, Engine, choose_engine


@pytest.mark.parametrize(("has_it", "best"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_trains_in_bfloat16_if_it_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, has_it: bool, best: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it, raising=False)
    assert choose_engine(Optim(), "cpu", 1, 10**6).name == best
    assert choose_engine(Optim(precision="float32"), "cpu", 1, 10**6).name == "float32"
    assert choose_engine(Optim(precision="bfloat16"), "cpu", 2, 10**6).name == "bfloat16"


def test_a_torch_that_tells_nothing_of_the_processor_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert choose_engine(Optim(), "cpu", 1, 10**6) == Engine()


def test_what_was_asked_for_and_is_not_used_is_explained_in_one_line() -> None:
    engine = choose_engine(Optim(compile="on"), "cpu", 1, 10**6)
    assert not engine.compiled
    assert len(engine.notes) == 1


@pytest.mark.parametrize(
    ("compile_it", "steps", "compiled", "notes"),
    [("auto", COMPILE_STEPS, True, 0), ("auto", 100, False, 1), ("on", 100, True, 0), ("off", COMPILE_STEPS, False, 0)],
)
def test_a_gpu_runs_graphs_and_compiles_where_that_pays(
    compile_it: Literal["auto", "on", "off"], steps: int, compiled: bool, notes: int
) -> None:
    engine = choose_engine(Optim(precision="bfloat16", compile=compile_it), "cuda:0", 1, steps)
    assert (engine.precision, engine.graph, engine.compiled) == ("bfloat16", True, compiled)
    assert len(engine.notes) == notes


def test_several_workers_start_every_step_from_the_host() -> None:
    engine = choose_engine(Optim(precision="float32"), "cuda", 2, COMPILE_STEPS)
    assert engine.name == "float32"
    assert [note.split(":")[0] for note in engine.notes] == ["graph"]


def test_an_engine_is_named_by_what_it_uses() -> None:
    assert Engine().name == "float32"
    assert Engine(precision="bfloat16", compiled=True, graph=True).name == "bfloat16, compiled, graph"
