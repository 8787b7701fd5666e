"""Compare two runs, A and B, or two candidates of one run: what they have in common, which fields differ, by how much scores do.

Scores are paired by subject and split only where that is legitimate: a subject is the same person if both data sets have the same
source, a split is the same if the same people train, validate and test in it. Without common splits, means per subject are paired;
without common subjects nothing is, and nothing is tested. All differences are B minus A. No sentence claims more than its test.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from softseg_dist.data.splits import Split
from softseg_dist.errors import UserError
from softseg_dist.numerics.crossed_test import CrossedTest
from softseg_dist.numerics.metrics import TABLE, Row, row_of
from softseg_dist.numerics.statistics import ALL_EQUAL, NAN, TTest, holm, subject_test
from softseg_dist.record.changes import differences
from softseg_dist.report.paired_tests import effect_in_words, primary_test
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import ScoreTables, mean_of, soft_rows, soft_scores, undefined
from softseg_dist.report.tables import plain, summarise
from softseg_dist.words import SHOWN, count, dimensions, listed, number, verdict

# Fields of a data set that say whose images they are; others say what is read of them.
WHOSE = ("type", "folder", "shape", "seed")
ENOUGH = 2  # splits; one says nothing about the variation between training runs


@dataclass(frozen=True)
class RunPairing:
    """`splits` are (index in A, index in B) of splits with the same people, `subjects` those tested in both runs.

    `obstacle` says in words why scores cannot be paired by subject and split; "" if they can.
    """

    splits: tuple[tuple[int, int], ...]
    subjects: tuple[str, ...]
    obstacle: str = ""


def pairing_of(a: RunData, b: RunData) -> RunPairing:
    """What can be paired of two runs, whatever their candidates are."""
    data = a.study["data"], b.study["data"]
    if any(data[0].get(field) != data[1].get(field) for field in WHOSE):
        of_a, of_b = (", ".join(str(of[field]) for field in WHOSE[1:] if of.get(field) is not None) for of in data)
        sets = f"A is about {data[0]['type']}({of_a}), B about {data[1]['type']}({of_b})"
        return RunPairing((), (), f"{sets}: subjects of the same name are other people")
    subjects = tuple(sorted(a.tested & b.tested))
    if not subjects:
        return RunPairing((), (), "no subject was tested in both")
    left: dict[tuple[frozenset[str], ...], list[int]] = defaultdict(list)  # a run of few people may have equal splits by chance
    for split in b.splits:
        left[_people(split)].append(split.index)
    splits = tuple((split.index, left[_people(split)].pop(0)) for split in a.splits if left[_people(split)])
    if len(splits) >= ENOUGH:
        return RunPairing(splits, subjects)
    obstacle = f"{'only one' if splits else 'no'} split of A has the same people in training, validation and test as one of B"
    if a.subjects != b.subjects:
        both = len(a.subjects & b.subjects)
        obstacle += f"; {len(a.subjects)} people took part in A, {len(b.subjects)} in B, {both} in both"
    return RunPairing(splits, subjects, obstacle)


def _people(split: Split) -> tuple[frozenset[str], ...]:
    return frozenset(split.train), frozenset(split.validation), frozenset(split.test)


# Fields of a study that change no result, or are compared elsewhere.
LEFT_OUT = ("name", "question", "candidates", "control", "resources")
UNPAIRED = "nothing is paired: a difference of two means"
Changed = dict[str, tuple[str, str]]  # field, joined by dots: its value in A and in B


@dataclass(frozen=True)
class Party:
    """One of the two runs. `run` is its folder or URI as given, `planned` and `finished` count fits, `spacing_mm` was prepared."""

    run: str
    study: str
    objective: str
    num_splits: int
    num_tested: int
    planned: int
    finished: int
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True)
class Side:
    """One candidate in its own run: the mean over all its scores. Of `values` (case, class, split) `undefined` are left out."""

    candidate: str
    mean: float
    undefined: int
    values: int


@dataclass(frozen=True)
class CandidateContrast:
    """A candidate of B minus one of A. `changed` are the fields in which their recipes differ.

    `test` is the crossed test if scores are paired by subject and split, the t-test over subjects if by subject alone, and
    a difference of means without p if by nothing; `p_holm` adjusts it over all contrasts.
    """

    a: Side
    b: Side
    winners: bool
    changed: Changed
    paired_by: Literal["subject and split", "subject", "nothing"]
    test: TTest
    p_holm: float = NAN


@dataclass(frozen=True)
class RunComparison:
    """Everything that is said about two runs.

    `study` are the fields in which the studies differ, the store among them; `versions` those of the packages. `only_a`,
    `only_b`: candidates that the other run has not; `other_trials`: proposed in both under one name, with other recipes.
    """

    a: Party
    b: Party
    metric: Row
    study: Changed
    versions: Changed
    pairing: RunPairing
    contrasts: tuple[CandidateContrast, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_trials: tuple[str, ...]


@dataclass(frozen=True)
class _Scored:
    party: Party
    data: RunData
    scores: ScoreTables
    undefined: Mapping[str, tuple[int, int]]

    @property
    def recipes(self) -> dict[str, Mapping[str, Any]]:
        return {candidate.name: candidate.recipe for candidate in self.data.candidates}

    def table(self, name: str) -> pd.DataFrame:
        """Scores of a candidate, by subject and split."""
        return pd.DataFrame(self.scores.of(name), list(self.scores.subjects), list(self.scores.splits))

    def side(self, name: str) -> Side:
        return Side(name, mean_of(self.scores.of(name)), *self.undefined.get(name, (0, 0)))


Both = tuple[_Scored, _Scored]


def compare(
    runs: tuple[RunData, RunData],
    called: tuple[str, str],
    candidates: tuple[str | None, str | None] = (None, None),
    metric: str | None = None,
) -> RunComparison:
    """Compare two runs, A and B, finished or not, or two candidates of one run.

    `called` are their folders or URIs as the user gave them. `candidates` are one of each; a name that is given alone stands for
    both, and without any those of the same name and the winners are compared. `metric` may be any that may be an objective;
    without it is the objective of both studies.

    Raises UserError if there is nothing to compare, or nothing to compare it by.
    """
    objective, pairing = _objective(runs, called, metric), pairing_of(*runs)
    a, b = both = _scored(runs[0], called[0], objective), _scored(runs[1], called[1], objective)
    other = _other_trials(*runs)
    pairs = _named(both, candidates) or _matched(both, pairing, other)
    found = [_contrast(both, pair, pairing, winners) for pair, winners in pairs.items()]
    adjusted = holm([contrast.test.p for contrast in found])
    studies = [{k: v for k, v in run.study.items() if k not in LEFT_OUT} for run in runs]
    stores = [{"store": run.run["store_fingerprint"]} for run in runs if run.run.get("store_fingerprint")]
    return RunComparison(
        a=a.party,
        b=b.party,
        metric=objective,
        study=_changed(*studies) | (_changed(*stores) if len(stores) == 2 else {}),
        versions=_changed(*(run.run.get("versions", {}) for run in runs)) if all(run.run for run in runs) else {},
        pairing=pairing,
        contrasts=tuple(replace(c, p_holm=p) for c, p in zip(found, adjusted, strict=True)),
        only_a=tuple(name for name in a.recipes if name not in b.recipes),
        only_b=tuple(name for name in b.recipes if name not in a.recipes),
        other_trials=other,
    )


def _objective(runs: tuple[RunData, RunData], called: tuple[str, str], metric: str | None) -> Row:
    measured = [set(map(str, run.results["metric"].unique())) for run in runs]
    own = [row_of(run.study["objective"]) for run in runs]
    of_a, of_b = (row.name for row in own)
    known_rows = {name: row for name, row in TABLE.items() if row.may_lead} | {row.name: row for row in own}
    common = ", ".join(name for name in known_rows if name in measured[0] & measured[1]) or "none is in both"
    if metric is None and of_a != of_b:
        raise UserError(f"the objective is {of_a} in {called[0]} and {of_b} in {called[1]}; choose with --metric: {common}")
    name = metric or of_a
    if name not in known_rows:
        raise UserError(f"--metric must be one of {common}, got {name!r}")
    for run, known in zip(called, measured, strict=True):
        if name not in known:
            raise UserError(f"{run}: no test case has the metric {name}; choose with --metric: {common}")
    return known_rows[name]


def _scored(run: RunData, called: str, objective: Row) -> _Scored:
    party = Party(
        run=called,
        study=run.study["name"],
        objective=row_of(run.study["objective"]).name,
        num_splits=len(run.splits),
        num_tested=len(run.tested),
        planned=run.num_planned,
        finished=len(run.finished),
        spacing_mm=run.spacing_mm,
    )
    scores = soft_scores(run.results, objective.name)
    return _Scored(party, run, scores, undefined(soft_rows(run.results, objective.name)))


def _named(both: Both, candidates: tuple[str | None, str | None]) -> dict[tuple[str, str], bool]:
    """The pair that was asked for, {} if none was; it is not said to be that of the winners."""
    name_a, name_b = candidates[0] or candidates[1], candidates[1] or candidates[0]
    if both[0].data.folder.resolve() == both[1].data.folder.resolve() and name_a == name_b:
        two = f"name two candidates with --candidate-a and --candidate-b: {', '.join(both[0].recipes)}"
        raise UserError(f"{both[0].party.run}: compared with itself; {two}")
    if name_a is None or name_b is None:
        return {}
    for name, run in ((name_a, both[0]), (name_b, both[1])):
        if name not in run.recipes:
            raise UserError(f"{run.party.run}: has no candidate {name!r}; there are {', '.join(run.recipes)}")
        if name not in run.scores.tables:
            raise UserError(f"{run.party.run}: no fit of {name} has finished, so there is nothing to compare")
    return {(name_a, name_b): False}


def _matched(both: Both, pairing: RunPairing, left_out: Sequence[str]) -> dict[tuple[str, str], bool]:
    """Candidates of the same name with scores in both runs, and the winners: {(name in A, in B): are they the winners?}."""
    common = [name for name in both[0].recipes if all(name in run.scores.tables for run in both)]
    pairs = {(name, name): False for name in common if name not in left_out}
    if not pairs and not pairing.subjects:
        nothing = f"nothing in common: no candidate of the same name, and {pairing.obstacle}"
        to_do = "name two candidates with --candidate-a and --candidate-b"
        raise UserError(f"{both[0].party.run} and {both[1].party.run}: {nothing}; {to_do}")
    winners = summarise(both[0].data).winner.name, summarise(both[1].data).winner.name
    return pairs | {winners: True}


def _other_trials(a: RunData, b: RunData) -> tuple[str, ...]:
    """A search counts its candidates: equal names mean nothing unless the recipes are equal."""
    of_b = {candidate.name: candidate for candidate in b.candidates}
    both = [(candidate, of_b[candidate.name]) for candidate in a.candidates if candidate.name in of_b]
    return tuple(one.name for one, other in both if (one.proposed or other.proposed) and one.recipe != other.recipe)


def _contrast(both: Both, pair: tuple[str, str], pairing: RunPairing, winners: bool) -> CandidateContrast:
    (a, name_a), (b, name_b) = zip(both, pair, strict=True)
    people, splits_a, splits_b = list(pairing.subjects), [i for i, _ in pairing.splits], [j for _, j in pairing.splits]
    scores_a, scores_b = a.table(name_a).reindex(people), b.table(name_b).reindex(people)
    table = (scores_b.reindex(columns=splits_b).to_numpy() - scores_a.reindex(columns=splits_a).to_numpy()).astype(np.float64)
    shared = ScoreTables(pairing.subjects, tuple(splits_b), {})
    crossed, sides, recipes = primary_test(shared, table), (a.side(name_a), b.side(name_b)), (a.recipes[name_a], b.recipes[name_b])
    contrast = CandidateContrast(*sides, winners, _changed(*recipes) if all(recipes) else {}, "subject and split", crossed)
    if crossed.num_splits >= ENOUGH:
        return contrast
    over_subjects = subject_test((scores_b.mean(axis=1) - scores_a.mean(axis=1)).to_numpy(np.float64))
    if over_subjects.num_subjects:  # missing fits, too, may leave less than two splits
        return replace(contrast, paired_by="subject", test=over_subjects)
    return replace(contrast, paired_by="nothing", test=TTest(contrast.b.mean - contrast.a.mean, note=UNPAIRED))


def _changed(a: Any, b: Any) -> Changed:
    return {found.field: (found.old, found.new) for found in differences(a, b)}


def comparison_json(comparison: RunComparison) -> dict[str, Any]:
    """The numbers, ready for json.dumps, and the words that belong to them."""
    said = {"answer": answer(comparison), "pairing_in_words": pairing_sentence(comparison), "caveats": list(caveats(comparison))}
    return said | plain(comparison)


def answer(comparison: RunComparison) -> str:
    """The finding: in full for one contrast, counted for several."""
    contrasts = comparison.contrasts
    if len(contrasts) == 1:
        return _finding(contrasts[0], comparison)
    if all(math.isnan(c.test.p) and not _equal(c) for c in contrasts):
        return f"Nothing could be tested ({contrasts[0].test.note})."
    said = {v: [c for c in contrasts if _verdict(c, comparison) == v] for v in ("better", "worse", "not shown")}
    equal = [c for c in said["not shown"] if _equal(c)]
    groups = {"B is better than A": said["better"], "B is worse than A": said["worse"], "all scores are the same": equal}
    shown = [f"{what} for {listed([title_of(c) for c in of])} ({len(of)} of {len(contrasts)})" for what, of in groups.items() if of]
    if unsure := len(said["not shown"]) - len(equal):
        shown.append(f"no difference was shown for {unsure} of {len(contrasts)}")
    return f"On {comparison.metric.full_title}: {'; '.join(shown)}."


def pairing_sentence(comparison: RunComparison) -> str:
    """How scores are paired and tested, and if not by subject and split, why not."""
    pairing, a, b = comparison.pairing, comparison.a.num_splits, comparison.b.num_splits
    common, people = len(pairing.splits), count(len(pairing.subjects), "subject")
    if common >= ENOUGH:
        left = "" if a == b == common else f" of {a} in A and {b} in B; the others are left out of the tests"
        unit = "a subject in a split; crossed random-effects test, Holm-corrected"
        return f"Paired by subject and split: {common} splits have the same people in both{left}. Unit of analysis: {unit}."
    if pairing.subjects:
        unit = f"a subject's mean over the splits that it was tested in, of {people} tested in both; t-test over subjects"
        return f"Paired by subject alone, as {pairing.obstacle}. Unit of analysis: {unit}, Holm-corrected."
    return f"Not paired, as {pairing.obstacle}. Means stand beside each other, without a test."


def title_of(contrast: CandidateContrast) -> str:
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


def _finding(contrast: CandidateContrast, comparison: RunComparison) -> str:
    test = contrast.test
    a, b = f"{contrast.a.candidate} of A", f"{contrast.b.candidate} of B"
    if _equal(contrast):
        return f"{b} has the same scores as {a} on {comparison.metric.full_title}; {sample(contrast)}."
    if math.isnan(test.p):
        differs = f"{b} differs from {a} by {number(test.mean, signed=True)}"
        return f"{differs} in {comparison.metric.full_title}; not tested: {test.note}."
    size = effect_in_words(test, contrast.p_holm, "Holm-corrected p")
    found = f"{b} {SHOWN[_verdict(contrast, comparison)]} {a} on {comparison.metric.full_title}"
    return f"{found} (difference {size}; {sample(contrast)})."


def _verdict(contrast: CandidateContrast, comparison: RunComparison) -> str:
    return verdict(contrast.test.mean, contrast.p_holm, comparison.metric.sign)


def _equal(contrast: CandidateContrast) -> bool:
    return contrast.test.mean == 0 and contrast.test.note == ALL_EQUAL


def caveats(comparison: RunComparison) -> Iterator[str]:
    """Limits of the comparison, the most serious first."""
    a, b, contrasts = comparison.a, comparison.b, comparison.contrasts
    fields = [field.partition(".")[0] for field in comparison.study]
    if a.spacing_mm != b.spacing_mm or "preprocess" in fields:
        of_a, of_b = (f"{dimensions(run.spacing_mm)} mm" if run.spacing_mm else "unknown" for run in (a, b))
        yield f"Images were prepared in different ways (grid: {of_a} in A, {of_b} in B): a difference may come from that."
    if "data" in fields and comparison.pairing.subjects:
        yield "The data sets are read in different ways: images or labels of one subject may not be the same in both."
    if "store" in fields and not {"data", "preprocess", "subjects"} & set(fields):
        yield "The prepared data differ although both studies describe the same data: images or labels have changed."
    if any(c.paired_by == "subject" for c in contrasts):
        speaks = "A test over subject means speaks about these trained models: it ignores the variation between training runs"
        yield f"{speaks}, so for new runs it rejects too often. Give both studies the same splits to get the crossed test."
    noted = [c for c in contrasts if c.paired_by != "nothing" and not _equal(c)]
    for note in dict.fromkeys(note for c in noted for note in c.test.remarks):
        yield f"{listed([title_of(c) for c in noted if note in c.test.remarks])}: {note}."
    if any(c.winners for c in contrasts):
        chosen = "Each winner was chosen by scores of its own run, often of subjects who are tested"
        yield f"{chosen}: the difference of the winners describes, it does not confirm."
    if comparison.other_trials:
        trials = count(len(comparison.other_trials), "candidate")
        yield f"{trials} of both searches share a name but not the recipe, and are not compared."
    parties = {"A": a, "B": b}
    for side, party in parties.items():
        if party.finished < party.planned:
            lacking = f"{party.planned - party.finished} of {party.planned} fits have no score"
            yield f"{side}: {lacking}; tests use what both have."
    sides = {(run, s.candidate): s for c in contrasts for run, s in (("A", c.a), ("B", c.b))}.values()
    if undefined := sum(side.undefined for side in sides):
        total = sum(side.values for side in sides)
        yield f"{undefined} of {total} values of the metric are undefined (the reference is empty) and are left out."
    if objectives := sorted({party.objective for party in parties.values()} - {comparison.metric.name}):
        yield f"{' and '.join(objectives)} chose the epochs, not the metric that is compared."
