"""Does bfloat16 change what comes out? Soft Dice on validation after equal steps in float32 and in bfloat16: 6 splits, on a CPU.

Run:    python tests/benchmarks/bench_precision.py          # 5 minutes; hippocampus_msd only with SOFTSEG_TEST_DATA
Target: within .005 of float32, the mean over splits

A processor that does not compute in bfloat16 imitates it, slowly: the figures are as good there.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Literal

from record import Headline, record

from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, Study, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.study_file import load_study
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitTask

SPLITS, MOST = 6, 0.005
HIPPOCAMPUS = Path(__file__).parents[2] / "studies/s003_hippocampus.py"
PHANTOM = Study(
    name="phantom",
    question="Does bfloat16 change what comes out?",
    data=Phantom(subjects=24),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=SPLITS),
    candidates={"soft": Recipe(network=UNet(filters=(16, 32, 64)), optim=Optim(lr=3e-3, epochs=15, patience=None))},
)
WORDS = {"phantom": "phantom, 2D", "hippocampus": "hippocampus_msd, 3D"}
HEADLINES = tuple(
    Headline(
        key=f"{name}_difference",
        what=f"soft Dice on validation ({words}), bfloat16 against float32 after equal steps: difference of means",
        at_most=MOST,
    )
    for name, words in WORDS.items()
)


def main() -> None:
    """Measure, and print a table."""
    root = os.environ.get("SOFTSEG_TEST_DATA")
    studies = {"phantom": PHANTOM} | ({"hippocampus": _hippocampus()} if root else {})
    figures: dict[str, float] = {}
    print(f"{'soft Dice on validation':<24}{'split':>6}{'float32':>10}{'bfloat16':>10}{'difference':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for name, study in studies.items():
            scores = [_scores(study, split, Path(folder), root) for split in range(SPLITS)]
            for split, (exact, low) in enumerate(scores):
                print(f"{name:<24}{split:>6}{exact:>10.4f}{low:>10.4f}{low - exact:>12.4f}")
            differences = [low - exact for exact, low in scores]
            figures |= {
                f"{name}_float32": statistics.mean(exact for exact, _ in scores),
                f"{name}_bfloat16": statistics.mean(low for _, low in scores),
                f"{name}_difference": abs(statistics.mean(differences)),
                f"{name}_largest": max(map(abs, differences)),
            }
    if root is None:
        print("hippocampus_msd is left out: SOFTSEG_TEST_DATA names no folder that has it")
    record("precision", figures, HEADLINES)


def _hippocampus() -> Study:
    """Of s003 fewer subjects and epochs."""
    study = load_study(HIPPOCAMPUS).study
    recipe = study.candidates["soft"]
    recipe = recipe.replace(optim=recipe.optim.replace(epochs=12, patience=None))
    return study.replace(
        subjects=30, splits=study.splits.replace(count=SPLITS), candidates={"soft": recipe}, control=None, objective="dice_dml"
    )


def _scores(study: Study, split: int, folder: Path, root: str | None) -> tuple[float, float]:
    """On validation, in float32 and in bfloat16; both are evaluated in float32."""
    cases = study.data.cases(None if root is None else Path(root))
    subjects = sorted({case.subject for case in cases})[: study.subjects]
    cases = [case for case in cases if case.subject in subjects]
    splits = study.make_splits({case.subject: case.site for case in cases})
    store = build_store(folder, cases, study.data, study.preprocess)

    def score(precision: Literal["float32", "bfloat16"]) -> float:
        recipe = study.candidates["soft"]
        place = folder / f"{study.name}-{split}-{precision}"
        task = FitTask(
            study=study.name, seed=0, candidate="soft", split=splits[split], objective="dice_dml", folder=str(place),
            recipe=recipe.replace(optim=recipe.optim.replace(precision=precision)),
            store=str(store), store_fingerprint=fingerprint(cases, study.data, study.preprocess),
        )  # fmt: skip
        result = fit(task)
        assert result.score is not None, result.reason
        return result.score

    return score("float32"), score("bfloat16")


if __name__ == "__main__":
    main()
