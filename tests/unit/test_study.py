"""Study objects validate, print, compare, replace, go through JSON and have fingerprints; factorial names its cells."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from softseg_dist import (
    BCE,
    AdaptiveWing,
    Affine,
    Bids,
    Dice,
    GeoLS,
    KFold,
    Metric,
    MonteCarlo,
    NormReLU,
    Optim,
    Patch,
    Phantom,
    Preprocess,
    Recipe,
    Resources,
    Search,
    Sigmoid,
    Study,
    TuneEach,
    UNet,
    factorial,
)


class Nameless(Metric):
    """A metric without a name."""

    def __call__(self, prediction, reference, scale):
        return reference.mean(axis=(0, 2, 3))


BASE = Recipe(network=UNet(filters=(8, 16)), label="hard", augment=(Affine(degrees=10),), optim=Optim(lr=1e-3, epochs=60))


def study(**changes: object) -> Study:
    fields = {
        "name": "s000_test",
        "question": "Does it work?",
        "data": Phantom(subjects=6),
        "splits": MonteCarlo(count=2),
        "candidates": factorial(BASE, label=("hard", "soft"), loss=(Dice(), AdaptiveWing())),
        "control": "hard-dice",
    }
    return Study(**(fields | changes))


def test_softseg_factorial_has_eight_cells_named_by_what_varies() -> None:
    cells = factorial(BASE, label=("hard", "soft"), activation=(Sigmoid(), NormReLU()), loss=(Dice(), AdaptiveWing()))
    assert len(cells) == 2 * 2 * 2
    assert {"hard-sigmoid-dice", "soft-normrelu-wing"} <= set(cells)
    assert cells["soft-normrelu-wing"] == BASE.replace(label="soft", activation=NormReLU(), loss=AdaptiveWing())


def test_two_values_of_one_class_are_told_apart_by_what_differs() -> None:
    cells = factorial(BASE, loss=(AdaptiveWing(omega=8), AdaptiveWing(omega=14), BCE()))
    assert list(cells) == ["wing_omega8", "wing_omega14", "bce"]


class Derived(Dice):
    """A loss that takes everything but its name from `Dice`."""


def test_factorial_names_a_derived_class_by_its_own_name() -> None:
    assert list(factorial(BASE, loss=(Dice(), Derived()))) == ["dice", "derived"]


@pytest.mark.parametrize("factors", [{"losss": (Dice(),)}, {"loss": (Dice(), Dice())}])
def test_factorial_refuses_unknown_fields_and_equal_values(factors: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(ValueError, match="factor"):
        factorial(BASE, **factors)


@pytest.mark.parametrize(
    "thing",
    [
        study(),
        study(data=Bids("gm_challenge", image="T2starw", labels={"GM": "gmseg-manual"}, person=r"sub-(\d+)")),
        study(preprocess=Preprocess(dim=3, spacing_mm=(2, 2, 2), crop=(24, 32, 24)), splits=KFold(folds=3)),
        BASE,
        AdaptiveWing(omega=8),
        BASE.replace(fusion="soft_staple", smoothing=GeoLS(alpha=0.2)),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_json_round_trip_gives_an_equal_object_of_the_same_class(thing: Study) -> None:
    again = type(thing).model_validate_json(thing.model_dump_json())
    assert again == thing
    assert again.fingerprint == thing.fingerprint


def test_json_names_the_class_of_every_component() -> None:
    recipe = json.loads(BASE.replace(loss=AdaptiveWing(omega=8)).model_dump_json())
    assert recipe["loss"]["type"] == "AdaptiveWing"
    assert recipe["loss"]["omega"] == 8
    assert recipe["augment"][0]["type"] == "Affine"


def test_fingerprint_changes_with_every_field_and_with_nothing_else() -> None:
    assert study().fingerprint == study().fingerprint
    assert study().fingerprint != study(seed=1).fingerprint
    assert BASE.fingerprint != BASE.replace(optim=BASE.optim.replace(lr=2e-3)).fingerprint


def test_objects_are_frozen_and_print_what_differs_from_the_defaults() -> None:
    loss = AdaptiveWing(omega=8)
    with pytest.raises(ValidationError, match="frozen"):
        loss.omega = 14  # type: ignore[misc]
    assert repr(loss) == "AdaptiveWing(omega=8.0)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "softer"}, "control 'softer' is not a candidate"),
        ({"name": "a/b"}, "folder"),
        ({"objective": "loss"}, "objective must be one of"),
        ({"tune_each": TuneEach(), "candidates": {}, "search": Search(lambda trial: BASE)}, "a search tunes its own"),
        ({"second_objective": "loss"}, "objective must be one of"),
        ({"objective": "dice"}, "objective must be one of brier_skill, .* or a Metric, got 'dice'"),
        ({"objective": "volume_error"}, "objective must be one of"),
        ({"objective": Nameless()}, "Nameless needs a name of its own for its column, such as short = 'my_metric', got ''"),
        ({"second_objective": "brier_skill"}, "second_objective must differ from the objective, got 'brier_skill' for both"),
        ({"candidates": {}, "control": None}, "candidates=..., search=..."),
        ({"candidates": {"a b": BASE}, "control": None}, "'a b'"),
        ({"candidates": {"a" * 101: BASE}, "control": None}, "at most 100 of them, got 'aaa"),
        ({"candidates": {"Dice": BASE, "dice": BASE}, "control": None}, "candidates 'Dice' and 'dice' are one in names of files"),
        ({"data": Bids("x", image="T2w", labels={"G 1": "a", "g/1": "b"})}, "classes 'G 1' and 'g/1' are one in names of files"),
        ({"candidates": {"a": BASE.replace(fusion="rater:nobody")}, "control": None}, "nobody"),
        *[
            (
                {"data": Phantom(subjects=6, raters=1), "candidates": {"a": BASE.replace(fusion=f)}, "control": None},
                f"candidate a: fusion '{f}' needs several raters, but no case has more than one; use fusion='mean'",
            )
            for f in ("staple", "soft_staple", "random_rater")
        ],
        ({"question_": "?"}, "Extra inputs"),
    ],
)
def test_a_study_that_cannot_run_is_refused_with_its_value(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        study(**changes)


@pytest.mark.parametrize("fields", [{"lr": 0}, {"epochs": 0}, {"batch_size": -1}, {"lr": float("nan")}])
def test_optim_refuses_what_no_optimizer_can_use(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Optim(**fields)


@pytest.mark.parametrize("fusion", ["mean", "majority", "rater:A"])
def test_one_rater_is_enough_for_the_other_fusions(fusion: str) -> None:
    assert study(data=Phantom(subjects=6, raters=1), candidates={"hard-dice": BASE.replace(fusion=fusion)})


def test_debug_is_small_and_a_pure_function_of_the_study() -> None:
    small = study().debug()
    assert small == study().debug()
    assert small.name == "s000_test-debug"
    assert small.subjects == 6
    assert {r.optim.epochs for r in small.candidates.values()} == {2}
    assert len(small.splits.make({f"s{i}": "" for i in range(6)}, 0)) == 2


def test_resources_are_positive() -> None:
    with pytest.raises(ValidationError):
        Resources(cpus_per_fit=0)
    with pytest.raises(ValidationError):
        Resources(fits_per_gpu=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [({"gpus_per_fit": 0.25}, "--fits-per-gpu.*--gpus-per-fit"), ({"workers_per_fit": 2}, "--fits-per-gpu.*--workers-per-fit")],
)
def test_fits_that_share_a_gpu_in_one_process_exclude_other_ways_to_use_it(other: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Resources(fits_per_gpu=4, **other)


@pytest.mark.parametrize("size", range(1, 40))
def test_as_many_shares_of_a_gpu_as_asked_for_are_no_more_than_one_as_ray_counts(size: int) -> None:
    share = Resources(fits_per_gpu=size).gpus_of_worker(True)
    assert share is not None
    parts = round(share * 10_000)
    assert parts == pytest.approx(share * 10_000)
    assert size * parts <= 10_000 < (size + 1) * parts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optim(epochs=10**9), "less than or equal to 100000"),
        (lambda: UNet(filters=(10**6, 10**6)), "less than or equal to 4096"),
        (lambda: Patch(size=(10**9, 10**9)), "less than or equal to 4096"),
        (lambda: MonteCarlo(count=10**9), "less than or equal to 10000"),
    ],
)
def test_sizes_that_no_machine_has_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()
