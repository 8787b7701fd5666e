"""Numbers and findings in plain words: what the page says is built here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from softseg_dist.report.effects import Effect
from softseg_dist.report.tables import Comparison, Summary

ALPHA = 0.05
MINUS = "\u2212"


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """`0.842`, with a true minus sign; an en dash for what does not exist.

    >>> number(0.8417), number(-0.002, signed=True), number(float("nan"))
    ('0.842', '−0.002', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    negative = value < 0 and float(text) != 0
    return (MINUS if negative else "+" if signed else "") + text


def interval(low: float, high: float, digits: int = 3, signed: bool = False) -> str:
    """`0.830 to 0.854`, or an en dash."""
    known = math.isfinite(low) and math.isfinite(high)
    return f"{number(low, digits, signed)} to {number(high, digits, signed)}" if known else "–"


def p_value(p: float) -> str:
    """`0.032`, `<0.001`, or an en dash: three decimals are all that a p-value deserves."""
    if math.isnan(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def p_clause(p: float, name: str = "p") -> str:
    """`p = 0.032` or `p < 0.001`."""
    return f"{name} < 0.001" if p < 0.001 else f"{name} = {p_value(p)}"


def percent(share: float | None, digits: int = 1, signed: bool = False) -> str:
    """`+3.2 %`, or an en dash."""
    return "–" if share is None or not math.isfinite(share) else f"{number(100 * share, digits, signed)} %"


def duration(seconds: float) -> str:
    """`21.9 min`: one unit, the largest that leaves a number above 1."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def count(num: int, noun: str) -> str:
    """`1 split`, `6 splits`."""
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def verdict(mean: float, p_holm: float, sign: int) -> str:
    """What a comparison shows at the 5 % level: "better", "worse" or "not shown" to differ."""
    if not p_holm < ALPHA:  # also when there is no p
        return "not shown"
    return "better" if sign * mean > 0 else "worse"


def answer(summary: Summary) -> str:
    """The finding in one sentence, with effect size, interval, corrected p and n. It never claims more than the test."""
    if not summary.comparisons:
        return f"There is one candidate with scores, {summary.winner.name}: nothing to compare it with."
    if summary.reference != summary.control:
        return _without_control(summary)
    if all(math.isnan(c.crossed.p) for c in summary.comparisons):
        first = summary.comparisons[0]
        return (
            f"Nothing could be tested ({first.crossed.note}): {summary.winner.name} ranks highest, and {first.candidate} differs "
            f"from the control {summary.reference} by {number(first.crossed.mean, signed=True)} in {_metric(summary)}."
        )
    return _against_control(summary)


def effects_answer(summary: Summary) -> str:
    """What each factor does, averaged over the others, those shown to matter first; "" without a factorial or a test."""
    tested = [e for e in summary.effects if not math.isnan(e.crossed.p)]
    said = {v: [e for e in tested if _verdict(e, summary) == v] for v in ("better", "worse", "not shown")}
    parts = [f"{e.level} is {v} than {e.base} ({e.factor}: {size_of(e)})" for v in ("better", "worse") for e in said[v]]
    if said["not shown"]:
        unsure = "; ".join(f"{e.level} instead of {e.base} ({e.factor}: {size_of(e)})" for e in said["not shown"])
        parts.append(f"not shown to matter: {unsure}")
    return f"Averaged over the other factors: {'; '.join(parts)}." if parts else ""


def size_of(comparison: Comparison | Effect) -> str:
    """Difference, interval and p of a comparison or a main effect."""
    test = comparison.crossed
    if math.isnan(test.p):
        return f"{number(test.mean, signed=True)}; not tested: {test.note}"
    return (
        f"{number(test.mean, signed=True)}, 95 % interval {interval(test.low, test.high, signed=True)}, "
        f"{p_clause(comparison.p_holm, 'Holm-corrected p')}"
    )


def _against_control(summary: Summary) -> str:
    better = [c for c in summary.comparisons if _verdict(c, summary) == "better"]
    num_worse = sum(_verdict(c, summary) == "worse" for c in summary.comparisons)
    best = (better or summary.comparisons)[0]
    control, found = f"the control {summary.reference} on {_metric(summary)}", f"{size_of(best)}; {_sample(best)}"
    if len(summary.comparisons) == 1:
        shown = {"better": "is better than", "worse": "is worse than", "not shown": "was not shown to differ from"}
        return f"{best.candidate} {shown[_verdict(best, summary)]} {control} (difference {found})."
    if better:
        share = f"{len(better)} of the {len(summary.comparisons)} other candidates"
        verb = "do" if len(better) > 1 else "does"
        first = f"{share} {verb} better than {control}; the highest ranked of them is {best.candidate} ({found})."
    else:
        first = (
            f"No candidate was shown to be better than {control}; the highest ranked of the others is {best.candidate} "
            f"(difference {found})."
        )
    worse = f" {count(num_worse, 'candidate')} {'is' if num_worse == 1 else 'are'} worse than the control."
    return first + (worse if num_worse else "")


def _metric(summary: Summary) -> str:
    return summary.objective_title + ("" if summary.sign > 0 else " (lower is better)")


def _sample(comparison: Comparison) -> str:
    test = comparison.crossed
    return f"{count(test.num_subjects, 'tested subject')}, {count(test.num_splits, 'split')}"


def _without_control(summary: Summary) -> str:
    why = (
        "The study names no control"
        if summary.control is None
        else f"The control {summary.control} has no finished fit"
    )
    tied = [c.candidate for c in summary.comparisons if _verdict(c, summary) == "not shown"]
    rest = (
        f"{len(tied)} of the {len(summary.comparisons)} others cannot be told apart from it"
        if tied
        else "all others were shown to be worse"
    )
    sample = f"{count(summary.winner.num_subjects, 'tested subject')}, {count(summary.winner.num_splits, 'split')}"
    return (
        f"{why}, so candidates are only ranked: {summary.winner.name} has the best mean {summary.objective_title} "
        f"({number(summary.winner.mean)}, 95 % interval {interval(summary.winner.low, summary.winner.high)}; {sample}); {rest}."
    )


def _verdict(comparison: Comparison | Effect, summary: Summary) -> str:
    return verdict(comparison.crossed.mean, comparison.p_holm, summary.sign)


def caveats(summary: Summary, spacing_mm: Sequence[float] = ()) -> list[str]:
    """What a reader must know before believing the page, the gravest first."""
    found = [*_completeness(summary), *_selection(summary), *_training(summary), *_data(summary)]
    grid = f" ({' x '.join(f'{s:g}' for s in spacing_mm)} mm)" if spacing_mm else ""
    found.append(
        f"Scores are measured on the prepared grid{grid}, against the mean of the raters, not on the original images; "
        "surface distances and lesion-wise metrics are not part of this report."
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
    if len(summary.learning_rates) == 1 and len(summary.ranking) > 1:
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
