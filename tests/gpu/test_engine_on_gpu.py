"""The GPU engine: a graph does what single operations do, waits for nothing within an epoch, and gives way where it must."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import device_fits
import pytest
import torch
from device_fits import EVERYTHING, batches_of, device_stepper, host_stepper, task_of, train

from softseg_dist import SVLS, Dice, Loss, NormReLU, Optim, Patch, Recipe, UNet
from softseg_dist.numerics.dropout import CountedDropout
from softseg_dist.training.evaluation import validation_score
from softseg_dist.training.gpu import device_batches
from softseg_dist.training.gpu.device_batches import DeviceBatches, Resident, Streamed
from softseg_dist.training.gpu.device_step import DeviceStepper
from softseg_dist.training.stepper import FitProgress, choose_execution
from softseg_dist.training.task import FitTask, Worker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
CUDA = "cuda"
NETWORK = UNet(filters=(4, 8), upsample="deconv")  # the gradient of an interpolation adds in no fixed order
PLAIN = device_fits.PLAIN.replace(network=NETWORK)
RECIPES = {
    "plain": PLAIN,
    "everything": PLAIN.replace(augment=EVERYTHING, smoothing=SVLS()),
    "dropout": PLAIN.replace(network=NETWORK.replace(dropout=0.2, norm="instance")),
    "patches": PLAIN.replace(patch=Patch(size=(16, 12), per_item=2), fusion="random_rater"),
    "running": PLAIN.replace(activation=NormReLU(over="running"), loss=Dice()),
    "clipped": PLAIN.replace(optim=PLAIN.optim.replace(clip_norm=0.1, weight_decay=0.1)),
}


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Without TF32, whose 10 bits would hide what is compared here; always by the same algorithm."""
    backend = torch.backends.cudnn
    before = backend.allow_tf32, backend.deterministic
    backend.allow_tf32, backend.deterministic = False, True
    yield
    backend.allow_tf32, backend.deterministic = before


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, FitTask]:
    return {dim: task_of(tmp_path_factory.mktemp(f"{dim}d"), dim).replace(recipe=PLAIN) for dim in (2, 3)}


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def longer(task: FitTask, recipe: Recipe, epochs: int) -> FitTask:
    return task.replace(recipe=recipe.replace(optim=recipe.optim.replace(epochs=epochs)))


def begin(stepper: DeviceStepper) -> FitProgress:
    """Train one epoch, in which graphs are captured."""
    now = FitProgress()
    train(stepper, stepper.batches, 1, now)
    return now


@pytest.mark.parametrize("name", RECIPES)
def test_a_graph_learns_what_single_operations_learn(tasks: dict[int, FitTask], name: str) -> None:
    task = longer(tasks[2], RECIPES[name], 20)
    eager, graph = device_stepper(task, CUDA), device_stepper(task, CUDA, graph=True)
    epochs = -(-50 // eager.batches.steps_per_epoch)
    theirs, ours = (train(stepper, stepper.batches, epochs) for stepper in (eager, graph))
    assert graph.execution.graph, graph.execution.notes
    assert graph.execution.notes == ()
    assert len(ours) >= 50
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_graph_of_volumes_learns_what_single_operations_learn(tasks: dict[int, FitTask]) -> None:
    task = longer(tasks[3], PLAIN, 20)
    eager, graph = device_stepper(task, CUDA), device_stepper(task, CUDA, graph=True)
    theirs, ours = (train(stepper, stepper.batches, 10) for stepper in (eager, graph))
    assert graph.execution.graph, graph.execution.notes
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_the_device_learns_what_a_cpu_learns(tasks: dict[int, FitTask]) -> None:
    host, device = host_stepper(tasks[2]), device_stepper(tasks[2], CUDA, graph=True)
    theirs, ours = (train(stepper, stepper.batches, 4) for stepper in (host, device))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("sent", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("graph", [False, True], ids=["operations", "graph"])
def test_nothing_waits_for_the_device_within_an_epoch(tasks: dict[int, FitTask], graph: bool, sent: bool) -> None:
    stepper = device_stepper(longer(tasks[2], RECIPES["everything"], 20), CUDA, graph=graph)
    if sent:
        stepper.device_batches = DeviceBatches(stepper.batches, Streamed(stepper.batches), stepper.device)
    begin(stepper)
    order, size = stepper.batches.order(1), PLAIN.optim.batch_size
    with stepper._own_stream(), waiting_forbidden():
        for step in range(stepper.batches.steps_per_epoch):
            stepper._launch(1, step, order[step * size : (step + 1) * size])


def test_bfloat16_comes_to_nearly_the_same_soft_dice(tasks: dict[int, FitTask]) -> None:
    scores = []
    for engine in ({"precision": "float32"}, {"precision": "bfloat16", "graph": True}):
        recipe = PLAIN.replace(network=UNet(filters=(8, 16)))
        stepper = device_stepper(longer(tasks[2], recipe, 30), CUDA, **engine)
        train(stepper, stepper.batches, 30)
        stepper.model.precision = "float32"
        worker = Worker(device=CUDA)
        scores.append(validation_score(stepper.model, tasks[2], stepper.batches.store, worker))
    assert scores[1] == pytest.approx(scores[0], abs=0.05)  # few cases, few steps: the benchmark has the exact figure


@pytest.mark.parametrize("graph", [False, True], ids=["operations", "graph"])
@pytest.mark.parametrize("network", [UNet(filters=(4, 8)), NETWORK.replace(dropout=0.2)], ids=["plain", "dropout"])
def test_a_compiled_network_learns_the_same(tasks: dict[int, FitTask], network: UNet, graph: bool) -> None:
    pytest.importorskip("triton")
    task = longer(tasks[2], PLAIN.replace(network=network), 8)
    eager = device_stepper(task, CUDA)
    compiled = device_stepper(task, CUDA, compiled=True, graph=graph)
    theirs, ours = (train(stepper, stepper.batches, 8) for stepper in (eager, compiled))
    assert (compiled.execution.compiled, compiled.execution.graph) == (True, graph), compiled.execution.notes
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 99])
def test_every_size_of_batch_has_a_graph_of_its_own(tasks: dict[int, FitTask], batch_size: int) -> None:
    optim = Optim(lr=5e-3, epochs=3, batch_size=batch_size)
    task = tasks[2].replace(recipe=PLAIN.replace(optim=optim))
    eager, graph = device_stepper(task, CUDA), device_stepper(task, CUDA, graph=True)
    theirs, ours = (train(stepper, stepper.batches, 3) for stepper in (eager, graph))
    assert graph.execution.graph, graph.execution.notes
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


class Reads(Loss):
    """A loss that waits for the device."""

    def per_sample(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        error = (prediction - target).square().flatten(1).mean(1)
        return error if error.sum().item() > 0 else error * 1


def test_a_loss_that_waits_is_trained_without_a_graph_from_the_first_step_on(tasks: dict[int, FitTask]) -> None:
    task = tasks[2].replace(recipe=PLAIN.replace(loss=Reads()))
    eager, hopeful = device_stepper(task, CUDA), device_stepper(task, CUDA, graph=True)
    theirs, ours = (train(stepper, stepper.batches, 4) for stepper in (eager, hopeful))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert not hopeful.execution.graph
    assert len(hopeful.execution.notes) == 1


def test_a_capture_that_fails_does_no_harm(tasks: dict[int, FitTask], monkeypatch: pytest.MonkeyPatch) -> None:
    """As when something waits that `obstacle` does not know."""
    monkeypatch.setattr("softseg_dist.training.gpu.device_step.obstacle", lambda step: None)
    task = tasks[2].replace(recipe=PLAIN.replace(loss=Reads()))
    eager, hopeful = device_stepper(task, CUDA), device_stepper(task, CUDA, graph=True)
    theirs, ours = (train(stepper, stepper.batches, 4) for stepper in (eager, hopeful))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert not hopeful.execution.graph
    graph = device_stepper(tasks[2], CUDA, graph=True)  # the next fit of the process
    train(graph, graph.batches, 2)
    assert graph.execution.graph, graph.execution.notes


def test_graphs_of_two_fits_on_one_device_do_not_disturb_each_other(tasks: dict[int, FitTask]) -> None:
    task = tasks[2].replace(recipe=RECIPES["dropout"])
    alone = device_stepper(task, CUDA, graph=True)
    losses = train(alone, alone.batches, 3)
    one, two = (device_stepper(task, CUDA, graph=True) for _ in range(2))
    progress, found = (FitProgress(), FitProgress()), ([], [])
    for epoch in range(3):
        for stepper, now, of_one in zip((one, two), progress, found, strict=True):
            of_one += train(stepper, stepper.batches, epoch + 1, now)
    assert found[0] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    assert found[1] == pytest.approx(losses, rel=1e-5, abs=1e-5)


def test_what_is_resident_is_shared_and_what_does_not_fit_is_sent(
    tasks: dict[int, FitTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (device_stepper(tasks[2], CUDA, graph=True) for _ in range(2))
    sources = [stepper.device_batches.source for stepper in (one, two) if isinstance(stepper.device_batches, DeviceBatches)]
    assert all(isinstance(source, Resident) and source.images.is_cuda for source in sources)
    assert len({source.images.data_ptr() for source in sources if isinstance(source, Resident)}) == 1
    monkeypatch.setattr(device_batches, "SHARE", 0.0)
    device_batches._kept.clear()
    sent = device_stepper(tasks[2], CUDA, graph=True)
    assert isinstance(sent.device_batches, DeviceBatches)
    assert isinstance(sent.device_batches.source, Streamed)
    assert train(sent, sent.batches, 3) == pytest.approx(train(one, one.batches, 3), rel=1e-5, abs=1e-5)
    assert len(sent.execution.notes) == 1


def test_dropout_drops_on_a_gpu_what_it_drops_on_a_cpu() -> None:
    x = torch.rand(2, 6, 9, 7)
    on_cpu, on_gpu = (
        CountedDropout(torch.nn.Dropout(0.4), 3, torch.full((1,), 123456789, dtype=torch.int32, device=device))
        for device in ("cpu", CUDA)
    )
    assert torch.equal(on_cpu(x), on_gpu(x.to(CUDA)).cpu())


def test_batches_on_a_gpu_are_those_of_the_host_up_to_rounding(tasks: dict[int, FitTask]) -> None:
    task = tasks[2].replace(recipe=RECIPES["everything"])
    stepper, batches = device_stepper(task, CUDA, graph=True), batches_of(task)
    now = begin(stepper)
    feed, _ = stepper._ways[PLAIN.optim.batch_size]
    members = batches.order(now.epoch)[: PLAIN.optim.batch_size]
    feed.send(lambda into: stepper._write(into, now.epoch, 0, members))
    made = stepper.device_batches.batch(feed.inputs)
    for ours, theirs in zip(made, batches.batch(now.epoch, members, "cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)


def test_float32_is_exact_on_a_gpu(tasks: dict[int, FitTask], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, image = device_fits.model_of(batches_of(tasks[2])).eval(), torch.rand(2, 1, 24, 20)
    with torch.no_grad():
        exact = model.double().logits(image.double())
        ours = model.float().on(CUDA).logits(image.to(CUDA)).cpu()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_execution_of_a_gpu_is_a_graph_in_the_precision_it_has() -> None:
    execution = choose_execution(Optim(), CUDA, 1, 10**6)
    assert execution.graph
    assert execution.compiled
    assert (execution.precision == "bfloat16") == torch.cuda.is_bf16_supported(including_emulation=False)
    short = choose_execution(Optim(), CUDA, 1, 10)
    assert not short.compiled
    assert len(short.notes) == 1
    assert not choose_execution(Optim(), CUDA, 2, 10**6).graph


def test_memory_is_given_back_when_fits_end(tasks: dict[int, FitTask], tmp_path: Path) -> None:
    def train_one() -> int:
        stepper = device_stepper(tasks[2], CUDA, graph=True)
        train(stepper, stepper.batches, 1)
        del stepper
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    first = train_one()
    assert max(train_one() for _ in range(3)) <= first * 1.1
