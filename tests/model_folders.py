"""Model folders for tests: a small U-Net with random weights, or with weights that pass the image through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from softseg_dist import NormReLU, Preprocess, Recipe, Sigmoid, UNet
from softseg_dist.training.model import Model, save_weights
from softseg_dist.training.saved_model import ModelCard, save_model

RECIPE = Recipe(network=UNet(filters=(2, 4)), activation=Sigmoid())
PASSING = Recipe(network=UNet(filters=(2, 4)), activation=NormReLU(over="batch"))


def card_of(preprocess: Preprocess, recipe: Recipe = RECIPE, **fields: Any) -> ModelCard:
    known: dict[str, Any] = {
        "study": "s000_test",
        "question": "Does it predict?",
        "candidate": "soft",
        "recipe": recipe.model_dump(mode="json"),
        "classes": ("GM",),
        "dim": preprocess.dim,
        "channels": 1,
        "size": (8, 8, 8)[: preprocess.dim],
        "preprocess": preprocess,
        "epochs": 3,
        "thresholds": {"fixed": 0.5, "grid": 0.35},
        "objective": "dice_dml",
        "num_subjects": 6,
        "store_fingerprint": "0123456789abcdef",
        "versions": {"torch": "2"},
        "created": "2025-01-31",
    }
    return ModelCard(**known | fields)


def model_of(card: ModelCard, recipe: Recipe = RECIPE, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model(recipe, card.channels, len(card.classes), card.size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # predictions that differ from voxel to voxel
    return model.eval()


def passing_model(card: ModelCard) -> Model:
    """logits = image where it is >= 0, bit for bit: every convolution of the finest level hands its centre voxel on."""
    model = model_of(card, PASSING)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                module.weight.zero_()
                module.weight[0, 0][tuple(n // 2 for n in module.kernel_size)] = 1.0
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.weight.fill_(1.0)
                module.bias.zero_()
                module.running_mean.zero_()
                module.running_var.fill_(1 - module.eps)
    return model


def saved(folder: Path, card: ModelCard, model: Model) -> Path:
    """`folder`, with the model in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = folder.parent / f"{folder.name}.safetensors"
    save_weights(model, weights)
    save_model(folder, card, weights)
    return folder
