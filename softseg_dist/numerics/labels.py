"""Label modes and rater fusion: from the masks of several raters to the target of a training sample.

Legend: R raters, K classes, *S space (2 or 3 axes). Targets are float and stay soft unless the mode says otherwise:

    "soft"       fused, never rounded; bit-exact where nothing is interpolated
    "hard"       fused, rounded once, last, after augmentation (what ivadomed does today)
    "hard_each"  every rater rounded, their mean floored, rounded again after each step of the augmentation (what
                 ivadomed did at the time of the preprint, arXiv 2011.09041; it shrinks small objects); STAPLE's
                 posterior, which is hardly ever exactly 1, is rounded instead of floored
    "nearest"    masks resampled by nearest neighbour, fused, rounded, augmented by nearest neighbour (most toolboxes)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from softseg_dist.errors import UserError
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.staple import staple

LabelMode = Literal["soft", "hard", "nearest", "hard_each"]
LABEL_MODES: tuple[LabelMode, ...] = get_args(LabelMode)
STAPLE_FUSIONS = ("staple", "soft_staple")
FUSIONS = ("mean", "majority", *STAPLE_FUSIONS, "random_rater")  # and "rater:<name>"


def check_fusion(value: str) -> str:
    """`value` itself if it names a way to fuse raters. Raises ValueError if not.

    >>> check_fusion("rater:expert2")
    'rater:expert2'
    """
    kind, colon, rater = value.partition(":")
    if value in FUSIONS or (kind == "rater" and colon and rater.strip()):
        return value
    raise ValueError(f'fusion must be one of {", ".join(FUSIONS)} or "rater:<name>", got {value!r}')


def needs_several(fusion: str) -> bool:
    """Whether `fusion` says nothing if every case has one rater alone: its target would be that rater's mask, unfused."""
    return fusion in (*STAPLE_FUSIONS, "random_rater")


def one_rater_only(fusion: str) -> str:
    """What to tell people whose data has one rater where `fusion` needs several.

    >>> one_rater_only("staple")
    "fusion 'staple' needs several raters, but no case has more than one; use fusion='mean', which is then that rater's mask"
    """
    return (
        f"fusion {fusion!r} needs several raters, but no case has more than one; "
        "use fusion='mean', which is then that rater's mask"
    )


def needs_whole_case(fusion: str) -> bool:
    """Whether a target fused by `fusion` depends on all items of a case, so that it is made once for all of them."""
    return fusion in STAPLE_FUSIONS


def fuse(raters: Tensor, fusion: str, rater_names: Sequence[str], draw: int | None = None, axis: int = 0) -> Tensor:
    """One map out of the raters' maps: [R K *S] -> [K *S], or with `axis=1` [N R K *S] -> [N K *S].

    Args:
        raters: label values in [0, 1], one entry per name of `rater_names` along `axis`.
        fusion: "mean"; "majority" (mean >= 0.5); "staple" (posterior >= 0.5 of STAPLE over the rounded masks: what
            majority is to mean); "soft_staple" (the posterior over the masks as they are), both class by class and over
            all that is in `raters`: give them the whole case; "random_rater" (the one that `draw` picks, the same for
            all that is in `raters`: all classes, and all N items); "rater:<name>". Of one rater alone "mean",
            "soft_staple" and "random_rater" are his mask, "majority" and "staple" his mask rounded.
        rater_names: names of the raters of this case, in the order of `raters`.
        draw: any integer, for "random_rater" only: the seed of this sample in this epoch.

    Raises:
        UserError: if `fusion` names a rater that this case does not have.

    >>> import torch
    >>> fuse(torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]), "mean", ("a", "b"))
    tensor([[0.5000, 1.0000]])
    """
    assert raters.shape[axis] == len(rater_names), f"{tuple(raters.shape)} along axis {axis} for raters {rater_names}"
    kind, _, name = check_fusion(fusion).partition(":")
    if kind == "rater":
        return raters.select(axis, _index_of(name, rater_names))
    if kind == "random_rater":
        assert draw is not None, "random_rater needs the seed of the sample"
        return raters.select(axis, rater_of(draw, len(rater_names)))
    if kind == "staple":
        return harden(_posterior(harden(raters), axis))
    if kind == "soft_staple":
        return _posterior(raters, axis)
    mean = raters.mean(dim=axis)
    return harden(mean) if kind == "majority" else mean


def rater_of(draw: int, num_raters: int) -> int:
    """Whom "random_rater" takes of so many raters, given the seed of the sample in this epoch."""
    return seed_of("rater", draw) % num_raters


def _posterior(raters: Tensor, axis: int) -> Tensor:
    """STAPLE's posterior of every class, over all items together."""
    by_class = raters.movedim(axis, 0).unbind(axis + 1)
    return torch.stack([staple(decisions).posterior for decisions in by_class], dim=axis)


def _index_of(name: str, rater_names: Sequence[str]) -> int:
    if name not in rater_names:
        raise UserError(f"fusion 'rater:{name}' names no rater of this case; its raters are {', '.join(rater_names)}")
    return list(rater_names).index(name)


def prepare_target(
    raters: Tensor,
    nearest: Tensor | None,
    mode: LabelMode,
    fusion: str,
    rater_names: Sequence[str],
    draw: int | None = None,
    axis: int = 0,
) -> Tensor:
    """The target before augmentation: [R K *S] -> [K *S], or with `axis=1` [N R K *S] -> [N K *S].

    "soft" and "hard" are the fused map, unrounded (`augment` rounds "hard", once, last). "hard_each" rounds every
    rater and floors their fusion, or rounds it if it is STAPLE's. "nearest" fuses the masks that were resampled by
    nearest neighbour, and rounds.

    Args:
        raters: label values in [0, 1] after linear or area-weighted resampling, float.
        nearest: the raters' masks resampled by nearest neighbour, 0 or 1, of the shape of `raters`; None if nothing was
            resampled, which makes them `raters` >= 0.5.
        mode, fusion, rater_names, draw, axis: see the module and `fuse`.

    Raises:
        UserError: if `fusion` names a rater that this case does not have.
    """
    if mode == "nearest":
        masks = harden(raters) if nearest is None else nearest.to(raters.dtype)
        return harden(fuse(masks, fusion, rater_names, draw, axis))
    if mode == "hard_each":
        fused = fuse(harden(raters), fusion, rater_names, draw, axis)
        return harden(fused) if fusion in STAPLE_FUSIONS else fused.floor()
    return fuse(raters, fusion, rater_names, draw, axis)


def harden(target: Tensor) -> Tensor:
    """1 where `target` >= 0.5, else 0, in its own dtype.

    >>> import torch
    >>> harden(torch.tensor([0.49, 0.5]))
    tensor([0., 1.])
    """
    return (target >= 0.5).to(target.dtype)
