"""One suite over all activations, then NormReLU's variants and the initial bias."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from public_classes import assert_covered
from torch import Tensor, distributed

from softseg_dist.numerics.activations import Activation, NormReLU, Sigmoid, Softmax, dead_samples

NORMRELUS = [NormReLU(over=over, share=share) for over in ("sample", "batch", "global", "running") for share in (False, True)]
ACTIVATIONS: list[Activation] = [Sigmoid(), Softmax(), *NORMRELUS]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
every_normrelu = pytest.mark.parametrize("activation", NORMRELUS, ids=repr)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- all activations


def test_the_suite_runs_over_every_public_activation() -> None:
    assert_covered(Activation, ACTIVATIONS)


@every_activation
@pytest.mark.parametrize("space", [(5, 6), (3, 4, 5)])
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1e-20, 1.0, 1e20]), offset=st.sampled_from([-9.0, 0.0, 9.0]))
@settings(max_examples=10, deadline=None)
def test_prediction_lies_in_0_to_1(activation: Activation, space: tuple[int, ...], seed: int, scale: float, offset: float) -> None:
    logits = (normal(2, activation.num_logits(3), *space, seed=seed) * scale + offset).float()
    for training in (True, False):
        prediction = activation.build(3).train(training)(logits)
        assert prediction.shape == (2, 3, *space)
        assert prediction.isfinite().all()
        assert prediction.min() >= 0
        assert prediction.max() <= 1


@every_activation
def test_module_in_training_and_direct_call_agree(activation: Activation) -> None:
    logits = normal(2, activation.num_logits(2), 4, 4)
    assert torch.equal(activation.build(2)(logits), activation(logits))


@every_activation
def test_gradient_is_the_slope(activation: Activation) -> None:
    logits = normal(2, activation.num_logits(2), 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(activation, (logits,))


@pytest.mark.parametrize("activation", [Sigmoid(), Softmax(), NormReLU(over="sample")], ids=repr)
def test_prediction_of_a_sample_does_not_depend_on_its_batch(activation: Activation) -> None:
    logits = normal(4, activation.num_logits(2), 4, 4)
    module = activation.build(2)
    assert torch.equal(module(logits), torch.cat([module(sample) for sample in logits.split(1)]))


@pytest.mark.parametrize("activation", [Sigmoid(), Softmax(), NormReLU(), NormReLU(over="running")], ids=repr)
def test_inference_on_a_sample_does_not_depend_on_its_batch(activation: Activation) -> None:
    module = activation.build(2)
    module(normal(4, activation.num_logits(2), 4, 4, seed=1))
    module.eval()
    logits = normal(4, activation.num_logits(2), 4, 4)
    assert torch.equal(module(logits), torch.cat([module(sample) for sample in logits.split(1)]))


@every_activation
def test_initial_bias_has_one_finite_value_per_logit_even_for_empty_and_full_labels(activation: Activation) -> None:
    for mean_label in (torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.1, 0.2, 0.3])):
        bias = activation.initial_bias(mean_label)
        assert bias.shape == (activation.num_logits(3),)
        assert bias.isfinite().all()


@every_activation
def test_activation_comes_back_from_json(activation: Activation) -> None:
    assert Activation.model_validate(activation.model_dump(mode="json")) == activation


# ---------------------------------------------------------------- initial bias


@pytest.mark.parametrize("activation", [Sigmoid(), Softmax()], ids=repr)
def test_initial_bias_alone_predicts_the_mean_label(activation: Activation) -> None:
    mean_label = torch.tensor([0.02, 0.3])
    logits = activation.initial_bias(mean_label)[None, :, None, None].expand(1, -1, 4, 4)
    torch.testing.assert_close(activation(logits).mean(dim=(0, 2, 3)), mean_label)


def test_initial_bias_of_normrelu_is_alive() -> None:
    assert (NormReLU().initial_bias(torch.tensor([0.0, 0.5])) > 0).all()


def test_softmax_keeps_classes_apart() -> None:
    assert Softmax()(normal(2, 4, 5, 5)).sum(dim=1).max() <= 1


# ---------------------------------------------------------------- NormReLU


def test_normrelu_variants_differ_in_what_their_maximum_runs_over() -> None:
    logits = torch.tensor([[[[1.0, -3.0]], [[2.0, 1.0]]], [[[4.0, 2.0]], [[0.0, -1.0]]]])  # [2 2 1 2]
    per_sample_and_class = torch.tensor([[[[1.0, 0]], [[1, 1 / 2]]], [[[1, 1 / 2]], [[0, 0]]]])
    whole_tensor = torch.tensor([[[[1 / 4, 0]], [[2 / 4, 1 / 4]]], [[[1, 2 / 4]], [[0, 0]]]])
    torch.testing.assert_close(NormReLU(over="sample")(logits), per_sample_and_class)
    for over in ("batch", "global", "running"):
        torch.testing.assert_close(NormReLU(over=over)(logits), whole_tensor)


@every_normrelu
def test_logits_below_zero_are_dead_and_have_no_gradient(activation: NormReLU) -> None:
    logits = -normal(2, 1, 4, 4).abs()
    logits[0, 0, 0, 0] = 0
    logits.requires_grad_()
    prediction = activation(logits)
    prediction.sum().backward()
    assert (prediction == 0).all()
    assert dead_samples(prediction) == 2
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@every_normrelu
def test_gradient_flows_through_the_maximum(activation: NormReLU) -> None:
    """Scaling all logits changes nothing, so by Euler's theorem sum x dL/dx = 0; with M held fixed it would not be."""
    logits = normal(2, 2, 4, 4).requires_grad_()
    (grad,) = torch.autograd.grad((activation(logits) * normal(2, 2, 4, 4, seed=1)).sum(), logits)
    assert grad.abs().max() > 0.1
    assert (grad * logits).sum().item() == pytest.approx(0, abs=1e-12)


def test_shared_classes_add_up_to_1_wherever_a_logit_is_positive_and_one_class_stays_as_it_is() -> None:
    logits = torch.tensor([[[[1.0, -3.0, 0.0]], [[3.0, 1e-3, -1.0]]]])  # [1 2 1 3]
    expected = torch.tensor([[[[1 / 4, 0, 0]], [[3 / 4, 1, 0]]]])
    for activation in NORMRELUS:
        assert torch.allclose(activation(logits), expected) == activation.share or activation.over == "sample"
        one = logits[:, :1]
        assert torch.equal(activation(one), activation.replace(share=False)(one))
    peaks_of_1 = torch.tensor([[[[1 / 2, 0, 0]], [[1 / 2, 1, 0]]]])  # each class by its own maximum
    torch.testing.assert_close(NormReLU(over="sample", share=True)(logits), peaks_of_1)


def test_dead_samples_counts_samples_and_not_classes() -> None:
    prediction = torch.zeros(3, 2, 4, 4)
    prediction[1, 0, 2, 2] = 1e-6
    assert dead_samples(prediction) == 2


def test_running_maximum_is_an_exponential_average_saved_with_the_weights() -> None:
    module = NormReLU(over="running").build(1)
    module(torch.full((1, 1, 2, 2), 4.0))
    module(torch.full((1, 1, 2, 2), 2.0))
    restored = NormReLU(over="running").build(1)
    restored.load_state_dict(module.state_dict())
    prediction = restored.eval()(torch.tensor([[[[-1.0, 1.9], [3.8, 5.0]]]]))
    M = 0.9 * 4 + 0.1 * 2
    torch.testing.assert_close(prediction, torch.tensor([[[[0, 1.9 / M], [1, 1]]]]))


def test_running_maximum_that_has_seen_nothing_predicts_nothing() -> None:
    assert (NormReLU(over="running").build(1).eval()(torch.ones(1, 1, 2, 2)) == 0).all()


def test_running_maximum_does_not_move_at_inference() -> None:
    module = NormReLU(over="running").build(1)
    module(torch.full((1, 1, 2, 2), 4.0))
    module.eval()(torch.full((1, 1, 2, 2), 40.0))
    assert module.state_dict()["maximum"] == 4


@pytest.mark.parametrize("over", ["sample", "batch", "global"])
def test_only_the_running_variant_has_state(over: str) -> None:
    assert not NormReLU.model_validate({"over": over}).build(1).state_dict()


@pytest.mark.parametrize("activation", [*NORMRELUS, Sigmoid(), Softmax()], ids=repr)
def test_a_worker_without_items_predicts_nothing(activation: Activation) -> None:
    assert activation(torch.empty(0, 2, 3, 3)).shape[0] == 0
    assert activation.build(2)(torch.empty(0, 2, 3, 3)).shape[0] == 0


# ---------------------------------------------------------------- several workers


def shared_logits() -> Tensor:
    logits = normal(4, 2, 3, 3)
    logits[0, 0, 0, 0] = logits[1, 0, 0, 0] = logits[3, 1, 2, 2] = 5  # a tie for the maximum, in and across workers
    return logits


def weighted(prediction: Tensor, weights: Tensor) -> Tensor:
    return (prediction * weights).flatten(1).sum(dim=1).mean()


SHARED_BY_WORKERS = [activation for activation in NORMRELUS if activation.over in ("global", "running")]


def outcome(activation: NormReLU, part: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prediction, gradient and state after a step of training on `part` of the batch."""
    logits = shared_logits()[part].requires_grad_()
    module = activation.build(2)
    prediction = module(logits)
    weighted(prediction, normal(4, 2, 3, 3, seed=1)[part]).backward()
    assert logits.grad is not None
    module.eval()
    if part.start == 0:  # inference waits for nobody: the other worker does not call it
        module(logits.detach())
    return prediction.detach(), logits.grad, module.state_dict()


def work(rank: int, folder: str) -> None:
    store = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
    torch.save([outcome(a, slice(2 * rank, 2 * rank + 2)) for a in SHARED_BY_WORKERS], f"{folder}/{rank}.pt")
    os._exit(0)  # a thread of gloo's may still let go of a tensor, and kills a process whose Python is on its way out


@pytest.mark.engine
def test_two_workers_give_the_prediction_gradient_and_state_of_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for index, activation in enumerate(SHARED_BY_WORKERS):
        prediction, gradient, state = outcome(activation, slice(0, 4))
        assert torch.equal(torch.cat([part[index][0] for part in parts]), prediction)
        # Workers average their gradients of means over 2 samples each, to that of the mean over 4.
        together = torch.cat([part[index][1] for part in parts]) / 2
        torch.testing.assert_close(together, gradient, rtol=1e-12, atol=1e-14)
        assert all(part[index][2] == state for part in parts)
