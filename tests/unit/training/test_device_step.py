"""Training on a device of its own: the same batches, the same losses, exact after a restart, honest about what went wrong."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from device_fits import (
    PATCHES,
    PLAIN,
    RECIPES,
    assert_equal_to_the_host,
    batches_of,
    device_stepper,
    host_stepper,
    model_of,
    task_of,
    train,
)

from softseg_dist import BatchDice, Dice, GeoLS, Loss, MCDropout, NormReLU, Optim, Recipe, Sigmoid, UNet, softseg_parity
from softseg_dist.training.fit import RunningFit, fit
from softseg_dist.training.gpu.capture import obstacle, unchanged
from softseg_dist.training.gpu.device_batches import DeviceBatches, ReadyBatches, Resident, device_batches
from softseg_dist.training.gpu.device_step import OF_A_STEP, DeviceStepper, Feed, PackedTensors
from softseg_dist.training.host_step import HostStepper
from softseg_dist.training.stepper import Diverged, FitProgress
from softseg_dist.training.task import FitTask, Interrupted, Worker, history_path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, FitTask]:
    return {dim: task_of(tmp_path_factory.mktemp(f"{dim}d"), dim) for dim in (2, 3)}


@pytest.mark.parametrize("sent", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("patch", [False, True], ids=["whole", "patches"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dim", [2, 3])
def test_batches_are_those_of_the_host_bit_for_bit(tasks: dict[int, FitTask], dim: int, name: str, patch: bool, sent: bool) -> None:
    recipe = RECIPES[name].replace(patch=PATCHES[dim] if patch else None)
    batches = batches_of(tasks[dim].replace(recipe=recipe))
    assert_equal_to_the_host(batches, sent, [(0, [0, 3, 1]), (2, [2, 0, 3])])


def test_cases_of_several_voxel_sizes_are_augmented_outside_of_the_step(tasks: dict[int, FitTask]) -> None:
    batches = batches_of(tasks[2])
    made = ReadyBatches(batches, CPU)
    for epoch in (0, 1):
        feed = Feed(made.fields(3), CPU)
        feed.send(lambda into, epoch=epoch: made.write(into, epoch, [2, 0, 1]))
        for ours, theirs in zip(made.batch(feed.inputs), batches.batch(epoch, [2, 0, 1], "cpu"), strict=True):
            assert torch.equal(ours, theirs)


def test_fits_of_one_process_share_what_is_resident(tasks: dict[int, FitTask]) -> None:
    one, two = (device_batches(batches_of(tasks[2].replace(candidate=name)), CPU)[0] for name in "ab")
    other, _ = device_batches(batches_of(tasks[2].replace(recipe=PLAIN.replace(label="hard_each"))), CPU)
    sources = [made.source for made in (one, two, other) if isinstance(made, DeviceBatches)]
    first, second, third = (source for source in sources if isinstance(source, Resident))
    assert first.images.buffer is second.images.buffer is third.images.buffer
    assert first.targets.buffer is second.targets.buffer is not third.targets.buffer


@pytest.mark.parametrize("loss", [PLAIN.loss, Dice()], ids=str)
@pytest.mark.parametrize("dim", [2, 3])
def test_losses_are_those_of_the_host(tasks: dict[int, FitTask], dim: int, loss: Loss) -> None:
    optim = PLAIN.optim.replace(clip_norm=1.0, weight_decay=1e-2, epochs=7)
    task = tasks[dim].replace(recipe=PLAIN.replace(loss=loss, optim=optim))
    host, device = host_stepper(task), device_stepper(task)
    theirs, ours = (train(stepper, stepper.batches, 7) for stepper in (host, device))
    assert len(ours) >= 7
    assert ours == pytest.approx(theirs, rel=1e-5)
    for a, b in zip(device.model.parameters(), host.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_last_batch_may_be_smaller(tasks: dict[int, FitTask]) -> None:
    batches = batches_of(tasks[2])
    assert len(batches.items) % PLAIN.optim.batch_size != 0
    device = device_stepper(tasks[2])
    train(device, batches, 1)
    assert sorted(device._ways) == sorted({PLAIN.optim.batch_size, len(batches.items) % PLAIN.optim.batch_size})


@pytest.mark.parametrize("recipe", softseg_parity(fusion="mean").values(), ids=["conventional", "softseg"])
def test_losses_that_depend_on_the_number_of_samples_are_those_of_the_host_in_a_small_last_batch_too(
    tasks: dict[int, FitTask], recipe: Recipe
) -> None:
    network = UNet(filters=(4, 8), order="relu-norm-dropout", last_kernel=3)
    task = tasks[2].replace(recipe=recipe.replace(network=network, optim=PLAIN.optim))
    assert len(batches_of(task).items) % PLAIN.optim.batch_size != 0
    device, host = device_stepper(task), host_stepper(task)
    assert train(device, batches_of(task), 2) == pytest.approx(train(host, batches_of(task), 2), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_stop_after_any_step_and_a_restart_change_nothing(tasks: dict[int, FitTask], steps: int) -> None:
    task = tasks[2].replace(recipe=PLAIN.replace(network=UNet(filters=(4, 8), dropout=0.2)))
    straight = device_stepper(task)
    losses = train(straight, straight.batches, 3)
    asked = iter(range(1, 10**6))
    first, now, done = device_stepper(task, worker=Worker(stop=lambda: next(asked) >= steps)), FitProgress(), []
    while not first.advance(now).stop:
        done += now.losses
        now.epoch, now.step, now.losses = now.epoch + 1, 0, []
    assert now.epoch * first.batches.steps_per_epoch + now.step == steps
    second = device_stepper(task)
    second.model.load_state_dict(first.model.state_dict())
    second.load(first.state())
    assert done + train(second, second.batches, 3, now) == losses
    for a, b in zip(straight.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_the_host_can_be_gone_on_from_and_the_other_way_round(tasks: dict[int, FitTask]) -> None:
    whole = train(host_stepper(tasks[2]), batches_of(tasks[2]), 4)
    for begin, go_on in ((host_stepper, device_stepper), (device_stepper, host_stepper)):
        first, second, now = begin(tasks[2]), go_on(tasks[2]), FitProgress()
        losses = train(first, first.batches, 2, now)
        second.model.load_state_dict(first.model.state_dict())
        second.load(first.state())
        assert losses + train(second, second.batches, 4, now) == pytest.approx(whole, rel=1e-5)


def test_a_whole_fit_that_is_stopped_and_goes_on_ends_as_one_that_is_not(
    tasks: dict[int, FitTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softseg_dist.training.fit.HostStepper", DeviceStepper)  # on a CPU, which has no graphs
    optim = PLAIN.optim.replace(precision="float32")
    recipe = PLAIN.replace(network=UNet(filters=(4, 8), dropout=0.2), optim=optim)
    task = tasks[2].replace(recipe=recipe, uncertainty=(MCDropout(samples=2),))
    whole, parts = (task.replace(folder=str(tmp_path / name)) for name in ("whole", "parts"))
    straight = fit(whole)
    asked = iter(range(1, 10**6))
    with pytest.raises(Interrupted):
        fit(parts, Worker(stop=lambda: next(asked) >= 5))
    resumed = fit(parts)
    assert resumed.resumed_epoch is not None
    assert resumed.score == straight.score
    assert resumed.engine == "float32"
    assert history_path(whole.folder).read_text() == history_path(parts.folder).read_text()


@pytest.mark.parametrize("kind", [HostStepper, DeviceStepper])
def test_what_a_fit_has_on_a_device_goes_with_it_and_waits_for_no_garbage_collector(
    tasks: dict[int, FitTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setattr("softseg_dist.training.fit.HostStepper", kind)
    training = RunningFit(tasks[2].replace(folder=str(tmp_path)), Worker())
    training.model.train()
    training.stepper.advance(training.progress)
    model = weakref.ref(training.model)
    gc.disable()
    try:
        del training
        assert model() is None
    finally:
        gc.enable()


class NanLoss(Loss):
    """Not a number in one sample of the batch if it is small."""

    def per_sample(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mean = prediction.flatten(1).mean(1)
        return mean * float("nan") if len(prediction) < 5 else mean


def test_a_loss_that_is_not_finite_is_told_with_its_step_and_cause(tasks: dict[int, FitTask]) -> None:
    stepper = device_stepper(tasks[2].replace(recipe=PLAIN.replace(loss=NanLoss())))
    last = stepper.batches.steps_per_epoch
    with pytest.raises(Diverged, match=rf"loss is nan in epoch 1, step {last}: NanLoss\(\) is not finite for finite pred"):
        stepper.advance(FitProgress())


def test_diverged_weights_are_named_as_the_cause(tasks: dict[int, FitTask]) -> None:
    optim = Optim(lr=1e30, epochs=2, batch_size=4)
    stepper = device_stepper(tasks[2].replace(recipe=PLAIN.replace(optim=optim, activation=Sigmoid())))
    with pytest.raises(Diverged, match="weights diverged; try a smaller lr than 1e\\+30"):
        train(stepper, stepper.batches, 2)


def test_dropout_is_drawn_anew_in_every_step_and_the_same_in_every_fit(tasks: dict[int, FitTask]) -> None:
    network = UNet(filters=(4, 8), dropout=0.3)
    task = tasks[2].replace(recipe=PLAIN.replace(network=network, optim=Optim(lr=1e-30, epochs=2, batch_size=99)))
    one, two = (device_stepper(task) for _ in range(2))
    losses = train(one, one.batches, 2)
    assert losses == train(two, two.batches, 2)
    plain = device_stepper(task.replace(recipe=task.recipe.replace(network=UNet(filters=(4, 8)))))
    assert losses != train(plain, plain.batches, 2)
    one.model.eval()
    image = torch.rand(2, 1, 24, 20)
    assert torch.equal(one.model(image), one.model(image))


class Reads(Loss):
    """A loss that waits for the device."""

    def per_sample(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        error = (prediction - target).square().flatten(1).mean(1)
        return error if error.sum().item() > 0 else error * 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"augment": RECIPES["everything"].augment, "smoothing": RECIPES["everything"].smoothing}, None),
        ({"activation": NormReLU(over="running"), "patch": PATCHES[2]}, None),
        ({"network": UNet(filters=(4, 8), dropout=0.2, norm="instance")}, None),
        ({"activation": NormReLU(over="batch", share=True), "loss": BatchDice(over="batch and classes")}, None),
        ({"loss": Reads()}, "a number is read from the device"),
        ({"smoothing": GeoLS()}, "tensors are compared by the host"),
    ],
    ids=["plain", "everything", "running", "dropout", "parity", "loss", "geols"],
)
def test_what_a_graph_cannot_repeat_is_found_before_it_is_captured(
    tasks: dict[int, FitTask], change: dict[str, object], reason: str | None
) -> None:
    stepper = device_stepper(tasks[2].replace(recipe=PLAIN.replace(**change)))
    members = stepper.batches.order(0)[:5]
    feed = Feed({**stepper.device_batches.fields(5), **OF_A_STEP}, CPU)
    feed.send(lambda into: stepper._write(into, 0, 0, members))
    found = obstacle(lambda: stepper._step(feed.inputs))
    assert (found is None) == (reason is None)
    assert found is None or found.startswith(str(reason))


def test_what_cannot_be_used_is_noted_once_and_costs_no_digit(tasks: dict[int, FitTask]) -> None:
    """On a CPU no graph can be captured: the attempt fails, and training begins as if there had been none."""
    plain, hopeful = device_stepper(tasks[2]), device_stepper(tasks[2], graph=True)
    assert train(plain, plain.batches, 2) == train(hopeful, hopeful.batches, 2)
    assert hopeful.execution.name == "float32"
    assert len(hopeful.execution.notes) == 1
    assert hopeful.execution.notes[0].startswith("graph: not used, ")


@pytest.mark.engine
def test_a_network_that_cannot_be_compiled_is_trained_as_it_is(tasks: dict[int, FitTask], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand a page of text")

    plain, hopeful = device_stepper(tasks[2]), device_stepper(tasks[2], compiled=True)
    hopeful.network = broken
    assert train(plain, plain.batches, 2) == train(hopeful, hopeful.batches, 2)
    assert hopeful.execution.notes == ("compiled: not used, RuntimeError: no compiler and a page of text",)


@pytest.mark.engine
def test_a_network_is_compiled_whole_and_once_for_all_fits_of_a_process(tasks: dict[int, FitTask]) -> None:
    torch._dynamo.reset()
    made: list[torch.fx.GraphModule] = []

    def make(graph: torch.fx.GraphModule, inputs: object) -> object:
        made.append(graph)
        return graph.forward

    task = tasks[2].replace(recipe=PLAIN.replace(network=UNet(filters=(4, 8), dropout=0.2)))
    plain = device_stepper(task)
    losses = train(plain, plain.batches, 1)
    for recipe in (task.recipe, task.recipe.replace(loss=Dice(), label="hard"), task.recipe):
        stepper = device_stepper(task.replace(recipe=recipe), compiled=True)
        stepper.network = torch.compile(stepper.model.network, dynamic=False, fullgraph=True, backend=make)
        ours = train(stepper, stepper.batches, 1)
        assert stepper.execution.compiled, stepper.execution.notes
    assert ours == losses
    assert len(made) == 2  # sizes of a batch


def test_what_is_tried_leaves_weights_and_moments_as_they_were() -> None:
    batch_norm = torch.nn.BatchNorm1d(3)
    adam = torch.optim.AdamW(batch_norm.parameters(), lr=0.1)

    def learn() -> None:
        adam.zero_grad()
        batch_norm(torch.rand(8, 3)).square().sum().backward()
        adam.step()

    def state() -> list[torch.Tensor]:
        moments = [value for state in adam.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*batch_norm.state_dict().values(), *moments)]

    before = state()
    with unchanged(batch_norm, adam):
        learn()
    fresh = state()
    assert all(torch.equal(a, b) for a, b in zip(before, fresh[: len(before)], strict=True))
    assert not any(tensor.any() for tensor in fresh[len(before) :])
    learn()
    before = state()
    with unchanged(batch_norm, adam):
        learn()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_packed_tensors_share_its_memory_and_nothing_else() -> None:
    fields = {"a": ((3,), torch.float32), "b": ((2, 2), torch.int64), "c": ((), torch.float32), "d": ((5,), torch.bool)}
    packed = PackedTensors(fields, CPU)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.of.items()} == fields
    for number, tensor in enumerate(packed.of.values()):
        tensor.fill_(number)
    copy = PackedTensors(fields, CPU)
    copy.memory.copy_(packed.memory)
    assert [set(tensor.flatten().tolist()) for tensor in copy.of.values()] == [{0.0}, {1}, {2.0}, {True}]


def test_a_model_in_bfloat16_keeps_weights_logits_and_prediction_in_float32(tasks: dict[int, FitTask]) -> None:
    model = model_of(batches_of(tasks[2]))
    image = torch.rand(2, 1, 24, 20)
    exact = model.logits(image)
    model.precision = "bfloat16"
    logits = model.logits(image)
    assert logits.dtype is model(image).dtype is torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0.1, atol=0.1)
