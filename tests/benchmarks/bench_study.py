"""What does a study cost? Wall time and processor hours, stage by stage; what racing saves; what fits at the same time cost.

Run:     python tests/benchmarks/bench_study.py          # 5 minutes: s001 on one split, a race, 1, 2 and 4 fits at a time
         python tests/benchmarks/bench_study.py --before CLONE [--studies s001 s003] [--splits N] [--rounds N] [--data-root DATA]
         # and the same studies with the package of CLONE, in alternation: all splits of s001 3 min each, of s003 31 min
Targets: at the same results (as many fits, mean scores within .005) a seventh of the cost before the work on speed, or as near as
         this machine allows; 2 fits at a time on 2 processors: at least 1.8 times the fits per hour of 1, at no more than 1.1 times
         the processor time for each
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from record import Headline, record
from run_cost import STAGES, Cost, cost_of

from softseg_dist.record.ledger import Ledger

ROOT = Path(__file__).parents[2]
STUDIES = {"s001": "s001_quickstart", "s003": "s003_hippocampus"}
SAME = 0.005  # of mean scores
FEWER_SPLITS = """
from pathlib import Path
from softseg_dist.study_file import load_study
STUDY = load_study(Path({path!r})).study
STUDY = STUDY.replace(splits=STUDY.splits.replace(count={splits}))
"""
SMALL = """
from softseg_dist import *
BASE = Recipe(network=UNet(filters=(8, 16)), optim=Optim(lr=1e-2, epochs={epochs}, batch_size=8))
SEARCH = None
def propose(trial):
    loss = {{"dice": Dice(), "wing": AdaptiveWing(), "bce": BCE()}}[trial.suggest_categorical("loss", ["dice", "wing", "bce"])]
    return BASE.replace(loss=loss, optim=BASE.optim.replace(lr=trial.suggest_float("lr", 1e-4, 3e-2, log=True)))
{search}
STUDY = Study(
    name="small", question="What does it cost?", data=Phantom(subjects=16, size=(64, 64)), preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count={splits}), candidates={{"control": BASE}}, control="control", search=SEARCH,
)
"""
RACES = {"race": "", "every fit": ", race=None"}  # all trials are drawn at random, so both have the same
AT_A_TIME = (1, 2, 4)
HEADLINES = (
    Headline(key="race_cpu_share", what="processor time of 12 candidates x 6 small splits with a race, of that without"),
    Headline(
        key="at_a_time_2_speed_up",
        what="2 equal fits at a time on 2 cores, against 1",
        unit="times the fits per hour",
        at_least=1.8,
    ),
    Headline(key="at_a_time_2_cpu_ratio", what="processor time of each of them, against one alone", unit="times", at_most=1.1),
)
BEFORE = (
    *(
        Headline(key=f"{name}_{key}_ratio", what=f"{what} of {name} before the work on speed, of that now", unit="times")
        for name in STUDIES
        for key, what in (("cpu_h", "processor time"), ("wall_s", "wall time"))
    ),
    *(
        Headline(key=f"{name}_score_difference", what=f"mean test score of {name} before and now: difference", at_most=SAME)
        for name in STUDIES
    ),
)
NUM_EQUAL = 8


def main(options: argparse.Namespace) -> None:
    """Measure, and print the tables."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in options.studies:
            figures |= whole_study(place / name, name, options)
        if options.before is None:
            figures |= racing(place / "racing")
            figures |= concurrency(place / "concurrency")
    if options.before is None:
        record("study", figures, HEADLINES)
    else:
        record("study_before", figures, BEFORE, short=options.splits is not None)


def whole_study(folder: Path, name: str, options: argparse.Namespace) -> dict[str, float]:
    """A study of `studies/`, by the package at hand and by that of `--before`."""
    folder.mkdir()
    study = ROOT / "studies" / f"{STUDIES[name]}.py"
    if options.splits:
        cut = folder / f"{STUDIES[name]}.py"
        cut.write_text(FEWER_SPLITS.format(path=str(study), splits=options.splits))
        study = cut
    more = ["--data-root", str(options.data_root)] if options.data_root else []
    packages = {"before": options.before, "now": ROOT} if options.before else {"now": ROOT}
    costs: dict[str, list[Cost]] = {which: [] for which in packages}
    for number in range(options.rounds):
        for which, package in packages.items():
            ran = cost_of(study, folder / f"{which}-{number}", *more, package=package.resolve())
            costs[which].append(ran)
    scores = {which: mean_scores(of[0].folder) for which, of in costs.items()}
    for which, of in costs.items():
        _print_stages(f"{name}, {scores[which][0]} fits, {which}", of)
    figures: dict[str, float] = {}
    for which, of in costs.items():
        figures |= {f"{name}_{which}_{key}": value for key, value in _medians(of).items()}
        figures |= {f"{name}_{which}_fits": scores[which][0], f"{name}_{which}_mean_score": scores[which][1]}
    return figures | (_compare(name, figures) if options.before else {})


def mean_scores(folder: Path) -> tuple[int, float]:
    """How many fits have finished, and the mean of their test scores."""
    found = [r.test_score for r in Ledger(folder).results().values() if r.test_score is not None]
    return len(found), statistics.fmean(found)


def racing(folder: Path) -> dict[str, float]:
    """The same 12 candidates on 6 splits, with and without a race."""
    folder.mkdir()
    figures: dict[str, float] = {}
    print(f"\n{'12 candidates x 6 splits':<28}{'fits':>8}{'wall s':>10}{'CPU hours':>12}")
    for name, race in RACES.items():
        file = folder / f"{name.replace(' ', '_')}.py"
        search = f"SEARCH = Search(propose, trials=11, startup_trials=11{race})"
        file.write_text(SMALL.format(search=search, splits=6, epochs=4))
        cost = cost_of(file, folder / name)
        print(f"{name:<28}{len(cost.ends):>8}{cost.wall_s:>10.1f}{cost.cpu_s / 3600:>12.4f}", flush=True)
        key = name.replace(" ", "_")
        figures |= {f"{key}_fits": len(cost.ends), f"{key}_wall_s": cost.wall_s, f"{key}_cpu_h": cost.cpu_s / 3600}
    return figures | {"race_cpu_share": figures["race_cpu_h"] / figures["every_fit_cpu_h"]}


def concurrency(folder: Path) -> dict[str, float]:
    """Equal fits, so many at a time; the first ones of each worker are left out, as they load what they need."""
    folder.mkdir()
    file, cores = folder / "equal.py", os.cpu_count() or 1
    figures: dict[str, float] = {}
    print(f"\n{'equal fits at a time':<28}{'fits/hour':>12}{'CPU s/fit':>12}{'speed-up':>10}")
    for at_a_time in AT_A_TIME:
        file.write_text(SMALL.format(search="", splits=NUM_EQUAL + at_a_time, epochs=15))
        room = {"RAY_OVERRIDE_RESOURCES": f'{{"CPU": {at_a_time}}}'}  # Ray starts no more than it believes to have cores
        cost = cost_of(file, folder / str(at_a_time), "--max-concurrent", str(at_a_time), **room)
        (start_s, before_s), (end_s, after_s) = cost.ends[at_a_time - 1], cost.ends[-1]
        per_hour, each_s = 3600 * NUM_EQUAL / (end_s - start_s), (after_s - before_s) / NUM_EQUAL
        figures |= {f"at_a_time_{at_a_time}_per_hour": per_hour, f"at_a_time_{at_a_time}_cpu_s": each_s}
        speed_up = per_hour / figures["at_a_time_1_per_hour"]
        said = f"{at_a_time}" + (f", more than the {cores} cores" if at_a_time > cores else "")
        print(f"{said:<28}{per_hour:>12.0f}{each_s:>12.2f}{speed_up:>10.2f}", flush=True)
        ratio = each_s / figures["at_a_time_1_cpu_s"]
        figures |= {f"at_a_time_{at_a_time}_speed_up": speed_up, f"at_a_time_{at_a_time}_cpu_ratio": ratio}
    return figures


def _print_stages(title: str, costs: Sequence[Cost]) -> None:
    print(f"\n{title:<42}{'wall s':>10}{'CPU s':>10}")
    for stage in STAGES:
        wall, cpu = (statistics.median(cost.stages[stage][k] for cost in costs) for k in (0, 1))
        print(f"{stage:<42}{wall:>10.1f}{cpu:>10.1f}")
    of_all = _medians(costs)
    print(f"{'in all':<42}{of_all['wall_s']:>10.1f}{of_all['cpu_h'] * 3600:>10.1f}", flush=True)


def _medians(costs: Sequence[Cost]) -> dict[str, float]:
    stages = {stage: statistics.median(cost.stages[stage][0] for cost in costs) for stage in STAGES}
    return {
        "wall_s": statistics.median(cost.wall_s for cost in costs),
        "cpu_h": statistics.median(cost.cpu_s for cost in costs) / 3600,
        **{f"{stage.replace(',', '').replace(' ', '_')}_s": seconds for stage, seconds in stages.items()},
    }


def _compare(name: str, figures: Mapping[str, float]) -> dict[str, float]:
    before, now = ({key: figures[f"{name}_{w}_{key}"] for key in ("fits", "mean_score", "wall_s", "cpu_h")}
                   for w in ("before", "now"))  # fmt: skip
    print(f"\n{name + ', before / now':<42}{'wall':>10}{'CPU':>10}{'mean score':>24}")
    scores = f"{before['mean_score']:.4f}, {now['mean_score']:.4f}"
    wall, cpu = (before[key] / now[key] for key in ("wall_s", "cpu_h"))
    print(f"{'ratio':<42}{wall:>10.2f}{cpu:>10.2f}{scores:>24}", flush=True)
    assert before["fits"] == now["fits"], (before, now)
    difference = abs(before["mean_score"] - now["mean_score"])
    return {f"{name}_wall_s_ratio": wall, f"{name}_cpu_h_ratio": cpu, f"{name}_score_difference": difference}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=["s001"])
    parser.add_argument("--splits", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("SOFTSEG_TEST_DATA"))
    given = parser.parse_args()
    given.splits = given.splits if given.before or given.splits else 1
    main(given)
