"""A saved model comes back as it was, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import RECIPE, card_of, model_of, saved

from softseg_dist import Preprocess, UNet
from softseg_dist.errors import UserError
from softseg_dist.sealed import sealed_json
from softseg_dist.sources import Sources
from softseg_dist.study_file import load_sources
from softseg_dist.training.model import load_weights, save_weights
from softseg_dist.training.saved_model import CARD, WEIGHTS, ModelCard, read_card, read_model

STUDY = """
from torch import nn
from softseg_dist import Dice, Network

class HalfDice(Dice):
    pass

class OneConvolution(Network):
    def build(self, in_channels, out_channels, dim):
        return (nn.Conv2d if dim == 2 else nn.Conv3d)(in_channels, out_channels, 3, padding=1)
"""


@pytest.mark.parametrize("dim", [2, 3])
def test_a_saved_model_predicts_as_before(tmp_path: Path, dim: int) -> None:
    card = card_of(Preprocess(dim=dim, crop=(8,) * dim), classes=("a", "b"), channels=2, test_score=0.7)
    model = model_of(card)
    folder = saved(tmp_path / "model", card, model)
    assert {path.name for path in folder.iterdir()} == {CARD, WEIGHTS}
    again = read_card(folder)
    assert again.replace(weights_sha256="") == card
    image = torch.randn(2, 2, *(8,) * dim)
    assert torch.equal(read_model(folder, again)(image), model(image))


def test_a_layer_with_two_names_is_saved_under_both(tmp_path: Path) -> None:
    layer = torch.nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last)
    network = torch.nn.ModuleDict({"first": layer, "again": layer})
    save_weights(network, tmp_path / "weights")
    again = torch.nn.ModuleDict({"first": torch.nn.Conv2d(1, 2, 3), "again": torch.nn.Conv2d(1, 2, 3)})
    load_weights(again, tmp_path / "weights")
    for name in ("first", "again"):
        assert torch.equal(again[name].weight, layer.weight)


def test_saving_again_replaces_the_model(tmp_path: Path) -> None:
    card = card_of(Preprocess())
    saved(tmp_path / "model", card, model_of(card, seed=0))
    later = model_of(card, seed=1)
    folder = saved(tmp_path / "model", card.replace(epochs=9), later)
    image = torch.randn(1, 1, 8, 8)
    assert read_card(folder).epochs == 9
    assert torch.equal(read_model(folder, read_card(folder))(image), later(image))


def test_a_card_whose_dims_disagree_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dim is 2, but size is \(8, 8, 8\)"):
        card_of(Preprocess(dim=2), size=(8, 8, 8))


def edited(**fields: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        about = json.loads((folder / CARD).read_text())
        (folder / CARD).write_bytes(sealed_json(about | fields))

    return edit


def other_weights(folder: Path) -> None:
    other = saved(folder.parent / "other", read_card(folder), model_of(read_card(folder), seed=1))
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no card": (lambda f: (f / CARD).unlink(), "there is no model.json"),
    "no folder": (lambda f: f.rename(f.parent / "moved"), "there is no model.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "there is no model.safetensors"),
    "card torn": (lambda f: (f / CARD).write_text((f / CARD).read_text()[:99]), "not JSON"),
    "card of something else": (lambda f: (f / CARD).write_text("[1]"), "not the card of a model"),
    "later format": (edited(format=3), "has format 3, this version reads 2"),
    "field of a wrong kind": (edited(classes=3), "classes: "),
    "weights torn": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "not the file that model.json"),
    "weights of another save": (other_weights, "not the file that model.json"),
    "other classes": (edited(classes=["a", "b"]), "weights do not fit the recipe"),
    "other network": (
        edited(recipe=RECIPE.replace(network=UNet(filters=(2, 4, 8))).model_dump(mode="json")),
        "weights do not fit the recipe",
    ),
    "unknown network": (edited(recipe={"network": {"type": "Gone"}}), "'Gone' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    card = card_of(Preprocess())
    folder = saved(tmp_path / "model", card, model_of(card))
    act, message = DAMAGE[damage]
    act(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_model(folder, read_card(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def card_of_study(text: str, network: str, loss: str) -> ModelCard:
    """A card whose recipe names classes of the study file `mine`."""
    sources = Sources("mine.py", {"mine.py": text})
    module = load_sources(sources)
    recipe = RECIPE.replace(**{field: getattr(module, name)() for field, name in (("network", network), ("loss", loss)) if name})
    return card_of(Preprocess(), recipe, study_source=sources)


def test_only_a_network_of_the_study_file_needs_it() -> None:
    assert card_of_study(STUDY, "OneConvolution", "").needs_study_file
    assert not card_of_study(STUDY, "", "HalfDice").needs_study_file
    assert not card_of(Preprocess()).needs_study_file


def test_a_network_of_the_study_file_comes_back_once_the_file_has_been_run(tmp_path: Path) -> None:
    card = card_of_study(STUDY, "OneConvolution", "HalfDice")
    module = load_sources(Sources("mine.py", {"mine.py": STUDY}))
    model = model_of(card, RECIPE.replace(network=module.OneConvolution()))
    folder = saved(tmp_path / "model", card, model)
    image = torch.randn(1, 1, 8, 8)
    assert torch.equal(read_model(folder, read_card(folder))(image), model(image))
    unknown = json.loads((folder / CARD).read_text().replace("mine:One", "other:One"))
    (folder / CARD).write_bytes(sealed_json(unknown))
    with pytest.raises(UserError, match="load the study file that defines it first"):
        read_model(folder, read_card(folder))


def test_reading_a_card_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = f"open({str(trace)!r}, 'w')"
    sources = Sources("spy.py", {"spy.py": text})
    card = card_of(Preprocess(), study_source=sources)
    folder = saved(tmp_path / "model", card, model_of(card))
    read_model(folder, read_card(folder))
    assert not trace.exists()
    load_sources(sources)
    assert trace.exists(), "the file would have left a trace"
