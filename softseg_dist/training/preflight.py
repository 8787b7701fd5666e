"""Preflight: can these recipes be trained on this store, and can their uncertainty be measured?

Every recipe is tried on two training items, in training and in evaluation, in a child process: a network may crash in compiled code
or run out of memory, which ends its process. A failure becomes a sentence that names the candidate. The child is a new interpreter
without the main module, so that notebooks and scripts without `if __name__ == "__main__"` can start it.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store
from softseg_dist.errors import UserError
from softseg_dist.frozen import canonical_json
from softseg_dist.numerics.labels import check_one_rater
from softseg_dist.numerics.losses import Loss
from softseg_dist.numerics.networks import Network
from softseg_dist.numerics.sampling import Uncertainty
from softseg_dist.sources import Sources
from softseg_dist.study import Recipe
from softseg_dist.study_file import line_of, load_sources
from softseg_dist.training.batches import Batches, cases_of
from softseg_dist.training.inference import sample_maps
from softseg_dist.training.model import Model

TASK = TypeAdapter(tuple[dict[str, Recipe], tuple[Uncertainty, ...]])
CHILD = "from softseg_dist.training.preflight import run_child; run_child()"
OUT_OF_MEMORY = "can't allocate memory", "not enough memory", "out of memory"  # in messages of torch
ROUNDING = 1e-6  # a prediction may leave [0, 1] by this much


def start_child() -> subprocess.Popen[bytes]:
    """Start the child of `preflight`: its imports take seconds, which can pass while data are prepared. A closed input ends it."""
    path = os.pathsep.join(map(os.path.abspath, sys.path))  # "" is the working directory
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONBREAKPOINT": "0"}
    # -P: a module in the working directory must not shadow another one.
    command, pipe = [sys.executable, "-P", "-c", CHILD], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


def preflight(
    recipes: Mapping[str, Recipe],
    methods: Sequence[Uncertainty],
    store: Store,
    split: Split,
    sources: Sources | None,
    child: subprocess.Popen[bytes] | None = None,
) -> None:
    """Try `recipes` and uncertainty `methods` on the first training items of `split`, in a child process.

    `sources` define the classes of the study file; None if it has none. `child` is from `start_child`; None starts one.
    Raises UserError that names the candidate and the cause if a recipe cannot be trained or a method cannot be used with it.
    """
    task = pickle.dumps((sources, store, split, TASK.dump_json((dict(recipes), tuple(methods)))))
    with child or start_child() as process:
        try:
            output, errors = process.communicate(task)
        except BaseException:  # such as Ctrl-C
            process.kill()
            raise
    reports = [json.loads(line) for line in output.splitlines()]
    kind, text = reports[-1] if reports else ("", "")
    if kind == "refused":
        raise UserError(text)
    if kind != "done":
        messages = errors.decode(errors="replace")
        if kind != "candidate" and process.returncode > 0:
            raise RuntimeError(f"the process that tries the recipes failed:\n{messages}")
        raise UserError(_death(text, process.returncode, messages))


def _death(candidate: str, code: int, output: str) -> str:
    """Why the child ended without a result, from its exit code (minus the signal) and its output."""
    subject = f"candidate {candidate}" if candidate else "the recipes"
    if code == -signal.SIGKILL:
        killed = "was killed (SIGKILL), probably because memory ran out; free some, or use a smaller crop, patch or network"
        return f"{subject}: the process that tried two training items {killed}"
    end = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    cause = "in compiled code or by a call that ends the process"
    to_do = "use another network or loss, or another version of the package that it comes from"
    last = " ".join(output.split()[-40:]) or "none"
    return f"{subject}: the process that tried two training items {end}, {cause}; {to_do}; last output: {last}"


def run_child() -> None:
    """The child process: do the task of `preflight` on standard input."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of the study file's classes goes to standard error

    def report(kind: str, text: str = "") -> None:
        reports.write(json.dumps([kind, text]) + "\n")

    sources, store, split, in_json = pickle.load(sys.stdin.buffer)
    try:
        if sources is not None:
            load_sources(sources)
        recipes, methods = TASK.validate_json(in_json)
        check_recipes(recipes, store, split, methods, lambda name: report("candidate", name))
    except UserError as error:
        report("refused", str(error))
    else:
        report("done")
    reports.flush()
    os._exit(0)  # threads of the study file must not keep the process alive


def check_recipes(
    recipes: Mapping[str, Recipe],
    store: Store,
    split: Split,
    methods: Sequence[Uncertainty] = (),
    on_candidate: Callable[[str], None] = lambda name: None,
) -> None:
    """Try every recipe on two training items, and draw a sample of one with each of `methods`, in this process.

    `on_candidate` gets the name of each before it is tried. Raises UserError that names the candidate and the cause if a recipe
    lacks raters or cannot be trained, or a method cannot be used with its network or on these images.
    """
    if all(len(case.rater_names) == 1 for case in store.cases):
        for name, recipe in recipes.items():
            check_one_rater(name, recipe.fusion)
    trial = _Trial(store, split)
    for name, recipe in recipes.items():
        on_candidate(name)
        patches = "" if recipe.patch is None else f"patches of size {recipe.patch.size} from "
        with _as_user_error(name, f" cannot be trained on {patches}images of size {store.size}"):
            trial.run(recipe)
        if methods:
            model = Model(recipe, store.channels, len(store.classes), store.size)
            check_methods(name, model, methods)
        for method in methods:
            with _as_user_error(name, f": {method}"):
                next(sample_maps(model, trial.one_item, method, seed=0))


def check_methods(candidate: str, model: nn.Module, methods: Sequence[Uncertainty]) -> None:
    """Raises UserError that names the candidate if all samples of its model would be equal."""
    for method in methods:
        with _as_user_error(candidate):
            method.check(model)


@contextmanager
def _as_user_error(candidate: str, what: str = "") -> Iterator[None]:
    """Turns every exception into a UserError of one sentence, which blames the candidate, a missing package or memory."""
    try:
        yield
    except Exception as error:  # classes of a study file may raise anything
        cause = " ".join((str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}").split())
        if isinstance(error, ImportError):
            text = f" needs a package that is missing ({cause:.200}): install it on every machine that runs fits"
        elif isinstance(error, MemoryError) or any(words in cause for words in OUT_OF_MEMORY):
            text = f": memory ran out ({cause:.200}): free some, or use a smaller crop, patch or network"
        else:
            text = f"{what}: {cause:.400}" + (f" ({place})" if (place := line_of(error)) else "")
        raise UserError(f"candidate {candidate}{text}") from error


class _Trial:
    """Runs recipes on two training items of a store, as a fit does. A network that recipes share runs once."""

    def __init__(self, store: Store, split: Split) -> None:
        items = [(case, i) for case in cases_of(store, split.train) for i in range(store.cases[case].num_items)]
        self.store, self.items = store, (items[0], items[min(1, len(items) - 1)])
        case, item = items[0]
        sample = store.sample(case)
        self.one_item = replace(sample, image=sample.image[item : item + 1])
        self._logits: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, recipe: Recipe) -> None:
        """Computes batch, logits, prediction, loss and gradient in training, and the prediction in evaluation. Raises any error."""
        batches = Batches(self.store, recipe, self.items, seed=0)
        image, target = batches.batch(epoch=0, members=[0, 1], device="cpu")
        _check_finite(image, "the augmented image")
        _check_finite(batches.known(target, target)[1], "the target")
        trained, evaluated = self._logits_of(recipe, image)
        activation = recipe.activation.build(len(self.store.classes))
        logits = trained.clone().requires_grad_()
        prediction = activation.train()(logits)
        _check_prediction(prediction, target, "in training")
        loss = _loss(recipe.loss, *batches.known(prediction, target))
        _check_finite(torch.autograd.grad(loss, logits)[0], f"the gradient of {recipe.loss} behind {recipe.activation}")
        with torch.no_grad():
            _check_prediction(activation.eval()(evaluated), target[:1], "in evaluation")

    def _logits_of(self, recipe: Recipe, image: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the images in training, and of the first one in evaluation, by the recipe's network."""
        classes = len(self.store.classes)
        num_logits = recipe.activation.num_logits(classes)
        key = canonical_json([recipe.network.model_dump(mode="json"), num_logits, image.shape])
        if key not in self._logits:
            model, again = (Model(recipe, self.store.channels, classes, self.store.size) for _ in range(2))
            _check_apart(model, again, recipe.network)
            trained = model.train().logits(image)
            _check_finite(trained, "the network's output in training")
            trained.square().mean().backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    _check_finite(parameter.grad, f"the gradient of {name}")
            with torch.no_grad():
                evaluated = model.eval().logits(image[:1])
                _check_finite(evaluated, "the network's output in evaluation")
                _check_last_bias(recipe.network.last_bias(model.network, num_logits), model, image[:1], evaluated)
            self._logits[key] = trained.detach(), evaluated
        return self._logits[key]


def _check_apart(model: Model, again: Model, network: Network) -> None:
    """Raises UserError if two models of `network` share weights: then each fit would go on from those of the one before."""
    weights = ({id(tensor) for tensor in (*each.parameters(), *each.buffers())} for each in (model, again))
    if set.intersection(*weights):
        why = "so one fit would go on from those of another; make every layer inside of build"
        raise UserError(f"build of {type(network).__name__} returns weights that an earlier call has returned, {why}")


def _check_last_bias(bias: Tensor | None, model: Model, image: Tensor, logits: Tensor) -> None:
    """Raises ValueError if `bias` is not added last to the `logits` of `image` [1 C *S]: then it changes them in another way."""
    if bias is None:
        return
    if bias.shape != (logits.shape[1],):
        raise ValueError(f"last_bias must return one value for each of {logits.shape[1]} logits, got {tuple(bias.shape)}")
    shift = torch.arange(1.0, 1 + len(bias)).reshape(-1, *[1] * (logits.ndim - 2))
    bias.add_(shift.flatten())
    moved = model.logits(image) - logits
    if moved.any() and not torch.allclose(moved, shift.expand_as(moved), atol=1e-3 * (1 + logits.abs().max().item())):
        to_do = "remove an activation at its end, as the recipe's follows; if another layer is last, override last_bias to return"
        raise ValueError(f"last_bias of the network is not added last to its logits: {to_do} the bias of that one, or None")


def _check_prediction(prediction: object, target: Tensor, mode: str) -> None:
    if not isinstance(prediction, Tensor):
        raise TypeError(f"the prediction {mode} must be one tensor, got a {type(prediction).__name__}")
    if prediction.shape != target.shape or prediction.dtype != target.dtype:
        wanted, got = (f"{maps.dtype} {tuple(maps.shape)}" for maps in (target, prediction))
        raise ValueError(f"the prediction {mode} must be as the target, {wanted}, got {got}")
    _check_finite(prediction, f"the prediction {mode}")
    low, high = prediction.min().item(), prediction.max().item()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"the prediction {mode} must lie in [0, 1], got [{low:g}, {high:g}]")


def _check_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{what} is not finite")


def _loss(loss: Loss, prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of two samples, a scalar, whose parts have the shapes that training relies on."""
    of_sample = loss.per_sample(prediction, target)
    if not isinstance(of_sample, Tensor) or of_sample.shape != (2,):
        got = f"shape {tuple(of_sample.shape)}" if isinstance(of_sample, Tensor) else f"{of_sample!r:.80}"
        raise ValueError(f"per_sample of {loss} must return one loss per sample, for 2 samples a tensor of shape (2,); got {got}")
    averaged, count = loss.averaged(prediction, target), loss.num_averaged(prediction.shape[1])
    if averaged.shape != (2, count):
        raise ValueError(f"{loss} must average {count} numbers of each sample, got {tuple(averaged.shape)} for 2 samples")
    total = loss(prediction, target)
    if total.shape != ():
        raise ValueError(f"of_averages of {loss} must return a scalar for one batch, got {tuple(total.shape)}")
    _check_finite(total, f"{loss}")
    _check_sense(loss, target)
    return total


def _check_sense(loss: Loss, target: Tensor) -> None:
    """Raises ValueError unless the loss is a function of each sample that leads from the opposite of a label to the label."""
    label = torch.zeros_like(target)
    _check_finite(loss.averaged(label, label), f"{loss} of an empty prediction of an empty label")
    label[..., : (target.shape[-1] + 2) // 3] = 1  # a third of the image, whatever the data are
    near, far = label.clamp(0.01, 0.99), (1 - label).clamp(0.01, 0.99).requires_grad_()
    beside = loss.averaged(torch.cat([near[:1], far.detach()[1:]]), label)[:1]
    if not torch.allclose(beside, loss.averaged(near[:1], label[:1]), rtol=1e-3, atol=1e-5):
        raise ValueError(f"{loss} of a sample must follow from that sample alone: no random numbers, no mean over the first axis")
    from_far = loss(far, label)
    if not loss(near, label) < from_far:
        raise ValueError(f"{loss} must be smaller for a label y than for its opposite 1 - y: is its sign reversed?")
    if not (from_far.requires_grad and torch.autograd.grad(from_far, far)[0].any()):
        raise ValueError(f"{loss} has no gradient: leave out what has none, such as a threshold or detach()")
