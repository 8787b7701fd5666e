"""The findings of a run as sentences: the answer, the caveats, and what is left out of the numbers.

No sentence claims more than its test: "better" and "worse" need p < 0.05 after Holm's correction, everything else was "not
shown". Caveats and exclusions name whatever weakens a number on the page, the most serious first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from softseg_dist.numerics.crossed_test import CrossedTest
from softseg_dist.numerics.statistics import ALL_EQUAL
from softseg_dist.report.paired_tests import Comparison, Effect, Interaction, Rival, effect_in_words
from softseg_dist.report.ranking import Standing
from softseg_dist.report.tables import Summary
from softseg_dist.words import ALPHA, SHOWN, capital, count, interval_clause, listed, moment, number, p_clause, percent, verdict

WHERE = "on test, on the files' own grids"
MOST_QUOTED = 2  # effects that a sentence gives with their numbers: the tables have all


def sentences(summary: Summary) -> dict[str, Any]:
    """All findings by the names of their functions, as `softseg report --json` writes them; of what there is none is empty."""
    said = (scores_answer, answer, effects_answer, interactions_answer, group_answer, sites_answer, holdout_answer)
    return {"not_learned": learned_answer(summary), **{about.__name__: about(summary) for about in said}}


def scores_answer(summary: Summary) -> str:
    """What control and winner score in themselves, and what an empty map would: to be read before any difference."""
    pair = {summary.reference: "control " * (summary.reference == summary.control), summary.winner.name: "winner "}
    if summary.reference == summary.winner.name:
        pair = {summary.winner.name: "control and winner " if summary.reference == summary.control else "winner "}
    standings = {s.name: s for s in summary.ranking}
    parts = [f"{role}{name} {_score(standings[name], summary)}" for name, role in pair.items()]
    if summary.objective.name == "brier_skill" and math.isfinite(summary.checks.empty_map):
        parts.append(f"a map that is 0 everywhere {number(summary.checks.empty_map)}")
    return f"{capital(summary.objective.full_title)} {WHERE}: {', '.join(parts)}."


def _score(standing: Standing, summary: Summary) -> str:
    why = standing.no_interval.removeprefix("interval not estimable: ")
    said = f": {why}" if why not in ("", _untestable(summary)) else ""
    return f"{number(standing.mean)} ({interval_clause(standing.low, standing.high)}{said})"


def _untestable(summary: Summary) -> str:
    """Why no comparison could be tested, which the answer says once; "" if any could, or there is none."""
    comparisons = summary.comparisons
    return comparisons[0].crossed.note if comparisons and all(math.isnan(c.crossed.p) for c in comparisons) else ""


def learned_answer(summary: Summary) -> list[str]:
    """A sentence about winner and control each that was not shown to be better than an empty map: nothing else matters then."""
    return [
        f"{one.name} has not learned the task, as far as these subjects can show: its Brier skill {WHERE} is {number(one.skill)}, "
        f"that of a map that is 0 everywhere {number(summary.checks.empty_map)} "
        f"(difference {effect_in_words(one.crossed, one.crossed.p)})."
        for one in summary.checks.unlearned
    ]


def answer(summary: Summary) -> str:
    """The finding in one sentence, with effect size, interval, corrected p and n. It never claims more than the test."""
    if not summary.comparisons:
        return f"There is one candidate with scores, {summary.winner.name}: nothing to compare it with."
    if all(c.crossed.mean == 0 and c.crossed.note == ALL_EQUAL for c in summary.comparisons):
        named, control = listed([c.candidate for c in summary.comparisons]), "the control " * (summary.reference == summary.control)
        sample = _sample(summary.comparisons[0].crossed)
        return f"{named} and {control}{summary.reference} have equal scores on {summary.objective.full_title} ({sample})."
    if summary.reference != summary.control:
        best = summary.winner
        why = "The study names no control" if summary.control is None else f"The control {summary.control} has no finished fit"
        mean = f"{number(best.mean)}, {interval_clause(best.low, best.high)}"
        score = f"{summary.objective.full_title} on test {mean}; {_sample(best)}"
        return f"{why}, so candidates are only ranked: {best.name} ranks highest on {summary.chosen_on} ({score})."
    if why := _untestable(summary):
        first = summary.comparisons[0]
        size = f"{number(first.crossed.mean, signed=True)} in {summary.objective.full_title}"
        differs = f"{first.candidate} differs from the control {summary.reference} by {size}"
        return f"Nothing could be tested ({why}): {summary.winner.name} ranks highest, and {differs}."
    return _against_control(summary)


def effects_answer(summary: Summary) -> str:
    """What each factor does, averaged over the others, those shown to matter first; "" without a factorial or a test."""
    tested = [e for e in summary.effects if not math.isnan(e.crossed.p)]
    said = {v: [e for e in tested if _verdict(e, summary) == v] for v in ("better", "worse", "not shown")}
    parts = [f"{e.level} is {v} than {e.base} ({e.factor}: {size_of(e)})" for v in ("better", "worse") for e in said[v]]
    if unsure := said["not shown"]:
        quoted = [f"{e.level} instead of {e.base} ({e.factor}: {size_of(e)})" for e in unsure[:MOST_QUOTED]]
        named = [f"{e.level} instead of {e.base} ({e.factor})" for e in unsure[MOST_QUOTED:]]
        parts.append(f"not shown to matter: {'; '.join(quoted + named)}")
    return f"Averaged over the other factors: {'; '.join(parts)}." if parts else ""


def interactions_answer(summary: Summary) -> str:
    """Which effects depend on another factor; "" without a factorial of which an interaction could be tested."""
    tested = [i for i in summary.interactions if not math.isnan(i.crossed.p)]
    shown = [i for i in tested if i.p_holm < ALPHA]
    if not tested:
        return ""
    if not shown:
        smallest = p_clause(min(i.p_holm for i in tested), "smallest Holm-corrected p")
        return f"No interaction of two factors was shown ({smallest}); small ones may exist."
    parts = []
    for i in sorted(shown, key=lambda i: i.p_holm)[:MOST_QUOTED]:
        adds = f"{number(abs(i.crossed.mean))} {'more' if i.crossed.mean > 0 else 'less'} to {summary.objective.title}"
        where = f"with {i.other_level} than with {i.other_base} ({i.factor} by {i.other}: {size_of(i)})"
        parts.append(f"{i.level} instead of {i.base} adds {adds} {where}")
    more = f"; {count(len(shown) - MOST_QUOTED, 'more interaction')} in the table" if len(shown) > MOST_QUOTED else ""
    return f"Effects depend on each other, so averages over other factors mislead: {'; '.join(parts)}{more}."


def group_answer(summary: Summary) -> str:
    """Candidates better on test than the highest ranked, or not shown to differ, or all lower; "" if none was ranked or tested."""
    if all(math.isnan(rival.crossed.p) for rival in summary.rivals):
        return ""
    best, others = summary.winner.name, f"{count(len(summary.rivals), 'other')}, at the 5 % level after Holm's correction"
    better = [rival.candidate for rival in summary.rivals if _verdict(rival, summary) == "better"]
    groups = {"Better on test than": better, "Not shown to differ from": [r.candidate for r in summary.rivals if r.tied]}
    said = [f"{how} the highest ranked, {best}: {listed(who)} ({len(who)} of {others})." for how, who in groups.items() if who]
    picked = "as it was picked by its rank, this describes and does not confirm"
    return " ".join(said) or f"Lower on test than the highest ranked, {best}: all {others}; {picked}."


def holdout_answer(summary: Summary) -> str:
    """The scores of winner and control on held-out subjects; "" if there are none, or they were not opened."""
    held = summary.holdout
    if held is None or not held.scores:
        return ""
    first, score = held.scores[0].name, held.scores[0].score
    sample, reach = count(score.num_subjects, "held-out subject"), interval_clause(score.low, score.high)
    scored = f"On {sample}, in no split, {first} scores {number(score.mean)} ({reach})"
    if held.crossed is None:
        return f"{scored}."
    control = f"the control {held.scores[1].name} {number(held.scores[1].score.mean)}"
    return f"{scored} and {control}: difference {effect_in_words(held.crossed, held.crossed.p)}."


def sites_answer(summary: Summary) -> str:
    """What the comparisons say about new sites, of the highest ranked first; "" for fewer than three sites."""
    tested = [(c, c.new_sites) for c in summary.comparisons if c.new_sites is not None]
    if not tested:
        return ""
    quoted = [f"{c.candidate} {effect_in_words(test, test.p)}" for c, test in tested[:MOST_QUOTED]]
    runs = "for these trained models" if summary.of_models else "and new training runs"
    limits = f"The tests hold for new subjects of these sites {runs}"
    return f"{limits}; for new sites (t-test over {count(tested[0][1].num_subjects, 'site')}): {'; '.join(quoted)}."


def size_of(comparison: Comparison | Effect | Interaction) -> str:
    """Difference, interval and p of a comparison, a main effect or an interaction."""
    return effect_in_words(comparison.crossed, comparison.p_holm, "Holm-corrected p")


def _against_control(summary: Summary) -> str:
    better = [c for c in summary.comparisons if _verdict(c, summary) == "better"]
    num_worse = sum(_verdict(c, summary) == "worse" for c in summary.comparisons)
    best = (better or summary.comparisons)[0]
    control = f"the control {summary.reference} on {summary.objective.full_title}"
    found = f"{size_of(best)}; {_sample(best.crossed)}"
    if len(summary.comparisons) == 1:
        return f"{best.candidate} {SHOWN[_verdict(best, summary)]} {control} (difference {found})."
    first, of = f"No candidate was shown to be better than {control}", "the others"
    if better:
        share, of = f"{len(better)} of the {len(summary.comparisons)} other candidates", "them"
        first = f"{share} {'are' if len(better) > 1 else 'is'} better than {control}"
    worse = f" {count(num_worse, 'candidate')} {'is' if num_worse == 1 else 'are'} worse than the control." if num_worse else ""
    return f"{first}; the highest ranked of {of} is {best.candidate} (difference {found}).{worse}"


def _sample(scored: CrossedTest | Standing) -> str:
    return f"{count(scored.num_subjects, 'tested subject')}, {count(scored.num_splits, 'split')}"


def _verdict(comparison: Comparison | Effect | Rival, summary: Summary) -> str:
    return verdict(comparison.crossed.mean, comparison.p_holm, summary.objective.sign)


def caveats(summary: Summary) -> Iterator[str]:
    """Limits of the evidence on the page, the most serious first."""
    own = {c.candidate: c.crossed.mean for c in summary.comparisons}
    turned = {name: other for name, other in summary.checks.prepared.items() if own.get(name, 0) * other < 0}
    if turned:
        quoted = [f"{n} {number(own[n], signed=True)} (own), {number(b, signed=True)} (prepared)" for n, b in turned.items()]
        grids = f"own (of the file) or prepared (of training): {listed(quoted, 4, '; ')}"
        sign = f"The sign of the difference to {summary.reference} on test depends on the grid"
        yield f"{sign}, {grids}. The answer is about the files' own grids."
    lacking = {"failed": sum(t.failed for t in summary.training), "not run yet": sum(t.missing for t in summary.training)}
    if total := sum(lacking.values()):
        num = f"{total} of {summary.num_planned} fits have no score ({', '.join(f'{n} {why}' for why, n in lacking.items() if n)})"
        used = "Comparisons use the subjects and splits that both sides have, and ranks follow them"
        yield f"{num}. {used}; a mean in the ranking is over what its candidate has."
    if raced := summary.raced:
        saved = sum(t.raced for t in summary.training)
        num = f"{len(raced)} of {len(summary.ranking)} candidates ({count(saved, 'fit')} saved)"
        yield f"Given up after a few splits, as worse than the best on these: {num}. Ranks and tests use the splits that they have."
    if unscored := [s.name for s in summary.ranking if s.rank is None]:
        yield f"Without any score, and so left out of all comparisons: {', '.join(unscored)}."
    yield from _selection(summary)
    yield from _training(summary)
    for warning in dict.fromkeys(warning for c in summary.comparisons for warning in c.crossed.warnings):
        yield f"{capital(warning)} ({listed([c.candidate for c in summary.comparisons if warning in c.crossed.warnings])})."
    if 1 < summary.num_tested < 12 and not summary.of_models:
        subjects = count(summary.num_tested, "tested subject")
        yield f"With {subjects}, variance components and degrees of freedom are estimated roughly: intervals are approximate."
    if undefined := sum(s.undefined for s in summary.ranking):
        total = sum(s.values for s in summary.ranking)
        yield f"{undefined} of {total} values of the objective are undefined (the reference is empty) and are left out."


def _selection(summary: Summary) -> Iterator[str]:
    best, held = summary.winner.name, summary.holdout
    if summary.comparisons and summary.reference != summary.control:
        chosen = f"All are compared with {summary.reference}, which was chosen {_choice(summary)}"
        yield f"{chosen}: the p-values describe, they do not confirm."
    if held is not None and held.scores and held.winner == best:
        if summary.chosen_tested and len(summary.ranking) > 1:
            mean = f"The mean of {best} in the ranking is optimistic, as it was chosen {_choice(summary)}"
            yield f"{mean}. Its mean on the held-out subjects is not."
        if len(held.opened) > 1:
            times = f"The held-out subjects were opened {len(held.opened)} times, the last at {moment(held.opened[-1])} UTC"
            yield f"{times}: one result may have led to the next, so they confirm less than subjects opened once."
        return
    if held is not None:
        why = "not opened yet" if not held.scores else f"opened for {held.winner}, which no longer ranks highest"
        yield f"{count(held.num_subjects, 'subject')} in no split: {why}."
    if summary.winner.proposed and summary.chosen_tested:
        found = f"{best} was found by a search on validation subjects who are test subjects of other splits"
        to_do = "Confirm it on subjects that are in no split, or in a new study that has it as a fixed candidate"
        yield f"{found}: its score is optimistic by an unknown amount. {to_do}."
    elif len(summary.comparisons) > 1 and summary.chosen_tested:
        mean = f"The mean of the highest of several candidates is optimistic, as it was chosen {_choice(summary)}"
        yield f"{mean}. Holm's correction protects the tests against that, not the mean."


def _choice(summary: Summary) -> str:
    """By whose scores the highest ranked was chosen."""
    if summary.chosen_on == "test":
        return "by the same scores that it is tested on, for lack of scores on validation"
    tested = f"{summary.chosen_tested} of whom are tested in some split" if summary.chosen_tested else "none of whom is tested"
    return f"by its mean on validation subjects, {tested}"


def _training(summary: Summary) -> Iterator[str]:
    if slow := [f"{t.name} {t.not_converged} of {t.finished}" for t in summary.training if t.not_converged]:
        why = "best epoch in the last 5 % of the budget, so that more epochs might have changed the result"
        yield f"Not converged ({why}): {listed(slow, 6)}."
    if dead := [f"{t.name} {percent(t.dead_share)}" for t in summary.training if (t.dead_share or 0) > ALPHA]:
        yield f"More than 5 % of the training samples gave an output of 0 everywhere, without a gradient: {', '.join(dead)}."
    precisions = {engine.partition(",")[0] for engine in summary.compute.engines}
    if len(precisions) > 1:
        trained = f"Fits were trained in {' and in '.join(sorted(precisions))}, as machines differ"
        yield f'{trained}: a part of a difference may come from that. Optim(precision="float32") makes the precision equal.'
    yield from (f"{name}: {note}." for name, note in summary.notes.items())
    one_rate = not any("optim.lr" in fields for fields in summary.varying.values())
    if summary.trained and one_rate and not summary.tuned and len(summary.ranking) > 1:
        rate = "All candidates were trained at one fixed learning rate that was tuned for none of them"
        yield f"{rate}: a part of a difference may come from how well it suits each."
