"""A learning rate of its own for every fixed candidate: the same few rates are tried for each, on the same splits.

Each rate is a candidate of origin "tuning", named `<candidate>~<number>`, that runs the first splits alone. The best mean
objective on validation wins; test subjects have no say. A rate with a fit that failed or was given up has lost. The choice is
recorded with the candidate, and stands from then on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from softseg_dist.record.ledger import CandidateRecord, json_of
from softseg_dist.search.candidate import Candidate
from softseg_dist.study import Recipe, TuneEach


def tuning_name(candidate: str, number: int) -> str:
    """`hard-dice~2`; no candidate of a study file has a `~` in its name."""
    return f"{candidate}~{number}"


def is_tuning(candidate: str) -> bool:
    """Is this the name of such a trial?"""
    return "~" in candidate


def tuning_record(name: str, number: int, tune: TuneEach, trial: int, recipe: Recipe) -> CandidateRecord:
    """The record of one of the trials of `name`, which is the `number`-th fixed candidate."""
    order = number * tune.trials + trial
    return CandidateRecord(name=tuning_name(name, trial), origin="tuning", number=order, recipe=json_of(recipe))


def fixed_record(name: str, number: int, recipe: Recipe, note: str = "") -> CandidateRecord:
    """The record of a candidate of the study file, as it runs."""
    return CandidateRecord(name=name, origin="fixed", number=number, recipe=json_of(recipe), note=note)


def tuned(recipe: Recipe, tune: TuneEach, trials: Sequence[Candidate], sign: int) -> tuple[Recipe, str]:
    """The recipe with the rate that won, and ""; as it is, and a note, if all trials have failed.

    Among equal means the rate nearest to the recipe's own wins, by ratio; `sign` is that of the objective.
    """
    means = [trial.means for trial in trials]
    known = [(sign * mean[0], rate) for mean, rate in zip(means, tune.rates, strict=True) if mean]
    own = recipe.optim.lr
    if not known:
        return recipe, f"every learning rate that was tried has failed: it keeps its own, {own:g}"
    _, rate = max(known, key=lambda found: (found[0], -abs(math.log(found[1] / own))))
    return with_rate(recipe, rate), ""


def with_rate(recipe: Recipe, rate: float) -> Recipe:
    """The same recipe at another learning rate."""
    return recipe.replace(optim=recipe.optim.replace(lr=rate))
