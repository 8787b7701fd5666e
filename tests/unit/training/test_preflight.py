"""A recipe that cannot be trained is refused before any fit starts, with the cause."""

from __future__ import annotations

import pytest
import torch

from softseg_dist import BatchDice, Loss, MonteCarlo, Phantom, Preprocess, Recipe, Sum, UNet
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.errors import UserError
from softseg_dist.training.preflight import check_recipes


class OfTheBatch(Loss):
    """A scalar where one loss per sample is asked for."""

    def per_sample(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).square().mean()


class Miscounted(BatchDice):
    """Says that it averages one number, and averages two."""

    def num_averaged(self, classes: int) -> int:
        return 1


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Split]:
    data, preprocess = Phantom(subjects=4, size=(16, 16), num_slices=2), Preprocess(dim=2)
    cases = data.cases(None)
    store = Store.open(build_store(tmp_path_factory.mktemp("stores"), cases, data, preprocess))
    return store, MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]


def recipe(loss: Loss) -> Recipe:
    return Recipe(network=UNet(filters=(2, 4)), loss=loss)


@pytest.mark.parametrize("loss", [BatchDice(), Sum(terms=(BatchDice(), BatchDice(smooth=0)), weights=(1, 1))], ids=str)
def test_a_loss_of_the_whole_batch_can_be_trained(prepared: tuple[Store, Split], loss: Loss) -> None:
    check_recipes({"a": recipe(loss)}, *prepared)


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (OfTheBatch(), "per_sample of OfTheBatch() must return a tensor of one loss per sample, got tensor("),
        (Miscounted(), "Miscounted() must average 1 numbers of each sample, got shape (1, 2)"),
    ],
    ids=str,
)
def test_a_loss_of_the_wrong_shape_is_refused(prepared: tuple[Store, Split], loss: Loss, cause: str) -> None:
    with pytest.raises(UserError, match="candidate mine cannot be trained") as refusal:
        check_recipes({"mine": recipe(loss)}, *prepared)
    assert cause in str(refusal.value)
