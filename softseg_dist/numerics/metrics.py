"""Metrics of a prediction against a reference: the table of all of them, soft overlap and errors, masks, volume, calibration.

A case's maps are [N K *S]: N volumes (1 for a whole case), K classes, *S space; T thresholds; V the volume of a voxel. Every metric
is taken over the whole case and per class, so results are arrays [K]. Sums run in float64.

`TABLE` has what is to be known of every metric: its name, direction, perfect value, and what empty maps do. Whether a value exists
depends on the reference alone, so that a candidate which misses a structure gets the worst value, not none. "Empty" means that a
map sums to 0, and at a threshold that {reference >= 0.5} holds no voxel. What does not exist is NaN.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import model_serializer, model_validator
from scipy import ndimage

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen

Values = npt.NDArray[np.floating]
Map = npt.NDArray[np.floating]  # [N K *S], in [0, 1]
PerClass = npt.NDArray[np.float64]  # [K]


@dataclass(frozen=True)
class Scale:
    """The sizes that maps [N K *S] have in the world.

    Args:
        voxel_mm3: volume of a voxel, in mm3.
        mean_volumes_mm3: [K] the mean over all cases of the data set of the raters' mean volume of each class, in mm3.
        spacing_mm: size of a voxel along each axis of *S, in mm.
        shape: voxels of the image along each axis, if the maps are a part of it outside of which all are 0; None: *S.
        ignored: [N 1 *S] the voxels that nobody labelled, None for none: maps are 0 there, and they count nowhere.
    """

    voxel_mm3: float
    mean_volumes_mm3: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    shape: tuple[int, ...] | None = None
    ignored: npt.NDArray[np.bool_] | None = field(default=None, compare=False)

    def voxels(self, maps: Map) -> int:
        """Of one class in the image, but for those to ignore."""
        return math.prod(self.shape or (len(maps), *maps.shape[2:])) - (0 if self.ignored is None else int(self.ignored.sum()))

    def diagonal_mm(self, maps: Map) -> float:
        """Of the image."""
        return math.hypot(*(n * mm for n, mm in zip(self.shape or maps.shape[2:], self.spacing_mm, strict=True)))


@dataclass(frozen=True)
class Row:
    """A metric of the results table: what it is called, which way is better, and what it does with empty maps.

    Args:
        name: as in the column `metric`; a metric of a mask has one row per threshold.
        title: in a sentence; `meaning` explains it to a reader who has not met it.
        higher_is_better: None where neither direction is, as for a signed error.
        best: the value of a perfect prediction.
        perfect: when a prediction equal to its reference has the value `best`: "always", for masks "at .5", where all raters
            are one hard rater, or "no".
        when_prediction_empty: the value of an empty prediction of a reference that is not; None: as the formula gives it;
            "diagonal": the length of the diagonal of the image, in mm.
        exists_when_empty: whether there is a value where the reference is empty.
        against: "each" of the references, their "mean" alone, or all "raters" at once.
        at_threshold: it is one of the mask {prediction >= threshold}.
    """

    name: str
    title: str
    meaning: str
    higher_is_better: bool | None
    best: float
    perfect: Literal["always", "at .5", "one hard rater", "no"] = "always"
    when_prediction_empty: float | Literal["diagonal"] | None = None
    exists_when_empty: bool = False
    against: Literal["each", "mean", "raters"] = "each"
    at_threshold: bool = False

    @property
    def sign(self) -> int:
        """+1 if a higher value is better, else -1."""
        return 1 if self.higher_is_better else -1

    @property
    def full_title(self) -> str:
        """The title, and `(lower is better)` where that is so."""
        return self.title if self.sign > 0 else f"{self.title} (lower is better)"

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest value that it can have, as far as the table tells: none is better than a perfect one."""
        if self.higher_is_better is None or math.isnan(self.best):
            return -math.inf, math.inf
        worst = self.when_prediction_empty if self.higher_is_better else None
        return (0.0 if worst == 0 else -math.inf, self.best) if self.higher_is_better else (self.best, math.inf)

    @property
    def may_lead(self) -> bool:
        """Whether it may be an objective: it has a direction, needs no threshold, and a perfect prediction has its best value."""
        return self.perfect == "always" and self.higher_is_better is not None


class Metric(Frozen, ABC):
    """A metric of soft maps that may be an objective of a study. A subclass implements `__call__`; plain numpy.

    `short` is its name in the results table, in MLflow and in histories; `title` is it in a sentence, and the first line of
    the docstring explains it. All three are class variables, written without a type.
    """

    title: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, prediction: Map, reference: Map, scale: Scale) -> PerClass:
        """The value per class [K] of maps [N K *S] in [0, 1]; NaN where the reference allows none, whatever the prediction."""

    @property
    def row(self) -> Row:
        """Its line of the table."""
        meaning = inspect.cleandoc(type(self).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        return Row(self.short, self.title or self.short, meaning, self.higher_is_better, np.nan)

    @model_serializer(mode="plain")
    def _tagged(self) -> dict[str, Any]:
        """With what a report shows of the metric, so that it need not run the code that defines it."""
        row = {name: getattr(self.row, name) for name in ("name", "title", "meaning", "higher_is_better")}
        return super()._tagged() | {"row": row}

    @model_validator(mode="before")
    @classmethod
    def _without_row(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if name != "row"} if isinstance(data, dict) else data


NUM_BINS = 10
NEAR_MM, NEAR_VOXELS = 5.0, 3  # along every axis, around what any rater labelled: the background that counts for calibration


class Reliability(NamedTuple):
    """A reliability table: per bin [10] the number of voxels, the sum of p and the sum of y over them.

    Sums, not means, so that the tables of several cases add up to the table of all. Bin b holds b/10 <= p < (b+1)/10, the
    last one p = 1, too. A calibrated map has equal sums of p and y in every bin.
    """

    voxels: npt.NDArray[np.float64]
    prediction: npt.NDArray[np.float64]
    reference: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: sum over bins of (n_b / n) |mean p - mean y|, in [0, 1]; NaN without a voxel.

        Source: Naeini et al. 2015 (doi 10.1609/aaai.v29i1.9602), with soft y.
        """
        return float(self._gaps.sum() / self.voxels.sum()) if self.voxels.any() else float("nan")

    @property
    def largest_error(self) -> float:
        """The largest |mean p - mean y| of a bin with voxels; NaN without a voxel."""
        known = self.voxels > 0
        return float((self._gaps[known] / self.voxels[known]).max()) if known.any() else float("nan")

    @property
    def _gaps(self) -> npt.NDArray[np.float64]:
        return np.abs(self.prediction - self.reference)


def reliability(prediction: Values, reference: Values) -> Reliability:
    """The table of voxels [n] of one class: p in [0, 1], soft y in [0, 1]."""
    bins = np.minimum((prediction * NUM_BINS).astype(np.intp), NUM_BINS - 1)
    return Reliability(*(np.bincount(bins, of, NUM_BINS).astype(np.float64) for of in (None, prediction, reference)))


def bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box around `mask` [*S]; without a voxel if it is empty."""
    others = (tuple(other for other in range(mask.ndim) if other != axis) for axis in range(mask.ndim))
    places = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0) for at in places)


def reach_of(spacing_mm: Sequence[float]) -> list[int]:
    """How many voxels the calibration neighbourhood reaches along each axis."""
    return [max(NEAR_VOXELS, int(NEAR_MM / mm + 1e-6)) for mm in spacing_mm]


def neighbourhood(reference: Map, spacing_mm: Sequence[float]) -> npt.NDArray[np.bool_]:
    """The calibration neighbourhood [N K *S]: within 5 mm and at least 3 voxels, along every axis, of a voxel with y > 0.

    The easy background far away would dominate every mean. It depends on the reference alone, so that all candidates are
    measured on the same voxels; none where the reference is empty.
    """
    reach = reach_of(spacing_mm)
    near = np.zeros(reference.shape, dtype=np.bool_)
    for place in np.ndindex(reference.shape[:2]):
        labelled = reference[place] > 0
        box = bounding_box(labelled)
        if box[0].stop == 0:
            continue
        around = tuple(slice(max(0, s.start - r), s.stop + r) for s, r in zip(box, reach, strict=True))
        grown = labelled[around].view(np.uint8)
        for axis, r in enumerate(reach):
            grown = ndimage.maximum_filter1d(grown, 2 * r + 1, axis=axis, mode="constant")
        near[place][around] = grown
    return near


class Pair:
    """A prediction and its reference [N K *S], and what several metrics need of them, computed when it is first asked for."""

    def __init__(self, prediction: Map, reference: Map, scale: Scale) -> None:
        self.maps, self.scale, self.num_classes = (prediction, reference), scale, prediction.shape[1]
        self.voxels = scale.voxels(prediction)

    @cached_property
    def predicted(self) -> PerClass:
        """sum p."""
        return self._each(lambda p, _: p.sum(dtype=np.float64))

    @cached_property
    def true(self) -> PerClass:
        """sum y."""
        return self._each(lambda _, y: y.sum(dtype=np.float64))

    @cached_property
    def product(self) -> PerClass:
        """sum p y."""
        return self._each(lambda p, y: (p * y).sum(dtype=np.float64))

    @cached_property
    def absolute(self) -> PerClass:
        """sum |p - y|."""
        return self._each(lambda p, y: np.abs(p - y).sum(dtype=np.float64))

    @cached_property
    def squared(self) -> PerClass:
        """sum (p - y)^2."""
        return self._each(lambda p, y: np.square(p - y, dtype=np.float64).sum())

    @cached_property
    def near(self) -> npt.NDArray[np.bool_]:
        """The calibration neighbourhood [N K *S] of the reference."""
        near, ignored = neighbourhood(self.maps[1], self.scale.spacing_mm), self.scale.ignored
        return near if ignored is None else near & ~ignored

    @cached_property
    def tables(self) -> tuple[Reliability, ...]:
        """The reliability table of each class over its calibration neighbourhood."""
        (p, y), near = self.maps, self.near
        return tuple(reliability(p[:, k][near[:, k]], y[:, k][near[:, k]]) for k in range(self.num_classes))

    def _each(self, of: Callable[[Values, Values], Any]) -> PerClass:
        p, y = self.maps
        return np.array([of(p[:, k], y[:, k]) for k in range(self.num_classes)], dtype=np.float64)


def _brier_skill(pair: Pair) -> PerClass:
    volumes = np.asarray(pair.scale.mean_volumes_mm3, dtype=np.float64)
    if not (volumes > 0).all():
        raise UserError(f"brier_skill needs classes with a volume above 0 in the data set, got {volumes.tolist()} mm3")
    return 1 - pair.scale.voxel_mm3 * pair.squared / volumes


def _volume_error(pair: Pair) -> PerClass:
    return ratio(pair.predicted - pair.true, pair.true)


def _qubiq(pair: Pair) -> PerClass:
    """Where no vote share reaches 0.1 there is no level to compare at: NaN."""

    def of_class(p: Values, y: Values) -> float:
        some = np.maximum(p, y) >= LEVELS[0]
        p, y = p[some], y[some]
        levels = [(p >= t, y >= t) for t in LEVELS]
        dice = [2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)) for a, b in levels if b.any()]
        return float(np.mean(dice)) if dice else np.nan

    return pair._each(of_class)


def _if_labelled(pair: Pair, values: PerClass) -> PerClass:
    return np.where(pair.true > 0, values, np.nan)


LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of QUBIQ
FORMULAS: dict[str, Callable[[Pair], PerClass]] = {  # of the metrics of soft maps; `TABLE` explains each
    "brier_skill": _brier_skill,
    "brier_skill_case": lambda pair: 1 - ratio(pair.squared, pair.true),
    "brier": lambda pair: pair.squared / pair.voxels,
    "mse": lambda pair: pair.squared / pair.voxels,
    "mae": lambda pair: pair.absolute / pair.voxels,
    "dice_dml": lambda p: _if_labelled(p, ratio(p.predicted + p.true - p.absolute, p.predicted + p.true)),
    "dice_soft": lambda pair: _if_labelled(pair, ratio(2 * pair.product, pair.predicted + pair.true)),
    "volume_error": _volume_error,
    "volume_error_abs": lambda pair: np.abs(_volume_error(pair)),
    "volume_difference_mm3": lambda pair: np.abs(pair.predicted - pair.true) * pair.scale.voxel_mm3,
    "ece": lambda pair: np.array([table.error for table in pair.tables]),
    "ece_max": lambda pair: np.array([table.largest_error for table in pair.tables]),
    "qubiq": _qubiq,
}


class SoftMetric(Metric):
    """A metric of `TABLE` that needs no threshold, by its name."""

    name: str

    @property
    def row(self) -> Row:
        return TABLE[self.name]

    def __call__(self, prediction: Map, reference: Map, scale: Scale) -> PerClass:
        return FORMULAS[self.name](Pair(prediction, reference, scale))


METRICS = {name: SoftMetric(name=name) for name in FORMULAS}


def metric_of(objective: str | Metric) -> Metric:
    """The metric that an objective of a study names or is."""
    return METRICS[objective] if isinstance(objective, str) else objective


def row_of(objective: str | Mapping[str, Any]) -> Row:
    """The line of the table of an objective as study.json has it: a name, or the JSON of a user's metric."""
    return TABLE[objective] if isinstance(objective, str) else Row(**objective["row"], best=np.nan)


def measured(metric: Metric, prediction: Map, reference: Map, scale: Scale) -> PerClass:
    """The value per class [K] of any metric. Raises UserError if it is not one number per class, or infinite."""
    values = np.asarray(metric(prediction, reference, scale), dtype=np.float64)
    if values.shape != prediction.shape[1:2] or np.isinf(values).any():
        rule = f"must return one finite number or NaN for each of {prediction.shape[1]} classes"
        raise UserError(f"metric {metric.row.name} {rule}, got {values.tolist()}")
    return values


def objective_score(metric: Metric, prediction: Map, reference: Map, scale: Scale) -> float:
    """The signed objective of one case, higher is better: the mean over classes with a value; NaN if none has one."""
    values = metric.row.sign * measured(metric, prediction, reference, scale)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def soft_metrics(pair: Pair, *, against_mean: bool) -> dict[str, PerClass]:
    """All metrics that need no threshold, each an array [K], and both volumes; those against the raters' mean if it is that."""
    values = {name: of(pair) for name, of in FORMULAS.items() if against_mean or TABLE[name].against == "each"}
    voxel_mm3 = pair.scale.voxel_mm3
    return values | {"volume_pred_mm3": pair.predicted * voxel_mm3, "volume_true_mm3": pair.true * voxel_mm3}


class Confusion(NamedTuple):
    """True and false positives and negatives in voxels, per class and threshold, each [K T] in float64."""

    tp: npt.NDArray[np.float64]
    fp: npt.NDArray[np.float64]
    fn: npt.NDArray[np.float64]
    tn: npt.NDArray[np.float64]


def confusion(prediction: Map, reference: Map, thresholds: Sequence[float], voxels: int | None = None) -> Confusion:
    """Counts of {prediction >= tau} against {reference >= 0.5} for all `thresholds` (above 0) at once: one pass over the voxels.

    `voxels` is the number in the image, if the maps are a part of it outside of which both are 0.
    """
    taus, order = np.unique(np.asarray(thresholds, dtype=prediction.dtype), return_inverse=True)
    reaching, positives = [], []
    for k in range(prediction.shape[1]):
        p, y = prediction[:, k].ravel(), reference[:, k].ravel() >= 0.5
        above = np.flatnonzero(p >= taus[0])  # the others are background at every threshold
        level = np.searchsorted(taus, p[above], side="right") - 1  # the highest threshold that the voxel reaches
        counts = np.bincount(2 * level + y[above], minlength=2 * len(taus)).reshape(-1, 2)
        reaching.append(counts[::-1].cumsum(axis=0)[::-1][order])
        positives.append(np.count_nonzero(y))
    false, hits = np.moveaxis(np.array(reaching, dtype=np.float64), 2, 0)
    actual = np.array(positives, dtype=np.float64)[:, None]
    return Confusion(hits, false, actual - hits, (voxels or prediction.size // prediction.shape[1]) - actual - false)


def hard_scores(c: Confusion) -> dict[str, npt.NDArray[np.float64]]:
    """Overlap of {prediction >= tau} with {reference >= 0.5}: Dice, IoU, precision, recall and specificity, each [K T].

    An empty reference has no overlap: NaN. An empty prediction of one that is not scores 0, so that it is not left out of means,
    which would reward it. Specificity is NaN where the reference covers everything.
    """
    known = np.where(c.tp + c.fn > 0, 1.0, np.nan)  # a 0/0 below is 0 where the reference is not empty
    return {
        "dice": known * 2 * c.tp / np.maximum(2 * c.tp + c.fp + c.fn, 1),
        "iou": known * c.tp / np.maximum(c.tp + c.fp + c.fn, 1),
        "precision": known * c.tp / np.maximum(c.tp + c.fp, 1),
        "recall": known * c.tp / np.maximum(c.tp + c.fn, 1),
        "specificity": ratio(c.tn, c.tn + c.fp),
    }


def mask_volume_error(c: Confusion, true: PerClass) -> npt.NDArray[np.float64]:
    """Relative error of the volume of {prediction >= tau} against that of the soft reference, per class and threshold [K T].

    `true` [K] is the sum of the reference. NaN where no voxel of the reference reaches 0.5. The best threshold for overlap is
    biased in volume by construction.
    """
    soft = true[:, None]
    return np.where(c.tp + c.fn > 0, ratio(c.tp + c.fp - soft, soft), np.nan)


def ratio(over: npt.NDArray[np.float64], under: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """over / under, NaN where `under` is 0."""
    return np.divide(over, under, out=np.full(np.broadcast_shapes(over.shape, under.shape), np.nan), where=under != 0)


def _mask(name: str, title: str, meaning: str, higher: bool | None, best: float, empty: float | Literal["diagonal"]) -> Row:
    return Row(name, title, meaning, higher, best, "at .5", empty, at_threshold=True)


def _object(name: str, title: str, meaning: str, higher: bool, best: float, empty: float | Literal["diagonal"]) -> Row:
    return replace(_mask(name, title, meaning, higher, best, empty), against="mean")


# fmt: off
_ROWS = (
    Row("brier_skill", "Brier skill", "1 - V sum (p - y)^2 / W: p prediction, y soft reference, V volume of a voxel, W mean volume "
        "of the references of all cases; proper: in expectation no map scores better than the mean of the raters", True, 1,
        exists_when_empty=True),
    Row("brier_skill_case", "Brier skill of a case", "1 - sum (p - y)^2 / sum y, so that small structures count as much as large "
        "ones; not strictly proper", True, 1),
    Row("brier", "Brier score", "mean (p - y)^2 over the voxels (Brier 1950); proper", False, 0, exists_when_empty=True),
    Row("mse", "mean squared error", "the Brier score under its other name", False, 0, exists_when_empty=True),
    Row("mae", "mean absolute error", "mean abs(p - y) over the voxels", False, 0, exists_when_empty=True),
    Row("dice_dml", "soft Dice (DML form)", "(sum p + sum y - sum abs(p - y)) / (sum p + sum y), as in the Dice semimetric loss "
        "(DML; Wang et al. 2023, arXiv 2303.16296): 1 only where p = y; not proper: rounding can raise it", True, 1, "always", 0),
    Row("dice_soft", "soft Dice", "2 sum p y / (sum p + sum y); at p = y it is sum y^2 / sum y, and some other p has more",
        True, 1, "no", 0),
    _mask("dice", "Dice", "2 n(A and B) / (n(A) + n(B)) for A = {p >= tau} and B = {y >= .5}", True, 1, 0),
    _mask("iou", "IoU", "n(A and B) / n(A or B)", True, 1, 0),
    _mask("precision", "precision", "n(A and B) / n(A)", True, 1, 0),
    _mask("recall", "recall", "n(A and B) / n(B)", True, 1, 0),
    replace(_mask("specificity", "specificity", "the share of the voxels outside of B that are outside of A; exists unless B fills "
        "the image", True, 1, 1), exists_when_empty=True),
    _object("hd95_mm", "HD95 (mm)", "the larger of both 95th percentiles of the distances between the surfaces of A and B",
        False, 0, "diagonal"),
    _object("asd_mm", "average surface distance (mm)", "the mean of the distances between both surfaces", False, 0, "diagonal"),
    _object("surface_dice_1mm", "surface Dice at 1 mm", "the share of both surfaces within 1 mm of the other", True, 1, 0),
    Row("volume_error", "relative volume error", "(sum p - sum y) / sum y; positive is too large", None, 0, "always", -1),
    Row("volume_error_abs", "absolute relative volume error", "abs(sum p - sum y) / sum y", False, 0, "always", 1),
    Row("volume_difference_mm3", "absolute volume difference (mm³)", "V abs(sum p - sum y)", False, 0, exists_when_empty=True),
    replace(_mask("mask_volume_error", "relative volume error of the mask", "(n(A) - sum y) / sum y: the best threshold for "
        "overlap is biased in volume", None, 0, -1), perfect="no"),
    Row("volume_crps_mm3", "CRPS of the volume (mm³)", "E abs(X - v) - E abs(X - X') / 2, mean over the raters' volumes v; X the "
        "volume of {p >= tau}, tau uniform on (0, 1]; not proper for maps", False, 0, "one hard rater", None, True, "raters"),
    _object("lesion_sensitivity", "lesion sensitivity", "the share of the reference's lesions found, one to one", True, 1, 0),
    _object("lesion_fdr", "lesion false discovery rate", "the share of the predicted lesions that are false", False, 0, 0),
    _object("lesion_f1", "lesion F1", "2 n(found) / (n(lesions of the reference) + n(predicted lesions))", True, 1, 0),
    replace(_object("false_lesions", "false lesions", "predicted lesions that match none", False, 0, 0), exists_when_empty=True),
    replace(_object("false_volume_mm3", "false volume (mm³)", "V n(A without B)", False, 0, 0), exists_when_empty=True),
    Row("ece", "expected calibration error", "10 bins of p in the neighbourhood of labels: sum (n_b / n) abs(mean p - mean y)",
        False, 0, "always", None, False, "mean"),
    Row("ece_max", "largest calibration error", "the largest abs(mean p - mean y) of these bins", False, 0, "always", None, False,
        "mean"),
    Row("ged2", "GED²", "squared generalised energy distance of the level sets of p from the raters, d = 1 - IoU; not proper",
        False, 0, "one hard rater", None, True, "raters"),
    Row("qubiq", "QUBIQ Dice", "mean Dice of {p >= t} and {y >= t} over those t of .1 ... .9 that some y reaches",
        True, 1, "always", 0, False, "mean"),
)
# fmt: on
TABLE = {row.name: row for row in _ROWS}
RECALIBRATED = ("brier_skill", "ece", "ece_max")  # measured again of q = sigmoid(a logit(p) + b), see `judging.thresholds`
for _row in [TABLE[name] for name in RECALIBRATED]:
    _meaning = f"`{_row.name}` of sigmoid(a logit(p) + b), a and b from validation; of fits alone, on test"
    _again = replace(_row, name=f"{_row.name}_recalibrated", title=f"{_row.title}, recalibrated", meaning=_meaning)
    TABLE[_again.name] = replace(_again, perfect="no", against="mean")
