"""The cost of a study before it runs: fits, hours and money on machines that can be rented."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from softseg_dist.data.splits import Split, splits_final
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen
from softseg_dist.places import Place
from softseg_dist.record.ledger import Ledger
from softseg_dist.search.optuna_study import sample_proposals
from softseg_dist.study import Resources, Study
from softseg_dist.study_file import describe

PROPOSED = "(proposed)"  # stands for every candidate of a search: what will be proposed is not known yet


class Machine(Frozen):
    """A kind of machine that can be rented, and its price in USD per hour."""

    name: str
    provider: str
    region: str
    cpus: PositiveInt
    memory_gb: PositiveFloat
    gpus: NonNegativeInt = 0
    gpu: str = ""
    on_demand_usd: PositiveFloat
    spot_usd: PositiveFloat


class Prices(Frozen):
    """A price list: when it was written, where the prices can be looked up, and the machines."""

    written: date
    pages: dict[str, str]
    machines: tuple[Machine, ...] = Field(min_length=1)

    def are_old(self, today: date) -> bool:
        """Whether they are older than a year: then a plan shows hours without costs."""
        return (today - self.written).days > 365


@dataclass(frozen=True)
class Plan:
    """The fits of a study. `seconds_per_fit` is their mean if every fit trains all its epochs; None if it is not known.

    `tuning` fits find learning rates first. A race may save some of those of trials: how many is not known before. A nested study
    has `outer` studies of as many fits each.
    """

    study: str
    candidates: int
    trials: int
    splits: int
    seconds_per_fit: float | None
    outer: int = 1
    tuning: int = 0
    repeats: int = 1

    @property
    def fits(self) -> int:
        """Every candidate, fixed or proposed, on every split and repeat, and the trials of learning rates, of every outer split."""
        return ((self.candidates + self.trials) * self.splits * self.repeats + self.tuning) * self.outer


@dataclass(frozen=True)
class Offer:
    """A study on one machine of a kind. Several of them divide the hours and leave the money, None if it is not known, as it is."""

    machine: Machine
    places: int
    hours: float
    on_demand_usd: float | None
    spot_usd: float | None


def plan_study(study: Study, data_root: Path | None, seconds_per_fit: float | None = None, run: str | None = None) -> Plan:
    """How many fits a study has; how long they take, as given, or as measured in the run folder `run`.

    Only the names of the data set are read. Raises UserError if there is no data set, no finished fit in `run`, or both a
    number and a run.
    """
    if run is not None and seconds_per_fit is not None:
        raise UserError("--seconds-per-fit and --run both say how long a fit takes; give one of them")
    outer, splits = splits_of(study, data_root)
    trials, tune = study.search.trials if study.search else 0, study.tune_each
    per_candidate = tune.trials * min(tune.splits, len(splits)) if tune else 0
    if run is not None:
        seconds_per_fit = _mean_seconds(study, splits, trials, per_candidate, Ledger(run))
    num_fixed, outers = len(study.candidates), max(1, len(outer))
    return Plan(study.name, num_fixed, trials, len(splits), seconds_per_fit, outers, num_fixed * per_candidate, study.repeats)


def splits_of(study: Study, data_root: Path | None) -> tuple[tuple[Split, ...], tuple[Split, ...]]:
    """The outer splits of a study, () if it is not nested, and its splits: those of the first outer split if it is."""
    sites, persons = _people(study, data_root)
    outer = study.nested.of_cases(sites, persons, study.seed) if study.nested else ()
    return outer, (study.inner(outer[0]) if outer else study).make_splits(sites, persons)


def write_splits(study: Study, data_root: Path | None, path: Path) -> None:
    """Write the splits of a study as nnU-Net's `splits_final.json`. Raises UserError if it is nested."""
    if study.nested:
        raise UserError("a nested study has splits for every outer split; write those of a study without nested=...")
    sites, persons = _people(study, data_root)
    splits = splits_final(study.make_splits(sites, persons), persons)
    Place.at(path).write(json.dumps(splits, indent=1).encode())


def _people(study: Study, data_root: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """The site of each subject, and the subject of each case; only the names of the data set are read."""
    cases = sorted(study.kept(study.data.cases(data_root)), key=lambda case: case.subject)
    return {case.subject: case.site for case in cases}, {case.name: case.subject for case in cases}


def offers(plan: Plan, resources: Resources, machines: Sequence[Machine], costs: bool = True) -> tuple[Offer, ...]:
    """What the study takes on each machine that holds one of its fits, the cheapest spot machine or (no `costs`) the fastest first.

    Fits run side by side, as many as there are places, in rounds that last as long as a fit.
    """
    assert plan.seconds_per_fit is not None
    found = []
    for machine in machines:
        if (places := places_on(machine, resources)) == 0:
            continue
        hours = math.ceil(plan.fits / places) * plan.seconds_per_fit / 3600
        usd = (hours * price if costs else None for price in (machine.on_demand_usd, machine.spot_usd))
        found.append(Offer(machine, places, hours, *usd))
    return tuple(sorted(found, key=lambda offer: offer.spot_usd or offer.hours))


def places_on(machine: Machine, resources: Resources) -> int:
    """How many fits run side by side on a machine."""
    gpus = resources.gpus_of_worker(machine.gpus > 0)
    by_gpu = math.floor(machine.gpus / gpus + 1e-9) if gpus else machine.cpus
    places = min(machine.cpus // resources.cpus_per_fit, by_gpu)
    return min(places, resources.max_concurrent or places)


def load_prices(path: Path) -> Prices:
    """A price list in YAML. Raises UserError naming file, field and value if it is none."""
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot read the price list: {error.strerror}; name one with --prices") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"{path}: not a price list: {describe(error)}") from None


def _mean_seconds(study: Study, splits: Sequence[Split], trials: int, tuning: int, ledger: Ledger) -> float:
    """Seconds of a fit on average, from those that a run has finished; `tuning` fits of each candidate find its learning rate.

    A fit's time is taken to grow with its epochs and training subjects. What does not, such as its start, is counted as if it did:
    from --debug the answer for s001 was 16 s instead of 6; from some fits of the study itself it is right.
    """
    rates = _seconds_per_subject_epoch(ledger)
    recipes = [(name, recipe, 1.0 + tuning / (len(splits) * study.repeats)) for name, recipe in study.candidates.items()]
    samples = sample_proposals(study)
    recipes += [(PROPOSED, recipe, trials / len(samples)) for recipe in samples.values()]
    subjects = sum(len(split.train) for split in splits) / len(splits)
    total = sum(weight * subjects * recipe.optim.epochs * rates.get(name, rates[PROPOSED]) for name, recipe, weight in recipes)
    return total / sum(weight for _, _, weight in recipes)


def _seconds_per_subject_epoch(ledger: Ledger) -> Mapping[str, float]:
    """By candidate, and over all of them under the name PROPOSED."""
    subjects = {split.index: len(split.train) for split in ledger.splits()}
    spent: dict[str, tuple[float, int]] = {}
    for result in ledger.results().values():
        if result.state == "finished" and result.epochs and result.split in subjects:
            for name in (result.candidate, PROPOSED):
                seconds, work = spent.get(name, (0.0, 0))
                spent[name] = (seconds + result.duration_s, work + result.epochs * subjects[result.split])
    if not spent:
        raise UserError(f"{ledger.folder}: no fit has finished there; name the folder of a run, or give --seconds-per-fit")
    return {name: seconds / work for name, (seconds, work) in spent.items()}
