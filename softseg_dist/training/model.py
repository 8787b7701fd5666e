"""A network with its final activation, and how its weights and a fit's checkpoint go to disk and back.

Weights are safetensors files: no pickle. safetensors is imported where it is used, so that code that only trains, as a benchmark on
a bare machine, runs without it. A checkpoint is written whole and read back only by the same fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from softseg_dist.errors import UserError
from softseg_dist.numerics.seeds import seeded
from softseg_dist.places import replace_file
from softseg_dist.sealed import BLANK, Damaged, is_intact, write_sealed
from softseg_dist.study import Recipe
from softseg_dist.training.task import FitTask, checkpoint_path

ANEW = "the fit began anew"
Precision = Literal["float32", "bfloat16"]


class Model(nn.Module):
    """Images [B C *S] -> prediction [B K *S] in [0, 1]; `logits` stops before the activation.

    With a `patch` it is trained on patches; `inference` predicts whole items, not `forward`. `precision` is that of the network's
    arithmetic; weights, logits and prediction are float32.
    """

    def __init__(self, recipe: Recipe, channels: int, classes: int, size: tuple[int, ...]) -> None:
        """The model of a recipe for training items of at most `size` voxels, with weights drawn from torch's global generator."""
        super().__init__()
        dim, self.patch = len(size), recipe.patch
        self.least_size = size if recipe.patch is None else recipe.patch.size  # smaller images are filled up, as in training
        self.precision: Precision = "float32"
        self.num_logits = recipe.activation.num_logits(classes)
        self.network = recipe.network.build(channels, self.num_logits, dim)
        if not isinstance(self.network, nn.Module):
            raise UserError(
                f"build of {type(recipe.network).__name__} must return a torch.nn.Module, got {type(self.network).__name__}"
            )
        self.activation = recipe.activation.build(classes)
        self.layout = torch.channels_last if dim == 2 else torch.channels_last_3d  # the faster one, on CPU and GPU
        self.network.to(memory_format=self.layout)  # type: ignore[call-overload]  # torch does not declare this form
        _keep_plain_layout(self.network)

    @classmethod
    def of_json(cls, recipe: Mapping[str, Any], channels: int, classes: int, size: tuple[int, ...]) -> Self:
        """The model of a recipe's network, activation and patch in JSON. Raises pydantic.ValidationError if one is unknown."""
        parts = {name: recipe.get(name) for name in ("network", "activation", "patch")}
        return cls(Recipe.model_validate(parts), channels, classes, size)

    def on(self, device: str) -> Self:
        """The model on `device`, with exact float32: by default torch lets a GPU round it to 10 bits in convolutions (TF32)."""
        if device.startswith("cuda"):
            torch.backends.cudnn.allow_tf32 = False
        return self.to(device)

    def logits(self, image: Tensor, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[B C *S] -> [B num_logits *S]; `network` replaces the model's own, as by its compiled form.

        Raises UserError if the network returns anything else. Shapes are known without waiting for a device.
        """
        network = self.network if network is None else network
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=False):
            logits = network(image.contiguous(memory_format=self.layout))
        shape, is_tensor = (len(image), self.num_logits, *image.shape[2:]), isinstance(logits, Tensor)
        if not is_tensor or logits.shape != shape or not logits.is_floating_point():
            got = f"{logits.dtype} {tuple(logits.shape)}" if is_tensor else f"a {type(logits).__name__}"
            rule = f"one float tensor of logits {shape} in {'training' if self.training else 'evaluation'}"
            to_do = "of several outputs, as with deep supervision, return the finest"
            raise UserError(f"the network must return {rule}, got {got}; {to_do}")
        return logits.to(image.dtype)

    def forward(self, image: Tensor) -> Tensor:
        """[B C *S] -> [B K *S] in [0, 1]."""
        return self.activation(self.logits(image))


def _keep_plain_layout(network: nn.Module) -> None:
    """Let no channels-last tensor reach convolutions with which oneDNN ends the process, or corrupts its memory, on a CPU.

    With torch 2.13 these are strided 1x1 convolutions of fewer than 16 channels, when the gradient of the weight is computed.
    """

    def plain(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (args[0].clone(memory_format=torch.contiguous_format),) if args[0].device.type == "cpu" else None

    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    for layer in convolutions:
        if set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.in_channels < 16:
            # A 1x1 weight is contiguous in both layouts: only a clone gets the strides of the plain one.
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
            layer.register_forward_pre_hook(plain)


def build_model(recipe: Recipe, channels: int, classes: int, size: tuple[int, ...], seed: int, mean_label: Tensor) -> Model:
    """A new model whose weights depend on `seed` and whose last bias depends on `mean_label` [K], the share of foreground.

    The last bias starts where the activation gives the mean training label (docs/training.md, "Fairness of a comparison"). A
    network without a last bias keeps its own start.
    """
    with seeded(seed):
        model = Model(recipe, channels, classes, size)
    initial = recipe.activation.initial_bias(mean_label)
    if (bias := recipe.network.last_bias(model.network, len(initial))) is not None:
        with torch.no_grad():
            bias.copy_(initial)
    return model


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write all parameters and buffers; a layer with two names is stored twice. The file appears whole or not at all."""
    from safetensors.torch import save_file

    layout = torch.contiguous_format
    state = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in model.state_dict().items()}
    replace_file(path, lambda partial: save_file(state, partial))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote. Raises RuntimeError if the file is none of safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error
    return state


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read what `save_weights` wrote. Raises RuntimeError if names or shapes differ."""
    model.load_state_dict(read_weights(path))


def save_checkpoint(task: FitTask, state: dict[str, Any]) -> None:
    """Replace the fit's checkpoint; after a crash in between the previous one is still there."""

    def write(partial: Path) -> None:
        torch.save({"identity": task.identity, **state}, partial)
        with partial.open("ab") as file:
            file.write(BLANK)

    write_sealed(checkpoint_path(task.folder), write)


def load_checkpoint(task: FitTask, notes: list[str]) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote; None if there is none of this recipe, or it is damaged, which goes into `notes`."""
    path = checkpoint_path(task.folder)
    if not path.exists():
        return None
    if not is_intact(path):
        notes.append(str(Damaged(path, ANEW)))
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state if state["identity"] == task.identity else None
