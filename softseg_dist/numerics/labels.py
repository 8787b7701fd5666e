"""Label modes and rater fusion: from the masks of several raters to the target of a training sample; STAPLE among them.

Legend: R raters, K classes, *S any axes: of space, and of the items of a case. V voxels, M distinct columns of decisions.
Targets are float and stay soft unless the label mode says otherwise: docs/training.md has the table of label modes and of fusions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softseg_dist.errors import UserError
from softseg_dist.numerics.seeds import seed_of

START = 0.99  # sensitivity and specificity of every rater before the first step
MARGIN = 3  # voxels by which the bounding box of the raters' union is dilated along every axis
TOLERANCE = 1e-6  # converged when no sensitivity or specificity changes by more
MAX_STEPS = 500
SMALLEST_RATE = 1e-6  # sensitivities and specificities stay this far from 0 and 1, so that logarithms are finite


@dataclass(frozen=True, eq=False)
class Consensus:
    """STAPLE's estimate for one class of one case.

    `posterior` [*S] in [0, 1]: the probability W that a voxel is truly labelled; `sensitivity` P and `specificity` Q [R], one per
    rater; `steps`: how many EM took, `MAX_STEPS` if it has not converged, 0 if there was nothing to estimate.
    """

    posterior: Tensor
    sensitivity: Tensor
    specificity: Tensor
    steps: int


def staple(decisions: Tensor) -> Consensus:
    """The most likely truth and raters behind `decisions` [R *S] in [0, 1] of one class, by EM (docs/training.md).

    Sums run over the bounding box of all voxels that any rater labelled, dilated by 3 voxels; outside it W is 0. A rater with
    P + Q <= 1, no better than chance, is left out of that step, so that truth and its complement cannot be exchanged. If all raters
    agree everywhere (a single rater and empty masks included) nothing is left to estimate: W is their mask, P = Q = 1.

    A soft decision enters as an exponent (soft STAPLE): D = 0.3 is 0.3 of a vote for and 0.7 of one against. The formula
    for P maximises the expected sum W (D ln P + (1-D) ln(1-P)) for any D in [0, 1], and that for Q likewise, so the same
    steps increase the same likelihood [derived]; its normalisation over continuous D is left out.

    Source: Warfield, Zou, Wells, IEEE TMI 23(7), 2004 (doi 10.1109/TMI.2004.828354). Box, guard and non-integer exponents are ours.

    >>> masks = torch.zeros(3, 10)
    >>> masks[0, 2:6] = masks[1, 2:6] = masks[2, 3:7] = 1
    >>> staple(masks).posterior.round().int().tolist()
    [0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    """
    if bool((decisions == decisions[:1]).all()):
        known = decisions.new_ones(len(decisions))
        return Consensus(decisions[0].clone(), known, known, 0)
    posterior = decisions.new_zeros(decisions.shape[1:])
    labelled = (decisions > 0).any(dim=0).nonzero()
    ends = zip(labelled.amin(dim=0).tolist(), labelled.amax(dim=0).tolist(), strict=True)
    box = tuple(slice(max(0, first - MARGIN), last + 1 + MARGIN) for first, last in ends)
    inside = decisions[(slice(None), *box)]
    columns, counts, column_of = _distinct(inside.flatten(1))
    odds, sensitivity, specificity, steps = _maximise(columns, counts)
    posterior[box] = odds.sigmoid().to(decisions.dtype)[column_of].reshape(inside.shape[1:])
    return Consensus(posterior, sensitivity.to(decisions.dtype), specificity.to(decisions.dtype), steps)


def _distinct(decisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns [R M] in float64, the number of voxels with each [M], and the column of each voxel of `decisions` [R V]: [V].

    Voxels whose decisions are all 0 or 1 are grouped by their pattern, of which there are at most 2^R. Each of the others,
    few unless masks are soft everywhere, is a column of its own.
    """
    code = torch.zeros(decisions.shape[1], dtype=torch.int64, device=decisions.device)
    soft = torch.zeros_like(code, dtype=torch.bool)
    for rater, row in enumerate(decisions):
        soft |= (row != 0) & (row != 1)
        code += (row == 1).long() << rater
    patterns, place, counts = code[~soft].unique(return_inverse=True, return_counts=True)
    bits = (patterns >> torch.arange(len(decisions), device=code.device)[:, None]) & 1
    columns = torch.cat([bits.double(), decisions[:, soft].double()], dim=1)
    column_of = code
    column_of[~soft] = place
    column_of[soft] = torch.arange(len(patterns), columns.shape[1], device=code.device)
    return columns, torch.cat([counts.double(), counts.new_ones(columns.shape[1] - len(patterns)).double()]), column_of


def _maximise(columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Log odds [M] of every column, sensitivities [R] and specificities [R] at convergence, and the number of steps."""
    prior = (columns @ counts).mean() / counts.sum()
    sensitivity = specificity = columns.new_full((len(columns),), START)
    change, steps = torch.inf, 0
    while change >= TOLERANCE and steps < MAX_STEPS:
        odds = _log_odds(columns, prior, sensitivity, specificity)
        truly, falsely = counts * odds.sigmoid(), counts * (-odds).sigmoid()
        before = torch.stack([sensitivity, specificity])
        sensitivity = (columns @ truly / truly.sum()).clamp(SMALLEST_RATE, 1 - SMALLEST_RATE)
        specificity = (1 - columns @ falsely / falsely.sum()).clamp(SMALLEST_RATE, 1 - SMALLEST_RATE)
        change, steps = float((torch.stack([sensitivity, specificity]) - before).abs().max()), steps + 1
    return _log_odds(columns, prior, sensitivity, specificity), sensitivity, specificity, steps


def _log_odds(columns: Tensor, prior: Tensor, sensitivity: Tensor, specificity: Tensor) -> Tensor:
    """ln a - ln b [M]: linear in the decisions, so one product of matrix and vector."""
    better = sensitivity + specificity > 1
    vote_for = torch.where(better, sensitivity.log() - (-specificity).log1p(), 0)
    vote_against = torch.where(better, (-sensitivity).log1p() - specificity.log(), 0)
    return prior.logit() + vote_against.sum() + (vote_for - vote_against) @ columns


LabelMode = Literal["soft", "hard", "nearest", "hard_each"]
STAPLE_FUSIONS = ("staple", "soft_staple")  # their target of an item depends on all items of its case
FUSIONS = ("mean", "majority", "intersection", "union", *STAPLE_FUSIONS, "random_rater")  # and "rater:<name>"


def check_fusion(value: str) -> str:
    """Return `value` if it is a fusion of raters. Raises ValueError otherwise.

    >>> check_fusion("rater:expert2")
    'rater:expert2'
    """
    kind, colon, rater = value.partition(":")
    if value in FUSIONS or (kind == "rater" and colon and rater.strip()):
        return value
    raise ValueError(f'fusion must be one of {", ".join(FUSIONS)} or "rater:<name>", got {value!r}')


def check_one_rater(candidate: str, fusion: str) -> None:
    """Raises UserError if the `fusion` of a candidate needs several raters: call it for data with one rater per case."""
    if fusion in (*STAPLE_FUSIONS, "random_rater"):
        to_do = "use fusion='mean', which is then that rater's mask"
        raise UserError(f"candidate {candidate}: fusion {fusion!r} needs several raters, but no case has more than one; {to_do}")


def fuse(raters: Tensor, fusion: str, rater_names: Sequence[str], draw: int | None = None) -> Tensor:
    """Fuse the raters' maps into one: [R K *S] -> [K *S].

    Args:
        raters: label values in [0, 1], one entry per name of `rater_names`.
        fusion: see docs/training.md. STAPLE runs class by class over everything in `raters`, so pass the whole case. For a single
            rater "majority" and "staple" are the mask rounded, the others the mask.
        rater_names: names of the raters of this case, in the order of `raters`.
        draw: any integer, for "random_rater" only: the seed of this sample in this epoch.

    Raises UserError if `fusion` names a rater that this case does not have.

    >>> fuse(torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]), "mean", ("a", "b"))
    tensor([[0.5000, 1.0000]])
    """
    assert len(raters) == len(rater_names), f"{tuple(raters.shape)} for raters {rater_names}"
    kind, _, name = check_fusion(fusion).partition(":")
    if kind == "rater":
        if name not in rater_names:
            raise UserError(f"fusion 'rater:{name}' names no rater of this case; its raters are {', '.join(rater_names)}")
        return raters[list(rater_names).index(name)]
    if kind == "random_rater":
        assert draw is not None, "random_rater needs the seed of the sample"
        return raters[rater_of(draw, len(rater_names))]
    if kind in STAPLE_FUSIONS:
        decisions = harden(raters) if kind == "staple" else raters
        posterior = torch.stack([staple(of_class).posterior for of_class in decisions.unbind(1)])
        return harden(posterior) if kind == "staple" else posterior
    if kind in ("intersection", "union"):
        return raters.amin(dim=0) if kind == "intersection" else raters.amax(dim=0)
    mean = raters.mean(dim=0)
    return harden(mean) if kind == "majority" else mean


def rater_of(draw: int, num_raters: int) -> int:
    """The index of the rater that "random_rater" picks, given the seed of the sample in this epoch."""
    return seed_of("rater", draw) % num_raters


def prepare_target(
    raters: Tensor, nearest: Tensor | None, mode: LabelMode, fusion: str, rater_names: Sequence[str], draw: int | None = None
) -> Tensor:
    """The target before augmentation: [R K *S] -> [K *S]. `augmentation.apply` rounds "hard", once, last.

    Args:
        raters: label values in [0, 1] after linear or area-weighted resampling, float; NaN in voxels to ignore, as in the target.
        nearest: the raters' masks resampled by nearest neighbour, 0 or 1, of the shape of `raters`; None if nothing was
            resampled, then they are `raters` >= 0.5.
        mode, fusion: see docs/training.md.
        rater_names, draw: as in `fuse`.

    Raises UserError if `fusion` names a rater that this case does not have.
    """
    if (ignored := raters.isnan()).any():
        known = prepare_target(raters.nan_to_num(), nearest, mode, fusion, rater_names, draw)
        return known.masked_fill(ignored.any(0), torch.nan)
    if mode in ("nearest", "hard_each"):
        masks = harden(raters) if mode == "hard_each" or nearest is None else nearest.to(raters.dtype)
        return harden(fuse(masks, fusion, rater_names, draw))
    return fuse(raters, fusion, rater_names, draw)


def harden(target: Tensor) -> Tensor:
    """1 where `target` >= 0.5, else 0, in its own dtype.

    >>> harden(torch.tensor([0.49, 0.5]))
    tensor([0., 1.])
    """
    return (target >= 0.5).to(target.dtype)
