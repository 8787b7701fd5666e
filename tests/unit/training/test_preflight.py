"""A recipe that cannot be trained is refused before any fit starts, in one sentence that blames it for no more than its own."""

from __future__ import annotations

import re
import subprocess
import sys
from inspect import isclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from softseg_dist import (
    Activation,
    BatchDice,
    Dice,
    Flip,
    Loss,
    MCDropout,
    Mixup,
    MonteCarlo,
    NormReLU,
    Phantom,
    Preprocess,
    Recipe,
    Sigmoid,
    Sum,
    UNet,
)
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.errors import UserError
from softseg_dist.numerics import losses
from softseg_dist.sources import Sources
from softseg_dist.study_file import load_sources
from softseg_dist.training.preflight import _check_sense, check_recipes, preflight, start_child

SOURCE = """
import os, signal, sys
import torch
from torch import nn
from softseg_dist import Network

class Wrapped(nn.Module):
    def __init__(self, kind, layer):
        super().__init__()
        self.kind, self.layer = kind, layer

    def forward(self, image):
        logits = self.layer(image)
        if self.kind == "prints":
            print('["refused", "no report of ours"]', flush=True)
            print("seen on stderr", file=sys.stderr)
            breakpoint()
        if self.kind == "raises":
            raise ArithmeticError("the layers\\n  do not add up")
        if self.kind == "aborts":
            print("terminate called after throwing an instance of 'dnnl::error'", file=sys.stderr, flush=True)
            os.abort()
        if self.kind == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exits":
            sys.exit(3)
        if self.kind == "asks for too much":
            return torch.empty(1 << 60)
        if self.kind == "list":
            return [logits]
        if self.kind == "tuple":
            return logits, logits
        if self.kind == "stacked in training" and self.training:
            return torch.stack([logits, logits], dim=1)
        if self.kind == "integers":
            return logits.long()
        if self.kind == "half the size in training" and self.training:
            return logits[..., ::2]
        if self.kind == "infinite in training" and self.training:
            return logits / 0
        return logits

class Mine(Network):
    kind: str

    def build(self, in_channels, out_channels, dim):
        if self.kind == "missing package":
            import package_that_is_not_installed
        if self.kind == "missing backend":
            from monai.utils import optional_import
            optional_import("package_that_is_not_installed")[0].Layer()
        if self.kind == "deep supervision":
            from monai.networks.nets import DynUNet
            filters = (4, 4, 8, 8)
            return DynUNet(dim, in_channels, out_channels, (3,) * 4, (1, 2, 2, 2), (2,) * 3, filters,
                           deep_supervision=True, deep_supr_num=2)
        return Wrapped(self.kind, nn.Conv2d(in_channels, out_channels, 3, padding=1))

class Backwards(nn.Module):
    def __init__(self, channels, logits):
        super().__init__()
        self.last, self.first = nn.Conv2d(logits, logits, 1), nn.Conv2d(channels, logits, 3, padding=1)

    def forward(self, image):
        return self.last(self.first(image).relu())

class RegisteredBackwards(Network):
    def build(self, in_channels, out_channels, dim):
        return Backwards(in_channels, out_channels)
"""
SOURCES = Sources("s000_networks.py", {"s000_networks.py": SOURCE})
OURS = Recipe(network=UNet(filters=(2, 4)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Split]:
    data, preprocess = Phantom(subjects=4, size=(16, 16), num_slices=2), Preprocess(dim=2)
    cases = data.cases(None)
    store = Store.open(build_store(tmp_path_factory.mktemp("stores"), cases, data, preprocess))
    return store, MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]


def refused(prepared: tuple[Store, Split], recipe: Recipe) -> str:
    with pytest.raises(UserError) as refusal:
        check_recipes({"mine": recipe}, *prepared)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def with_network(kind: str) -> Recipe:
    mine = load_sources(SOURCES).Mine
    return Recipe(network=mine(kind=kind))


# ---------------------------------------------------------------- in a child process


def in_child(prepared: tuple[Store, Split], *recipes: Recipe) -> None:
    named = {f"c{number}": recipe for number, recipe in enumerate(recipes)}
    preflight(named, (), *prepared, SOURCES)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "raises",
            r"c1 cannot be trained on images of size .*: ArithmeticError: the layers do not add up \(s000_networks.py, line \d\d\)",
        ),
        ("aborts", r"candidate c1: the process that tried .* crashed \(SIGABRT\), .* last output: .*dnnl::error"),
        ("is killed", r"candidate c1: .* was killed \(SIGKILL\), probably because memory ran out"),
        ("exits", r"candidate c1: .* ended with exit code 3"),
        ("missing package", r"candidate c1 needs a package that is missing .*'package_that_is_not_installed'.*install it"),
    ],
)
def test_a_network_that_fails_gives_one_sentence_that_names_candidate_and_cause(
    prepared: tuple[Store, Split], kind: str, message: str
) -> None:
    """What the networks before it print is no report, and their breakpoints do not wait."""
    with pytest.raises(UserError, match=message) as refusal:
        in_child(prepared, with_network("prints"), with_network(kind), with_network("prints"))
    assert "\n" not in str(refusal.value)


@pytest.mark.engine
def test_uncertainty_is_tried_there_too(prepared: tuple[Store, Split]) -> None:
    recipes = {"mine": with_network("prints")}
    with pytest.raises(UserError, match=r"candidate mine: MCDropout\(\) needs a network with dropout"):
        preflight(recipes, (MCDropout(),), *prepared, SOURCES, start_child())


@pytest.mark.engine
def test_a_child_that_gets_no_task_ends() -> None:
    child = start_child()
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=120) != 0


@pytest.mark.engine
def test_a_script_without_a_guard_can_start_it(prepared: tuple[Store, Split], tmp_path: Path) -> None:
    """The child does not import the main module: this one would start it again and again."""
    store, split = prepared
    (tmp_path / "torch.py").write_text("raise RuntimeError('a file of the working directory shadows a package')")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "study.py"
    script.write_text(
        "from softseg_dist import Recipe, UNet\nfrom softseg_dist.data.splits import Split\n"
        "from softseg_dist.data.store import Store\nfrom softseg_dist.training.preflight import preflight\n"
        f"split = Split.model_validate_json({split.model_dump_json()!r})\n"
        f"preflight({{'a': Recipe(network=UNet(filters=(2, 4)))}}, (), Store.open({str(store.path)!r}), split, None)\n"
        "print('passed')\n"
    )
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stdout == "passed\n", ended.stderr


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("list", r"one float tensor of logits \(2, 1, 16, 16\) in training, got a list; of several outputs"),
        ("tuple", r"in training, got a tuple"),
        ("stacked in training", r"in training, got torch.float32 \(2, 2, 1, 16, 16\).*deep supervision, return the finest"),
        ("deep supervision", r"in training, got torch.float32 \(2, 3, 1, 16, 16\).*deep supervision, return the finest"),
        ("integers", r"in training, got torch.int64 \(2, 1, 16, 16\)"),
        ("half the size in training", r"in training, got torch.float32 \(2, 1, 16, 8\)"),
        ("infinite in training", r"the network's output in training is not finite"),
        ("missing backend", r"candidate mine needs a package that is missing .*package_that_is_not_installed"),
        ("asks for too much", r"candidate mine: memory ran out .*use a smaller crop"),
    ],
)
def test_a_network_whose_training_goes_wrong_is_refused(prepared: tuple[Store, Split], kind: str, message: str) -> None:
    text = refused(prepared, with_network(kind))
    assert re.search(message, text), text


def test_a_last_bias_that_does_not_move_the_logits_is_refused(prepared: tuple[Store, Split]) -> None:
    network = load_sources(SOURCES).RegisteredBackwards()
    assert "last_bias of the network is not added last to its logits" in refused(prepared, Recipe(network=network))


CACHE: dict[tuple[int, int, int], nn.Module] = {}


class Cached(UNet):
    """Gives every fit the weights that the one before has trained."""

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        key = in_channels, out_channels, dim
        return CACHE.setdefault(key, CACHE.get(key) or super().build(*key))


class Nothing(UNet):
    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        super().build(in_channels, out_channels, dim)  # the mistake: no return


def test_a_network_that_builds_its_layers_once_for_all_fits_is_refused(prepared: tuple[Store, Split]) -> None:
    text = refused(prepared, OURS.replace(network=Cached(filters=(2, 4))))
    assert "build of Cached returns weights that an earlier call has returned" in text


def test_a_network_that_returns_nothing_is_refused_by_name(prepared: tuple[Store, Split]) -> None:
    text = refused(prepared, OURS.replace(network=Nothing(filters=(2, 4))))
    assert "build of Nothing must return a torch.nn.Module, got NoneType" in text


def test_networks_that_recipes_share_are_tried_once(prepared: tuple[Store, Split]) -> None:
    built = []

    class Counted(UNet):
        def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
            built.append(self)
            return super().build(in_channels, out_channels, dim)

    network = Counted(filters=(2, 4))
    losses = {"a": OURS, "b": OURS.replace(loss=Dice()), "c": OURS.replace(activation=NormReLU())}
    check_recipes({name: recipe.replace(network=network) for name, recipe in losses.items()}, *prepared)
    assert len(built) == 2
    check_recipes({"a": OURS.replace(network=network, augment=(Flip(), Mixup(alpha=1)))}, *prepared)
    assert len(built) == 4


# ---------------------------------------------------------------- activations and losses


class Shifted(Sigmoid):
    """Right in training, above 1 in evaluation."""

    def build(self, classes: int) -> nn.Module:
        activation = self

        class Module(nn.Module):
            def forward(self, logits: Tensor) -> Tensor:
                return activation(logits) + (0.0 if self.training else 1.0)

        return Module()


class Cut(Sigmoid):
    """Half as many classes as there are."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()[:, :0]


class OfTheBatch(Loss):
    """A scalar where one loss per sample is asked for."""

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean()


class Miscounted(BatchDice):
    """Says that it averages one number, and averages two."""

    def num_averaged(self, classes: int) -> int:
        return 1


class Unaveraged(Dice):
    """A loss of every class where one of all is asked for."""

    def of_averages(self, averages: Tensor, classes: int, samples: int) -> Tensor:
        return averages


class Infinite(Loss):
    """Not finite for any prediction."""

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).flatten(1).mean(1) / 0


class Rooted(Loss):
    """A finite loss without a finite gradient: the slope of a root is infinite at 0."""

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        root = (prediction - prediction.detach()).square().sqrt()
        return ((prediction - target).square() + root).flatten(1).mean(1)


class Senseless(Loss):
    """A squared error with a mistake that no shape shows."""

    kind: str

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target).square().flatten(1).mean(1)
        return {
            "reversed": -error,
            "random": error + torch.rand(()),
            "of the batch": error + error.mean(),
            "undefined": error + target.flatten(1).sum(1) / target.flatten(1).sum(1),
            "detached": error.detach(),
            "rounded": ((prediction > 0.5) != (target > 0.5)).float().flatten(1).mean(1) + 0 * error,
        }[self.kind]


@pytest.mark.parametrize(
    ("activation", "cause"),
    [
        (Shifted(), "the prediction in evaluation must lie in [0, 1], got [1."),
        (Cut(), "the prediction in training must be as the target, torch.float32 (2, 1, 16, 16), got torch.float32 (2, 0,"),
    ],
    ids=str,
)
def test_a_prediction_that_is_none_is_refused(prepared: tuple[Store, Split], activation: Activation, cause: str) -> None:
    assert cause in refused(prepared, OURS.replace(activation=activation))


@pytest.mark.parametrize(
    "loss", [loss for loss in vars(losses).values() if isclass(loss) and issubclass(loss, Loss)], ids=lambda c: c.__name__
)
def test_every_loss_of_the_package_makes_sense(loss: type[Loss]) -> None:
    if loss not in (Loss, Sum):
        for shape in ((2, 1, 1), (2, 2, 9, 9), (2, 1, 4, 5, 6)):
            _check_sense(loss(), torch.zeros(shape))


@pytest.mark.parametrize("loss", [BatchDice(), Sum(terms=(BatchDice(), BatchDice(smooth=0)), weights=(1, 1))], ids=str)
def test_a_loss_of_the_whole_batch_can_be_trained(prepared: tuple[Store, Split], loss: Loss) -> None:
    check_recipes({"a": OURS.replace(loss=loss)}, *prepared)


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (OfTheBatch(), "per_sample of OfTheBatch() must return one loss per sample, for 2 samples a tensor of shape (2,)"),
        (Miscounted(), "Miscounted() must average 1 numbers of each sample, got (2, 2) for 2 samples"),
        (Unaveraged(), "of_averages of Unaveraged() must return a scalar for one batch, got (1,)"),
        (Infinite(), "Infinite() is not finite"),
        (Rooted(), "the gradient of Rooted() behind Sigmoid() is not finite"),
        (Senseless(kind="reversed"), "must be smaller for a label y than for its opposite 1 - y: is its sign reversed?"),
        (Senseless(kind="random"), "must follow from that sample alone: no random numbers"),
        (Senseless(kind="of the batch"), "of a sample must follow from that sample alone"),
        (Senseless(kind="undefined"), "of an empty prediction of an empty label is not finite"),
        (Senseless(kind="detached"), "has no gradient: leave out what has none, such as a threshold or detach()"),
        (Senseless(kind="rounded"), "has no gradient"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_trained_is_refused(prepared: tuple[Store, Split], loss: Loss, cause: str) -> None:
    text = refused(prepared, OURS.replace(loss=loss))
    assert text.startswith("candidate mine cannot be trained on images of size (16, 16): ")
    assert cause in text


def test_a_single_training_item_is_enough(prepared: tuple[Store, Split]) -> None:
    store, _ = prepared
    data = Phantom(dim=3, subjects=1, size=(16, 16, 16))
    single = Store.open(build_store(store.path.parent, data.cases(None), data, Preprocess(dim=3)))
    check_recipes({"a": OURS}, single, Split(index=0, train=(single.cases[0].subject,)))
