"""The comparison of two runs as sentences: the answer, how scores are paired, and the limits of both.

A is the first run, B the second; all differences are B minus A. No sentence claims more than its test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from softseg_dist.numerics.crossed_test import CrossedTest
from softseg_dist.numerics.statistics import ALL_EQUAL
from softseg_dist.report.comparison import ENOUGH, CandidateContrast, RunComparison
from softseg_dist.report.paired_tests import effect_in_words
from softseg_dist.report.tables import plain
from softseg_dist.words import SHOWN, count, dimensions, listed, metric_title, number, verdict


def comparison_json(comparison: RunComparison) -> dict[str, Any]:
    """The numbers, ready for json.dumps, and the words that belong to them."""
    return {
        "answer": answer(comparison),
        "pairing_in_words": pairing_sentence(comparison),
        "caveats": caveats(comparison),
        **plain(comparison),
    }


def answer(comparison: RunComparison) -> str:
    """The finding: in full for one contrast, counted for several."""
    contrasts = comparison.contrasts
    if len(contrasts) == 1:
        return _finding(contrasts[0], comparison)
    if all(math.isnan(c.test.p) and not _equal(c) for c in contrasts):
        return f"Nothing could be tested ({contrasts[0].test.note})."
    said = {v: [c for c in contrasts if _verdict(c, comparison) == v] for v in ("better", "worse", "not shown")}
    equal = [c for c in said["not shown"] if _equal(c)]
    shown = [
        f"B is {v} than A for {listed([called(c) for c in said[v]])} ({len(said[v])} of {len(contrasts)})"
        for v in ("better", "worse")
        if said[v]
    ]
    if unsure := len(said["not shown"]) - len(equal):
        shown.append(f"no difference was shown for {unsure} of {len(contrasts)}")
    if equal:
        shown.append(f"all scores are the same for {listed([called(c) for c in equal])} ({len(equal)} of {len(contrasts)})")
    return f"On {metric_of(comparison)}: {'; '.join(shown)}."


def pairing_sentence(comparison: RunComparison) -> str:
    """How scores are paired and tested, and if not by subject and split, why not."""
    pairing, a, b = comparison.pairing, comparison.a.num_splits, comparison.b.num_splits
    common, people = len(pairing.splits), count(len(pairing.subjects), "subject")
    if common >= ENOUGH:
        left = "" if a == b == common else f" of {a} in A and {b} in B; the others are left out of the tests"
        return (
            f"Paired by subject and split: {common} splits have the same people in both{left}. "
            "Unit of analysis: a subject in a split; crossed random-effects test, Holm-corrected."
        )
    if pairing.subjects:
        return (
            f"Paired by subject alone, as {pairing.obstacle}. Unit of analysis: a subject's mean over the splits that it "
            f"was tested in, of {people} tested in both; t-test over subjects, Holm-corrected."
        )
    return f"Not paired, as {pairing.obstacle}. Means stand beside each other, without a test."


def caveats(comparison: RunComparison) -> list[str]:
    """Limits of the comparison, the most serious first."""
    return [*_data(comparison), *_tests(comparison), *_selection(comparison), *_completeness(comparison)]


def called(contrast: CandidateContrast) -> str:
    """`soft-wing`, or `soft-wing -> hard-dice` for two names; `(winners)` behind those that lead their runs."""
    a, b = contrast.a.candidate, contrast.b.candidate
    return (a if a == b else f"{a} -> {b}") + (" (winners)" if contrast.winners else "")


def sample(contrast: CandidateContrast) -> str:
    """n of a contrast: `36 pairs of 18 subjects, 6 splits`."""
    test, people = contrast.test, count(contrast.test.num_subjects, "subject")
    if contrast.paired_by == "nothing":
        return "not paired"
    if not isinstance(test, CrossedTest):
        return f"{people}, means over splits"
    return f"{count(test.num_pairs, 'pair')} of {people}, {count(test.num_splits, 'split')}"


def metric_of(compared: RunComparison) -> str:
    """The metric's title, and whether a lower value is better."""
    return metric_title(compared.title, compared.sign)


def _finding(contrast: CandidateContrast, comparison: RunComparison) -> str:
    test = contrast.test
    a, b = f"{contrast.a.candidate} of A", f"{contrast.b.candidate} of B"
    if _equal(contrast):
        return f"{b} has the same scores as {a} on {metric_of(comparison)}; {sample(contrast)}."
    if math.isnan(test.p):
        return f"{b} differs from {a} by {number(test.mean, signed=True)} in {metric_of(comparison)}; not tested: {test.note}."
    return (
        f"{b} {SHOWN[_verdict(contrast, comparison)]} {a} on {metric_of(comparison)} "
        f"(difference {effect_in_words(test, contrast.p_holm, 'Holm-corrected p')}; {sample(contrast)})."
    )


def _verdict(contrast: CandidateContrast, comparison: RunComparison) -> str:
    return verdict(contrast.test.mean, contrast.p_holm, comparison.sign)


def _equal(contrast: CandidateContrast) -> bool:
    return contrast.test.mean == 0 and contrast.test.note == ALL_EQUAL


def _data(comparison: RunComparison) -> Iterator[str]:
    a, b, fields = comparison.a, comparison.b, [field.partition(".")[0] for field in comparison.study]
    if a.spacing_mm != b.spacing_mm or "preprocess" in fields:
        of_a, of_b = (f"{dimensions(run.spacing_mm)} mm" if run.spacing_mm else "unknown" for run in (a, b))
        yield f"Images were prepared in different ways (grid: {of_a} in A, {of_b} in B): a difference may come from that."
    if "data" in fields and comparison.pairing.subjects:
        yield "The data sets are read in different ways: images or labels of one subject may not be the same in both."
    if "store" in fields and not {"data", "preprocess", "subjects"} & set(fields):
        yield "The prepared data differ although both studies describe the same data: images or labels have changed."


def _tests(comparison: RunComparison) -> Iterator[str]:
    contrasts = comparison.contrasts
    if any(c.paired_by == "subject" for c in contrasts):
        yield (
            "A test over subject means speaks about these trained models: it ignores the variation between training runs, so for "
            "new runs it calls too many differences significant. Give both studies the same splits to get the crossed test."
        )
    if any(c.paired_by == "subject and split" for c in contrasts) and not comparison.same_seeds:
        yield (
            "Paired fits did not start from the same weights and batches, which follow from the study's name, its seed and the "
            "number of the split: this adds variation, which the crossed test counts."
        )
    noted = [c for c in contrasts if c.paired_by != "nothing" and not _equal(c)]
    for note in dict.fromkeys(note for c in noted for note in c.test.remarks):
        yield f"{listed([called(c) for c in noted if note in c.test.remarks])}: {note}."


def _selection(comparison: RunComparison) -> Iterator[str]:
    if any(c.winners for c in comparison.contrasts):
        chosen = "Each winner was chosen on validation subjects, who are tested in other splits"
        yield f"{chosen}: the difference of the winners describes, it does not confirm."
    if comparison.other_trials:
        trials = count(len(comparison.other_trials), "candidate")
        yield f"{trials} of both searches share a name but not the recipe, and are not compared."


def _completeness(comparison: RunComparison) -> Iterator[str]:
    parties = {"A": comparison.a, "B": comparison.b}
    for side, party in parties.items():
        if party.finished < party.planned:
            lacking = f"{party.planned - party.finished} of {party.planned} fits have no score"
            yield f"{side}: {lacking}; tests use what both have."
    sides = {(run, s.candidate): s for c in comparison.contrasts for run, s in (("A", c.a), ("B", c.b))}.values()
    if undefined := sum(side.undefined for side in sides):
        total = sum(side.values for side in sides)
        yield f"{undefined} of {total} values of the metric are undefined (the reference is empty) and are left out."
    if objectives := sorted({party.objective for party in parties.values()} - {comparison.metric}):
        yield f"{' and '.join(objectives)} chose the epochs, not the metric that is compared."
