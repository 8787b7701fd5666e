"""What to run: a study, its candidates (recipes), its search, and the machine a fit may use.

A study file builds one `Study`; everything in it is a frozen object that validates, prints, compares, goes to JSON and back
and has a fingerprint. Nothing happens when it is built.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from softseg_dist.data.cases import NOT_IN_A_NAME, Case, DataSet
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.splits import Split, Splits, held_out
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen
from softseg_dist.numerics.activations import Activation, NormReLU, Sigmoid, Softmax
from softseg_dist.numerics.labels import LabelMode, check_fusion, check_one_rater
from softseg_dist.numerics.losses import AdaptiveWing, BatchDice, Dice, Loss
from softseg_dist.numerics.metrics import METRICS, TABLE, Metric, SoftMetric, metric_of
from softseg_dist.numerics.networks import Network, UNet
from softseg_dist.numerics.patches import Patch
from softseg_dist.numerics.sampling import Uncertainty
from softseg_dist.numerics.smoothing import Smoothing
from softseg_dist.numerics.spatial import Affine, Elastic
from softseg_dist.numerics.transforms import Augmentation

NAME_LENGTH = 100  # file systems allow 255 bytes for a name, and some names get a suffix
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{,{NAME_LENGTH - 1}}}")
RAY_UNITS = 10_000  # of a GPU or CPU: Ray rounds shares to one of them
WINNER = "winner"  # the winners of all outer splits are reported under this name


def check_name(name: str) -> str:
    """A name of a study or a candidate. Raises UserError if it cannot be that of a folder."""
    if not NAME.fullmatch(name):
        rule = f"letters, digits, '.', '_' and '-' only, at most {NAME_LENGTH} of them"
        raise UserError(f"a name becomes a folder: {rule}, got {name!r:.120}")
    return name


class Optim(Frozen):
    """Adam and its schedule, for one fit.

    `patience` counts epochs without a better objective on validation, and never ends a fit before its next validation; None
    trains for all `epochs`. `clip_norm` bounds the gradient's L2 norm before each step. Defaults follow SoftSeg's published
    configuration where it has one.

    `precision` and `compile` change the speed, and results by rounding alone. In "bfloat16" the network computes in bfloat16.
    Weights, activation, loss, sums, optimizer and metrics stay in float32, as does every prediction after training. "auto"
    depends on the hardware alone, so that all candidates of a study agree. `compile` makes kernels for the network; "auto" does
    so where that saves more time than it takes.
    """

    lr: PositiveFloat = 1e-3
    epochs: int = Field(200, ge=1, le=100_000)
    batch_size: PositiveInt = 16
    patience: PositiveInt | None = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: PositiveFloat | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"


class Recipe(Frozen):
    """One way to train: label mode, fusion, augmentation, smoothing, patches, network, activation, loss, optimizer.

    `label`: "soft" (never rounded), "hard" (rounded once, last), "nearest" or "hard_each" (see `numerics.labels`).
    `fusion`: "mean", "majority", "intersection", "union", "staple", "soft_staple", "random_rater", or "rater:<name>".
    `smoothing`: the last change of a sample's target, after augmentation and rounding; evaluation never sees it.
    `patch`: train on patches of images and predict from overlapping ones; None: from whole images.
    """

    network: Network = UNet()
    activation: Activation = Sigmoid()
    loss: Loss = Dice()
    label: LabelMode = "soft"
    fusion: Annotated[str, AfterValidator(check_fusion)] = "mean"
    augment: tuple[Augmentation, ...] = ()
    smoothing: Smoothing | None = None
    patch: Patch | None = None
    optim: Optim = Optim()


class Race(Frozen):
    """Stop early what is significantly worse on validation than a candidate that has run all splits: see `search.race`.

    The race decides from the split number `start` on. `level` is the chance that it stops a candidate that equals one opponent,
    over all splits together; smaller values make fewer errors and save less. Among 20 equal candidates .37 are stopped, as the
    opponent is the luckiest one; the regret of the final choice is that of the full grid (.164 and .159, simulated). It stops
    proposed candidates only; with `fixed` those of the study file as well, but never the control.
    """

    start: int = Field(3, ge=2)
    level: float = Field(0.1, gt=0, lt=0.5)
    fixed: bool = False


class Search(Frozen):
    """Let Optuna propose candidates: `propose(trial) -> Recipe` is define-by-run, conditional spaces are plain `if`.

    `startup_trials` random candidates come before the TPE model is used. Enqueued candidates do not count as trials.
    `race=None` runs all splits of every candidate.
    """

    propose: Callable[..., Any]
    trials: PositiveInt = 20
    startup_trials: PositiveInt = 10
    race: Race | None = Race()

    def __init__(self, propose: Callable[..., Any], **fields: Any) -> None:
        super().__init__(propose=propose, **fields)  # type: ignore[call-arg]


class TuneEach(Frozen):
    """The same small budget for every fixed candidate to find a learning rate of its own, on validation alone.

    `trials` rates, spaced evenly by ratio over `lr`, each run the first `splits` splits. The rates are the same for all
    candidates, so that comparisons stay fair and paired; the candidate then runs all splits with the one that did best.
    """

    lr: tuple[PositiveFloat, PositiveFloat] = (1e-4, 1e-2)
    trials: int = Field(4, ge=2)
    splits: PositiveInt = 2

    @field_validator("lr")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"lr must be (lowest, highest), got {value}")
        return value

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates that are tried.

        >>> TuneEach(lr=(0.25, 4), trials=3).rates
        (0.25, 1.0, 4.0)
        """
        low, high = self.lr
        return tuple(low * (high / low) ** (trial / (self.trials - 1)) for trial in range(self.trials))


class Resources(Frozen):
    """What one fit may use, and its time limit. Changes no result; flags of the command line override it.

    `gpus_per_fit`: None is one GPU where there is any; 0.25 lets four fits share one; 0 keeps to the CPU. With several
    `workers_per_fit` every batch is divided among them, and CPUs and GPUs count for each worker. `fits_per_gpu`: how many
    fits share one GPU as threads of one process, which is faster than processes.
    """

    workers_per_fit: PositiveInt = 1
    cpus_per_fit: int = Field(1, ge=1, le=4096)
    gpus_per_fit: float | None = Field(None, ge=0)
    fits_per_gpu: PositiveInt | None = None
    max_concurrent: PositiveInt | None = None
    checkpoint_every_s: float = Field(60.0, ge=0)
    time_limit_s: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_way_to_share(self) -> Self:
        if self.fits_per_gpu is not None and self.gpus_per_fit is not None:
            both = f"--fits-per-gpu {self.fits_per_gpu} (in one process) and --gpus-per-fit {self.gpus_per_fit:g} (a process each)"
            raise ValueError(f"{both} both say how fits share GPUs; give one of them")
        if self.fits_per_gpu is not None and self.workers_per_fit > 1:
            both = f"--fits-per-gpu {self.fits_per_gpu} is for fits of one worker, not --workers-per-fit {self.workers_per_fit}"
            raise ValueError(f"{both}; give one of them")
        return self

    def gpus_of_worker(self, any_gpu: bool) -> float:
        """GPUs that each worker of a fit holds. Where the study does not say, it gets one if there is any.

        >>> Resources(fits_per_gpu=3).gpus_of_worker(True)  # rounded down to what Ray counts, so that three are not more than one
        0.3333
        """
        if self.fits_per_gpu is not None:
            return math.floor(RAY_UNITS / self.fits_per_gpu) / RAY_UNITS
        return float(any_gpu) if self.gpus_per_fit is None else self.gpus_per_fit


class Study(Frozen):
    """One question, one data set, splits and candidates.

    `repeats` trains every candidate on every split so often, with other seeds, the same for all candidates: without it the noise of
    seeds and that of splits cannot be separated. Scores are means over repeats. A larger number extends a study.
    `candidates` maps names to recipes (see `factorial`); `control` names the one that all others are tested against.
    `objective` is the metric on validation that picks the best epoch and that a search maximises: the name of one of the package,
    or a `Metric` of your own. It is never the loss, since losses of different candidates are not comparable. A search optimises
    `second_objective` as well; best epochs, ranking and tests stay on `objective`. `tune_each` finds a learning rate for every
    candidate first. `uncertainty` has what every fit measures on its test cases (see `judging.uncertainty`), and the winner's and
    the control's fits together. `validate_every` is the number of epochs from one validation to the next; None: as many as keep it
    to about a tenth of the time. `subjects` keeps the first N subjects only.

    `holdout`, a share of the subjects (up to 0.5) or their names, keeps subjects out of all splits; when the search is complete
    they are evaluated once, for the winner and the control. `nested` makes outer splits: each is a study of its own, with `splits`
    as inner ones, that holds out its outer test subjects.
    """

    DEBUG_SUBJECTS: ClassVar[int] = 6

    name: Annotated[str, AfterValidator(check_name)]
    question: str
    data: DataSet
    preprocess: Preprocess = Preprocess()
    splits: Splits
    repeats: int = Field(1, ge=1, le=1000)
    objective: str | Metric = "brier_skill"
    second_objective: str | Metric | None = None
    candidates: dict[Annotated[str, AfterValidator(check_name)], Recipe] = {}
    control: str | None = None
    search: Search | None = None
    tune_each: TuneEach | None = None
    uncertainty: tuple[Uncertainty, ...] = ()
    validate_every: PositiveInt | None = None
    seed: int = Field(0, ge=0)
    subjects: int | None = Field(None, ge=3)
    holdout: float | tuple[str, ...] | None = None
    nested: Splits | None = None
    resources: Resources = Resources()

    @field_validator("objective", "second_objective")
    @classmethod
    def _known_objective(cls, value: str | Metric | None) -> str | Metric | None:
        if isinstance(value, SoftMetric):
            value = value.name
        known = [name for name in METRICS if TABLE[name].may_lead]
        if isinstance(value, str) and value not in known:
            raise ValueError(f"objective must be one of {', '.join(known)}, or a Metric, got {value!r}")
        if isinstance(value, Metric) and (not NAME.fullmatch(name := value.row.name) or name in TABLE):
            kind = type(value).__name__
            raise ValueError(f"{kind} needs a name of its own for its column, such as short = 'my_metric', got {name!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.candidates and self.search is None:
            raise ValueError("a study needs candidates=..., search=..., or both")
        if self.tune_each is not None and not self.candidates:
            raise ValueError("tune_each tunes the candidates of the study file, and there are none: a search tunes its own")
        if len({metric.row.name for metric in self.objectives}) < len(self.objectives):
            raise ValueError(f"second_objective must differ from the objective, got {self.objectives[0].row.name!r} for both")
        for name, recipe in self.candidates.items():
            self.check_recipe(name, recipe)
        _check_apart("candidates", {name: name for name in self.candidates})
        _check_apart("classes", {name: NOT_IN_A_NAME.sub("-", name) for name in self.data.classes})
        if self.control is not None and self.control not in self.candidates:
            raise ValueError(f"control {self.control!r} is not a candidate; there are {', '.join(self.candidates) or 'none'}")
        if self.holdout == () or (isinstance(self.holdout, float) and not 0 < self.holdout <= 0.5):
            raise ValueError(f"holdout is a share of subjects in (0, 0.5], or names of at least one subject, got {self.holdout}")
        if len({method.short for method in self.uncertainty}) < len(self.uncertainty):
            raise ValueError(f"uncertainty takes one of each kind, or their rows would have one name, got {self.uncertainty}")
        if self.nested is not None and self.holdout is not None:
            raise ValueError("nested holds out the test subjects of its outer splits: give holdout=... or nested=..., not both")
        if self.nested is not None and WINNER in self.candidates:
            raise ValueError(f"no candidate of a nested study may be named {WINNER!r}: its results are reported under that name")
        return self

    @property
    def objectives(self) -> tuple[Metric, ...]:
        """What a search optimises: the objective, and the second one if there is one."""
        return tuple(metric_of(value) for value in (self.objective, self.second_objective) if value is not None)

    def held_out(self, sites: Mapping[str, str]) -> tuple[str, ...]:
        """The subjects (person -> site) that are in no split; () without `holdout`. Raises UserError on unknown names."""
        return held_out(self.holdout, sites, self.seed)

    def make_splits(self, sites: Mapping[str, str], cases: Mapping[str, str] | None = None) -> tuple[Split, ...]:
        """The splits of the subjects (person -> site) that are not held out; `cases` maps cases to persons.

        Raises UserError if they are too few, or not those that given splits name.
        """
        out = self.held_out(sites)
        kept = {subject: sites[subject] for subject in sites.keys() - out}
        cases = {subject: subject for subject in kept} if cases is None else cases
        try:
            return self.splits.of_cases(kept, {case: person for case, person in cases.items() if person in kept}, self.seed)
        except UserError as error:
            if not out:
                raise
            raise UserError(f"{error}; {len(out)} of {len(sites)} subjects are held out") from None

    def bound(self, folder: Path) -> Study:
        """The same study with the content of given splits; a relative file lies in `folder`. Raises UserError on bad files."""
        return self.replace(splits=self.splits.bound(folder), nested=self.nested and self.nested.bound(folder))

    def inner(self, outer: Split) -> Study:
        """The study of one outer split: its test subjects are held out, and the others are split by `splits`."""
        return self.replace(name=f"{self.name}-outer-{outer.name}", nested=None, holdout=outer.test)

    def check_recipe(self, name: str, recipe: Recipe) -> None:
        """Raises ValueError if `recipe` cannot be trained on this study's data."""
        kind, _, rater = recipe.fusion.partition(":")
        known = self.data.rater_names
        if kind == "rater" and known is not None and rater not in known:
            named = ", ".join(known) or "none; rater_names of a data set is None if only the files can tell"
            raise ValueError(f"candidate {name}: fusion names rater {rater!r}, but the raters are {named}")
        if known is not None and len(known) == 1:
            check_one_rater(name, recipe.fusion)
        if isinstance(recipe.activation, Softmax) and len(self.data.classes) > 1 and recipe.label == "hard_each":
            raise ValueError(f"candidate {name}: hard_each rounds classes one by one, which Softmax cannot use")
        if recipe.patch is not None and len(recipe.patch.size) != (dim := self.preprocess.dim):
            raise ValueError(f"candidate {name}: a patch needs {dim} numbers for Preprocess(dim={dim}), got {recipe.patch.size}")

    def debug(self) -> Study:
        """The same study, cut to 2 splits, 2 epochs, few subjects, two trials: does it run at all? Under a minute on 2 cores."""
        recipes = {n: r.replace(optim=r.optim.replace(epochs=min(2, r.optim.epochs))) for n, r in self.candidates.items()}
        few = self.DEBUG_SUBJECTS + (4 if self.nested else 1 if self.holdout else 0)  # as many are left for the splits
        return self.replace(
            name=f"{self.name}-debug",
            splits=self.splits.small(),
            repeats=1,
            candidates=recipes,
            search=self.search and self.search.replace(trials=min(2, self.search.trials)),
            tune_each=self.tune_each and self.tune_each.replace(trials=2, splits=1),
            uncertainty=tuple(method.replace(samples=2) for method in self.uncertainty),
            subjects=min(self.subjects or few, few),
            holdout=self.holdout and 1 / few,  # names may be of later subjects
            nested=self.nested and self.nested.small(),
        )

    def kept(self, cases: Sequence[Case]) -> tuple[Case, ...]:
        """The cases of the first `subjects` subjects, by name."""
        first = sorted({case.subject for case in cases})[: self.subjects]
        return tuple(case for case in cases if case.subject in first)


def _check_apart(kind: str, files: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for name, file in files.items():
        if (other := seen.setdefault(file.casefold(), name)) != name:
            raise ValueError(f"{kind} {other!r} and {name!r} are one in names of files where case does not count; rename one")


def factorial(base: Recipe, **factors: tuple[Any, ...]) -> dict[str, Recipe]:
    """Every combination of `factors` over `base`, named by the short names of what varies, joined by "-".

    >>> from softseg_dist import BCE, Dice, Recipe
    >>> list(factorial(Recipe(), label=("hard", "soft"), loss=(Dice(), BCE())))
    ['hard-dice', 'hard-bce', 'soft-dice', 'soft-bce']

    The names of two values of one class show the fields in which they differ: `wing_omega8`, `wing_omega14`.
    Raises ValueError if a factor is not a field of Recipe, or if two values of one factor are equal.
    """
    named = {field: _levels(field, values) for field, values in factors.items()}
    cells = itertools.product(*named.values())
    return {"-".join(n for n, _ in cell): base.replace(**dict(zip(named, (v for _, v in cell), strict=True))) for cell in cells}


def softseg_parity(fusion: str = "random_rater") -> dict[str, Recipe]:
    """The recipes "conventional" and "softseg" as the code that SoftSeg was published with (ivadomed) trained them.

    They differ in three things. "conventional": hard labels, sigmoid, `BatchDice` over batch and classes with s = 1. "softseg":
    soft labels, NormReLU by the maximum of the batch (divided by the sum over classes if there are several), Adaptive Wing,
    summed, omega = 14 (the paper has 8 for MS lesions). Both: conv 3x3 - ReLU - batch norm - dropout of whole channels, twice
    per level; last conv 3x3; 64 filters that double over 3 levels, linear up-sampling; Adam, 1e-3, cosine to 0, 200 epochs,
    patience 50; affine and elastic augmentation. The cells of a `factorial` over our defaults are not these recipes.

    Not known: the share of dropout and the momentum of batch norm (PyTorch's defaults, .5 and .1), the batch size (our 16), the
    size of the elastic field (our default), how channels are reduced before up-sampling (a 1x1 convolution) and whether its corners
    are aligned (they are), initial weights (PyTorch's; the last bias starts where ours does, so that a short training does not
    compare initialisations). The NormReLU of one class depends on how many workers share a batch, as theirs did: use one.

    Args:
        fusion: a rater is drawn at random per item and epoch, as there. Data with one rater per case need "mean".

    Source: Gros et al., Med Image Anal 71 (2021) 102038, doi 10.1016/j.media.2021.102038; ivadomed at commit 46248ae.

    >>> {name: recipe.label for name, recipe in softseg_parity().items()}
    {'conventional': 'hard', 'softseg': 'soft'}
    """
    network = UNet(filters=(64, 128, 256), dropout=0.5, order="relu-norm-dropout", last_kernel=3)
    shared = Recipe(network=network, fusion=fusion, augment=(Affine(), Elastic()), optim=Optim(precision="float32"))
    conventional = shared.replace(label="hard", loss=BatchDice(over="batch and classes"))
    ours = {"label": "soft", "activation": NormReLU(over="batch", share=True), "loss": AdaptiveWing(reduction="sum")}
    return {"conventional": conventional, "softseg": shared.replace(**ours)}


def _levels(field: str, values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    if field not in Recipe.model_fields:
        raise ValueError(f"factor {field!r} is not a field of Recipe; there are {', '.join(Recipe.model_fields)}")
    names = [_short(value) + _difference(value, [v for v in values if _short(v) == _short(value)]) for value in values]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        shown = ", ".join(str(value) for name, value in zip(names, values, strict=True) if name == twice)
        raise ValueError(f"two values of factor {field!r} are the same, or have one short name, {twice!r}: {shown}")
    return list(zip(names, values, strict=True))


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "+".join(map(_short, value)).replace("+", "_") or "none"
    if not isinstance(value, Frozen):
        return str(value).replace(":", "_")
    return vars(type(value)).get("short") or type(value).__name__.lower()  # that of a base class names the base class


def _difference(value: Any, among: list[Any]) -> str:
    if not isinstance(value, Frozen) or len({type(v) for v in among}) > 1:
        return ""
    fields = [f for f in type(value).model_fields if len({str(getattr(v, f)) for v in among}) > 1]
    return "".join(f"_{f}{_number(getattr(value, f))}" for f in fields)


def _number(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")
