"""The execution of a fit follows from what was asked for and from the machine, and a result says what it was."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from softseg_dist import Optim
from softseg_dist.training.stepper import COMPILE_STEPS, Execution, choose_execution


@pytest.mark.parametrize(("has_it", "best"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_trains_in_bfloat16_if_it_computes_in_it(monkeypatch: pytest.MonkeyPatch, has_it: bool, best: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_it}, raising=False)
    assert choose_execution(Optim(), "cpu", 1, 10**6).name == best
    assert choose_execution(Optim(precision="float32"), "cpu", 1, 10**6).name == "float32"
    assert choose_execution(Optim(precision="bfloat16"), "cpu", 2, 10**6).name == "bfloat16"


def test_a_torch_that_tells_nothing_of_the_processor_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_execution(Optim(), "cpu", 1, 10**6) == Execution()


def test_what_was_asked_for_and_is_not_used_is_explained_in_one_line() -> None:
    execution = choose_execution(Optim(compile="on"), "cpu", 1, 10**6)
    assert not execution.compiled
    assert len(execution.notes) == 1


@pytest.mark.parametrize(
    ("compile_it", "steps", "compiled", "notes"),
    [("auto", COMPILE_STEPS, True, 0), ("auto", 100, False, 1), ("on", 100, True, 0), ("off", COMPILE_STEPS, False, 0)],
)
def test_a_gpu_runs_graphs_and_compiles_where_that_pays(
    compile_it: Literal["auto", "on", "off"], steps: int, compiled: bool, notes: int
) -> None:
    execution = choose_execution(Optim(precision="bfloat16", compile=compile_it), "cuda:0", 1, steps)
    assert (execution.precision, execution.graph, execution.compiled) == ("bfloat16", True, compiled)
    assert len(execution.notes) == notes


@pytest.mark.parametrize(("compile_it", "noted"), [("auto", ["graph"]), ("off", ["graph"]), ("on", ["graph", "compiled"])])
def test_several_workers_start_every_step_from_the_host(compile_it: Literal["auto", "on", "off"], noted: list[str]) -> None:
    execution = choose_execution(Optim(precision="float32", compile=compile_it), "cuda", 2, COMPILE_STEPS)
    assert execution.name == "float32"
    assert [note.split(":")[0] for note in execution.notes] == noted


def test_an_execution_is_named_by_what_it_uses() -> None:
    assert Execution().name == "float32"
    assert Execution(precision="bfloat16", compiled=True, graph=True).name == "bfloat16, compiled, graph"
