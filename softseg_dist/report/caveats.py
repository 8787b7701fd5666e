"""What a reader must know before believing the page."""

from __future__ import annotations

from collections.abc import Sequence

from softseg_dist.report.tables import Summary
from softseg_dist.words import ALPHA, count, moment, percent


def caveats(summary: Summary, spacing_mm: Sequence[float] = ()) -> list[str]:
    """What a reader must know before believing the page, the gravest first."""
    found = [*_completeness(summary), *_selection(summary), *_training(summary), *_data(summary)]
    grid = f" ({' x '.join(f'{s:g}' for s in spacing_mm)} mm)" if spacing_mm else ""
    found.append(
        f"Scores are measured on the prepared grid{grid}, against the mean of the raters, not on the original images."
    )
    return found


def _completeness(summary: Summary) -> list[str]:
    failed = sum(t.failed for t in summary.training)
    missing = sum(t.missing for t in summary.training)
    found = []
    if failed or missing:
        what = ", ".join(f"{n} {word}" for n, word in ((failed, "failed"), (missing, "not run yet")) if n)
        found.append(
            f"{failed + missing} of {summary.num_planned} fits have no score ({what}). Comparisons use the subjects and "
            "splits that both sides have, and ranks follow these comparisons; a mean in the ranking is over what its candidate has."
        )
    if raced := summary.searched.raced:
        saved = sum(t.raced for t in summary.training)
        found.append(
            f"Given up after a few splits, as worse than the best on these: {len(raced)} of {len(summary.ranking)} candidates "
            f"({count(saved, 'fit')} saved). They are ranked and tested on the splits that they have."
        )
    unscored = [s.name for s in summary.ranking if s.rank is None]
    if unscored:
        found.append(f"Without any score, and so left out of all comparisons: {', '.join(unscored)}.")
    return found


def _selection(summary: Summary) -> list[str]:
    found = []
    if summary.reference != summary.control:
        found.append(
            "All are compared with the highest ranked, which was picked by the very scores that it is tested on: "
            "the p-values describe, they do not confirm."
        )
    held = summary.holdout
    if held is not None and held.scores and held.winner == summary.winner.name:
        found.append(
            f"The mean of {summary.winner.name} in the ranking is optimistic, as it was picked by it; that on the held-out "
            "subjects is not."
        )
        if len(held.opened) > 1:
            found.append(
                f"The held-out subjects were opened {len(held.opened)} times, the last at {moment(held.opened[-1])} UTC: what one "
                "opening taught may have led to the next, so they confirm less than subjects opened once."
            )
        return found
    if held is not None:
        why = "not opened yet" if not held.scores else f"opened for {held.winner}, which ranks highest no more"
        found.append(f"{count(held.num_subjects, 'subject')} in no split: {why}.")
    if summary.winner.proposed:
        found.append(
            f"{summary.winner.name} was found by a search on validation subjects who are test subjects of other splits: "
            "its score is optimistic by an unknown amount. Confirm it on subjects who took no part, or in a new study that "
            "has it as a fixed candidate."
        )
    elif len(summary.comparisons) > 1:
        found.append(
            "The mean of the highest of several candidates is optimistic, as chance helped to put it there; "
            "Holm's correction protects the tests against that, not the mean."
        )
    return found


def _training(summary: Summary) -> list[str]:
    found = []
    slow = [t for t in summary.training if t.not_converged]
    if slow:
        parts = ", ".join(f"{t.name} {t.not_converged} of {t.finished}" for t in slow[:6])
        more = f" and {count(len(slow) - 6, 'more candidate')}" if len(slow) > 6 else ""
        found.append(
            "Not converged (best epoch in the last 5 % of the budget, so that more epochs might have changed the result): "
            f"{parts}{more}."
        )
    dead = [t for t in summary.training if t.dead_share is not None and t.dead_share > ALPHA]
    if dead:
        parts = ", ".join(f"{t.name} {percent(t.dead_share)}" for t in dead)
        found.append(
            f"More than 5 % of the training samples gave an output of 0 everywhere, without a gradient: {parts}."
        )
    precisions = {engine.partition(",")[0] for engine in summary.compute.engines}
    if len(precisions) > 1:
        found.append(
            f"Fits were trained in {' and in '.join(sorted(precisions))}, as machines differ: a difference between candidates may "
            'be one of precision, in part. Optim(precision="float32") makes them equal.'
        )
    found += [f"{name}: {note}." for name, note in summary.notes.items()]
    if len(summary.learning_rates) == 1 and not summary.searched.tuned and len(summary.ranking) > 1:
        found.append(
            f"All candidates were trained at one fixed learning rate ({summary.learning_rates[0]:g}) that was tuned for none "
            "of them: a difference may be one of how well that rate suits each."
        )
    return found


def _data(summary: Summary) -> list[str]:
    found = []
    if summary.num_tested < summary.num_subjects:
        never = summary.num_subjects - summary.num_tested
        found.append(
            f"{never} of {summary.num_subjects} subjects were in no test set: they only trained and validated."
        )
    if len(summary.splits) < 6:
        found.append(
            f"With {count(len(summary.splits), 'split')} Wilcoxon's test cannot reach p < 0.05 "
            f"(its smallest p is {2.0 ** (1 - len(summary.splits)):.3g})."
        )
    if summary.num_tested < 12:
        found.append(
            f"With {count(summary.num_tested, 'tested subject')} variance components and degrees of freedom are poorly known: "
            "intervals are approximate."
        )
    undefined = sum(s.undefined for s in summary.ranking)
    if undefined:
        total = sum(s.values for s in summary.ranking)
        found.append(
            f"{undefined} of {total} values of the objective do not exist (there was nothing to find) and are left out."
        )
    return found
