"""Findings in plain words. No sentence claims more than its test."""

from __future__ import annotations

import math

from softseg_dist.report.comparisons import Comparison
from softseg_dist.report.effects import Effect
from softseg_dist.report.tables import Summary
from softseg_dist.report.words import count, interval, number, p_clause, verdict


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
