"""Samples of soft maps: what is drawn follows from its seed, dropout drops nothing but what it should, poses are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from public_classes import assert_covered
from pydantic import ValidationError
from torch import distributed, nn

from softseg_dist import (
    TTA,
    Affine,
    Elastic,
    Flip,
    Gamma,
    MCDropout,
    MonteCarlo,
    Noise,
    Optim,
    Phantom,
    Preprocess,
    Recipe,
    Sigmoid,
    Study,
    UNet,
)
from softseg_dist.data.store import Store, build_store, fingerprint
from softseg_dist.errors import UserError
from softseg_dist.judging.uncertainty import Spread
from softseg_dist.numerics.augmentation import augment_case
from softseg_dist.numerics.sampling import Uncertainty
from softseg_dist.numerics.transforms import Frame
from softseg_dist.record.changes import study_changes
from softseg_dist.record.ledger import json_of
from softseg_dist.training.data_parallel import WorkerGroup
from softseg_dist.training.fit import RunningFit, fit
from softseg_dist.training.inference import predict_sample, sample_maps
from softseg_dist.training.model import Model
from softseg_dist.training.preflight import check_recipes
from softseg_dist.training.task import FitTask, Worker, cases_path

DROPPING = UNet(filters=(4, 8), dropout=0.3)
RECIPE = Recipe(network=DROPPING, activation=Sigmoid(), optim=Optim(lr=5e-3, epochs=1, batch_size=8))
METHODS = (MCDropout(samples=3), TTA(transforms=(Flip(), Affine(degrees=10), Noise()), samples=2))
SPACINGS = {2: (0.5, 0.8), 3: (0.5, 0.8, 1.5)}
SIZES = {2: (16, 12), 3: (10, 12, 14)}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> FitTask:
    data, preprocess = Phantom(subjects=5, size=(16, 16), num_slices=3, raters=2), Preprocess(dim=2)
    cases = data.cases(None)
    path = build_store(tmp_path_factory.mktemp("stores"), cases, data, preprocess)
    split = MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]
    return FitTask(
        study="s", seed=0, candidate="c", recipe=RECIPE, split=split, objective="dice_dml", store=str(path),
        store_fingerprint=fingerprint(cases, data, preprocess), folder="", uncertainty=METHODS,
    )  # fmt: skip


def model_of(recipe: Recipe = RECIPE) -> Model:
    torch.manual_seed(0)
    return Model(recipe, channels=1, classes=1, size=(8, 8))


def samples(model: Model, task: FitTask, method: Uncertainty, seed: int = 0) -> list[np.ndarray]:
    return list(sample_maps(model, Store.open(task.store).sample(0), method, seed))


def test_the_suite_runs_over_every_public_method() -> None:
    assert_covered(Uncertainty, METHODS)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_samples_follow_from_the_seed_and_differ_from_each_other(task: FitTask, method: Uncertainty) -> None:
    model = model_of()
    first = samples(model, task, method)
    torch.manual_seed(123)  # whatever was drawn before
    again, other = samples(model, task, method), samples(model, task, method, seed=1)
    assert len(first) == method.samples
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, other))
    assert not np.array_equal(first[0], first[1])
    assert all(one.min() >= 0 and one.max() <= 1 and one.dtype == np.float32 for one in first)


def test_dropout_is_as_quiet_afterwards_as_before_and_nothing_else_trains(task: FitTask) -> None:
    model, sample = model_of(), Store.open(task.store).sample(0)
    plain, state = predict_sample(model, sample), {n: t.clone() for n, t in model.state_dict().items()}
    samples(model, task, MCDropout(samples=2))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert np.array_equal(predict_sample(model, sample), plain)


@contextmanager
def alone_in_a_group() -> Iterator[None]:
    """In evaluation a worker needs no others."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_a_worker_among_several_draws_what_one_alone_draws(task: FitTask) -> None:
    alone, beside = model_of(), model_of()
    with alone_in_a_group():
        WorkerGroup(beside, Worker(num_workers=2))
    beside.eval()
    method, sample = MCDropout(samples=3), Store.open(task.store).sample(0)
    assert np.array_equal(predict_sample(alone, sample), predict_sample(beside, sample))
    assert all(map(np.array_equal, samples(alone, task, method), samples(beside, task, method)))


@pytest.mark.parametrize("network", [UNet(filters=(4, 8)), UNet(filters=(4, 8), dropout=0)], ids=str)
def test_a_network_without_dropout_is_refused_before_it_is_trained(task: FitTask, network: UNet, tmp_path: Path) -> None:
    recipes, store = {"with": RECIPE, "without": RECIPE.replace(network=network)}, Store.open(task.store)
    message = r"candidate without: MCDropout\(samples=3\) needs a network with dropout, and this one has none"
    with pytest.raises(UserError, match=message):
        check_recipes(recipes, store, task.split, METHODS)
    check_recipes(recipes, store, task.split, METHODS[1:])
    with pytest.raises(UserError, match="candidate c: MCDropout"):
        RunningFit(task.replace(folder=str(tmp_path), recipe=recipes["without"]), Worker())


def test_an_axis_that_images_lack_is_refused_before_anything_is_trained(task: FitTask) -> None:
    with pytest.raises(UserError, match=r"candidate c: TTA\(.*: Flip's axes must lie in 0 to 1"):
        check_recipes({"c": RECIPE}, Store.open(task.store), task.split, (TTA(transforms=(Flip(axes=(2,)),)),))


def test_what_cannot_be_put_back_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"TTA cannot undo Elastic\(\)"):
        TTA(transforms=(Flip(), Elastic()))
    with pytest.raises(ValidationError, match="at least 1 item"):
        TTA(transforms=())
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        MCDropout(samples=1)


@pytest.mark.parametrize("transforms", [(Affine(degrees=0, scale=0, shift=0),), (Flip(p=0), Noise(std=0))], ids=str)
def test_augmentation_that_does_nothing_gives_the_plain_prediction(task: FitTask, transforms: tuple[Flip, ...]) -> None:
    model, sample = model_of(), Store.open(task.store).sample(0)
    spread = Spread.of(sample_maps(model, sample, TTA(transforms=transforms), seed=0))
    assert np.array_equal(spread.mean, predict_sample(model, sample))
    assert spread.mutual_information.max() <= 1e-12


class Pointwise(nn.Module):
    """A network that looks at one voxel at a time, so that mirroring its input mirrors its output."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.sigmoid()


@pytest.mark.parametrize("dim", [2, 3])
def test_a_flip_is_undone_exactly(dim: int) -> None:
    image = torch.randn(4, 1, *SIZES[dim], generator=torch.Generator().manual_seed(0))
    network, changed = Pointwise(), 0
    for seed in range(8):
        flipped, undo = augment_case(image, (Flip(axes=tuple(range(dim))),), seed, SPACINGS[dim])
        assert torch.equal(undo(network(flipped)), network(image))
        changed += not torch.equal(flipped, image)
    assert changed > 4, "most draws of two or three axes flip one"


@given(st.integers(0, 2**31), st.sampled_from([2, 3]))
def test_an_affine_map_and_its_way_back_meet(seed: int, dim: int) -> None:
    transform = Affine(degrees=90, scale=0.4, shift=0.2)
    frame = Frame(1, SIZES[dim], SPACINGS[dim], torch.device("cpu"))
    parameters = transform.draw(torch.Generator().manual_seed(seed), frame)[None]
    there = transform.move(frame.positions, parameters, frame)
    assert torch.allclose(transform.move_back(there, parameters, frame), frame.positions, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_pose_is_put_back_where_it_came_from(dim: int) -> None:
    frame = Frame(1, SIZES[dim], SPACINGS[dim], torch.device("cpu"))
    places = frame.positions / torch.tensor(frame.extent_mm)  # [1 *S D], from -1/2 to 1/2
    slope = (places @ torch.arange(1.0, dim + 1) / 10 + 0.5).expand(2, 1, *frame.size)  # what linear interpolation keeps
    transforms = (Flip(p=1), Affine(degrees=15, scale=0.1, shift=0.05), Flip(axes=(1,), p=1))
    moved, undo = augment_case(slope, transforms, seed=3, spacing_mm=SPACINGS[dim])
    middle = (places.abs() < 0.25).all(-1).expand(2, 1, *frame.size)  # what was seen all the time
    assert (moved - slope)[middle].abs().max() > 0.1
    assert (undo(moved) - slope)[middle].abs().max() < 1e-5


@pytest.mark.parametrize("dim", [2, 3])
def test_a_voxel_that_was_moved_out_of_sight_is_no_background(dim: int) -> None:
    image = torch.zeros(1, 1, *SIZES[dim])
    _, undo = augment_case(image, (Affine(degrees=90, scale=0.5, shift=0.5),), seed=0, spacing_mm=SPACINGS[dim])
    assert torch.allclose(undo(torch.ones_like(image)), torch.ones_like(image))


def test_all_slices_of_a_case_are_changed_alike() -> None:
    image = torch.randn(1, 1, 16, 12, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    changed, _ = augment_case(image, (Flip(), Affine(), Gamma(), Noise()), seed=5, spacing_mm=(1.0, 1.0))
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    assert not torch.equal(changed, image)


def test_every_test_case_gets_its_rows_and_nothing_else_changes(task: FitTask, tmp_path: Path) -> None:
    plain = fit(task.replace(folder=str(tmp_path / "plain"), uncertainty=()))
    asked = fit(task.replace(folder=str(tmp_path / "asked")))
    again = fit(task.replace(folder=str(tmp_path / "again"), candidate="d"))
    assert (asked.score, asked.test_score) == (plain.score, plain.test_score) == (again.score, again.test_score)
    rows = pq.read_table(cases_path(tmp_path / "asked")).to_pandas()
    own = rows.metric.str.startswith(("mc_dropout_", "tta_"))
    assert set(rows[own].subset) == {"test"}
    assert set(rows[own].subject) == set(task.split.test)
    counts = rows[own].groupby(["case", "class", "reference", "metric"], observed=True).size()
    assert (counts == 1).all()
    assert {m.removeprefix("tta_") for m in rows[own].metric.unique() if m.startswith("tta_")} == {
        m.removeprefix("mc_dropout_") for m in rows[own].metric.unique() if m.startswith("mc_dropout_")
    }
    others = pq.read_table(cases_path(tmp_path / "plain")).to_pandas()
    assert rows[~own].reset_index(drop=True).astype(object).equals(others.astype(object))
    repeated = pq.read_table(cases_path(tmp_path / "again")).to_pandas()
    assert repeated.value.equals(rows.value), "what is drawn depends on the case, not on candidate or process"


def study(**changes: object) -> Study:
    fields: dict[str, object] = {
        "name": "s", "question": "?", "data": Phantom(subjects=6), "splits": MonteCarlo(count=2), "candidates": {"a": RECIPE},
    }  # fmt: skip
    return Study(**(fields | changes))


def test_a_study_with_methods_goes_to_json_and_back() -> None:
    asked = study(uncertainty=METHODS)
    assert Study.model_validate_json(asked.model_dump_json()) == asked
    assert asked.fingerprint != study().fingerprint
    assert [method.samples for method in asked.debug().uncertainty] == [2, 2]


def test_two_methods_whose_rows_would_have_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="one of each kind"):
        study(uncertainty=(MCDropout(), MCDropout(samples=5)))


def test_another_question_about_uncertainty_is_another_study() -> None:
    assert study_changes(json_of(study()), json_of(study(uncertainty=METHODS)), [], [])[0]


def test_the_identity_of_a_fit_knows_what_it_measures(task: FitTask) -> None:
    assert task.identity != task.replace(uncertainty=()).identity
    assert task.identity == task.replace(folder="elsewhere").identity
