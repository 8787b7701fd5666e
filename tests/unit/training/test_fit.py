"""One fit: deterministic, resumable to the last bit, idempotent, honest about failure, and the same data for every candidate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from softseg_dist import (
    AdaptiveWing,
    Affine,
    BatchDice,
    Dice,
    Loss,
    Metric,
    MonteCarlo,
    NormReLU,
    Optim,
    Phantom,
    Preprocess,
    Recipe,
    Scale,
    Sigmoid,
    Sum,
    UNet,
)
from softseg_dist.data.store import Store, build_store, fingerprint
from softseg_dist.judging.thresholds import CURVE
from softseg_dist.numerics.metrics import RECALIBRATED
from softseg_dist.training.batches import Batches
from softseg_dist.training.fit import RunningFit, fit
from softseg_dist.training.host_step import HostStepper
from softseg_dist.training.model import build_model, load_checkpoint
from softseg_dist.training.task import (
    FitResult,
    FitTask,
    Interrupted,
    Worker,
    cases_path,
    checkpoint_path,
    history_path,
    weights_path,
)

GOLDEN = Path(__file__).parent / "golden_curve.json"
RECIPE = Recipe(
    network=UNet(filters=(4, 8), dropout=0.1),
    activation=NormReLU(),
    loss=AdaptiveWing(),
    label="soft",
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),),
    optim=Optim(lr=5e-3, epochs=3, batch_size=8, precision="float32"),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> FitTask:
    data, preprocess = Phantom(subjects=6, size=(24, 24), num_slices=4, raters=2), Preprocess(dim=2)
    cases = data.cases(None)
    path = build_store(tmp_path_factory.mktemp("stores"), cases, data, preprocess)
    split = MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]
    return FitTask(
        study="golden", seed=0, candidate="c", recipe=RECIPE, split=split, objective="dice_dml",
        store=str(path), store_fingerprint=fingerprint(cases, data, preprocess), folder="",
    )  # fmt: skip


def stop_after(steps: int) -> Worker:
    """A worker that asks its fit to stop after so many steps."""
    counts: Iterator[int] = iter(range(1, 10**6))
    return Worker(stop=lambda: next(counts) >= steps)


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in history_path(folder).read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(task: FitTask, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    """The folder of a fit that was never stopped, and its result."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, fit(task.replace(folder=str(folder)))


def test_learning_curve_is_the_golden_one(straight: tuple[Path, FitResult]) -> None:
    """A change that is meant to be neutral leaves this curve alone; one that is not writes it anew and says why."""
    curve = [{k: row[k] for k in ("loss", "dice_dml")} for row in history(straight[0])]
    golden = json.loads(GOLDEN.read_text())
    assert [pytest.approx(row, rel=1e-4) for row in golden] == curve


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_a_fit_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    task: FitTask, straight: tuple[Path, FitResult], tmp_path: Path, steps: int
) -> None:
    (folder, whole), parts = straight, task.replace(folder=str(tmp_path))
    with pytest.raises(Interrupted):
        fit(parts, stop_after(steps))
    resumed = fit(parts)
    assert resumed.resumed_epoch is not None
    assert history(folder) == history(tmp_path)
    left, right = load_file(weights_path(folder)), load_file(weights_path(tmp_path))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert (resumed.score, resumed.test_score, resumed.thresholds) == (whole.score, whole.test_score, whole.thresholds)
    assert resumed.recalibration == whole.recalibration


def test_test_cases_are_also_measured_recalibrated_and_the_cases_that_chose_it_are_not(straight: tuple[Path, FitResult]) -> None:
    folder, result = straight
    assert FitResult.model_validate_json(result.model_dump_json()).recalibration == result.recalibration
    assert all(0.05 <= a <= 20 and np.isfinite(b) for a, b in result.recalibration.values())
    rows = pd.read_parquet(cases_path(folder))
    classes = set(rows["class"])
    assert set(result.recalibration) == classes
    for name in (*(f"{of}_recalibrated" for of in RECALIBRATED), "volume_at_0_mm3"):
        of = rows[rows["metric"] == name]
        assert set(of["subset"]) == {"test"}
        assert set(of["reference"]) == {"mean"}
        assert len(of) == len(classes) * rows[rows["subset"] == "test"]["case"].nunique()
        assert of["value"].notna().all()


def test_a_fit_of_everybody_has_weights_at_its_end_only_also_if_it_was_stopped(task: FitTask, tmp_path: Path) -> None:
    split = task.split
    everyone = split.train + split.validation + split.test
    everybody = task.replace(split=split.replace(train=everyone, validation=(), test=()))
    whole, parts = (everybody.replace(folder=str(tmp_path / name)) for name in ("whole", "parts"))
    assert fit(whole).best_epoch == RECIPE.optim.epochs
    last = RunningFit(everybody.replace(folder=str(tmp_path)), Worker()).batches.num_steps
    for steps in (last - 1, 1):  # in the last step, and, counted from there, behind it
        with pytest.raises(Interrupted):
            fit(parts, stop_after(steps))
        assert not weights_path(parts.folder).exists()
    fit(parts)
    left, right = load_file(weights_path(whole.folder)), load_file(weights_path(parts.folder))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_second_objective_is_measured_and_changes_nothing_else(
    task: FitTask, straight: tuple[Path, FitResult], tmp_path: Path
) -> None:
    _, one = straight
    two = fit(task.replace(folder=str(tmp_path / "two"), second_objective="brier"))
    assert (one.score, one.best_epoch) == (two.score, two.best_epoch)
    assert one.scores == {"dice_dml": one.score}
    other = fit(task.replace(folder=str(tmp_path / "other"), objective="brier", second_objective="dice_dml"))
    if other.best_epoch == two.best_epoch:
        assert two.scores == other.scores
    assert two.scores.keys() == other.scores.keys() == {"dice_dml", "brier"}


class Worst(Metric):
    """The largest error of any voxel."""

    short = "worst"
    higher_is_better = False

    def __call__(self, prediction: np.ndarray, reference: np.ndarray, scale: Scale) -> np.ndarray:
        """[K]."""
        assert len(scale.spacing_mm) == prediction.ndim - 2
        assert scale.mean_volumes_mm3[0] > 0
        return np.abs(prediction - reference).max(axis=(0, *range(2, prediction.ndim)))


def test_a_metric_of_the_user_leads_a_fit_and_is_in_its_history_rows_and_identity(task: FitTask, tmp_path: Path) -> None:
    own = task.replace(folder=str(tmp_path), objective=Worst(), second_objective="brier_skill")
    assert FitTask.model_validate_json(own.model_dump_json()) == own
    assert own.identity != own.replace(objective="brier_skill", second_objective=None).identity
    result = fit(own)
    epochs = [row["worst"] for row in history(tmp_path)]
    assert result.best_epoch == 1 + int(np.argmin(epochs))
    assert result.score == pytest.approx(min(epochs), abs=1e-6)
    assert result.scores.keys() == {"worst", "brier_skill"}
    rows = pd.read_parquet(cases_path(tmp_path))
    assert set(rows.loc[rows["metric"] == "worst", "reference"]) > {"mean"}
    assert rows.loc[rows["metric"] == "worst", "value"].between(0, 1).all()


def test_final_weights_too_are_exact_after_a_restart(task: FitTask, tmp_path: Path) -> None:
    straight = RunningFit(task.replace(folder=_folder(tmp_path / "a")), Worker())
    straight.run()
    for steps in (2, 1, 1):
        with pytest.raises(Interrupted):
            RunningFit(task.replace(folder=_folder(tmp_path / "b")), stop_after(steps)).run()
    resumed = RunningFit(task.replace(folder=_folder(tmp_path / "b")), Worker())
    resumed.run()
    pairs = zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_models_built_in_threads_have_the_weights_that_they_have_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build_model(RECIPE, 1, 1, (8, 8), seed, torch.full((1,), 0.1))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    alone = [weights(seed) for seed in range(32)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(weights, range(32)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def _folder(path: Path) -> str:
    path.mkdir(exist_ok=True)
    return str(path)


def test_an_ended_fit_is_returned_and_not_run_again(task: FitTask, tmp_path: Path) -> None:
    task = task.replace(folder=str(tmp_path))
    first = fit(task)
    written = weights_path(tmp_path).stat().st_mtime_ns
    assert fit(task.replace(attempt=1, threads=2)) == first
    assert weights_path(tmp_path).stat().st_mtime_ns == written
    assert not checkpoint_path(tmp_path).exists()


def test_another_recipe_in_the_same_folder_starts_anew(task: FitTask, tmp_path: Path) -> None:
    task = task.replace(folder=str(tmp_path))
    with pytest.raises(Interrupted):
        fit(task, stop_after(4))
    other = task.replace(recipe=RECIPE.replace(loss=Dice()))
    training = RunningFit(other, Worker())
    assert training.resumed_epoch is None
    assert not history_path(tmp_path).exists()
    assert load_checkpoint(other, []) is None


def test_a_torn_checkpoint_is_no_checkpoint(task: FitTask, tmp_path: Path) -> None:
    task = task.replace(folder=str(tmp_path))
    with pytest.raises(Interrupted):
        fit(task, stop_after(2))
    content = checkpoint_path(tmp_path).read_bytes()
    checkpoint_path(tmp_path).write_bytes(content[: len(content) // 2])
    assert fit(task).resumed_epoch is None


@pytest.mark.parametrize("loss", [BatchDice(), Sum(terms=(BatchDice(), Dice()), weights=(2, 1))], ids=str)
def test_a_step_follows_the_gradient_of_the_loss_of_the_whole_batch(task: FitTask, tmp_path: Path, loss: Loss) -> None:
    task = task.replace(recipe=RECIPE.replace(loss=loss, network=UNet(filters=(4, 8))))
    one, two = (RunningFit(task.replace(folder=_folder(tmp_path / name)), Worker()) for name in ("one", "two"))
    members = one.batches.order(0)[:7]
    assert isinstance(one.stepper, HostStepper)
    one.stepper.step(one.progress, members)
    image, target = two.batches.batch(0, members, "cpu")
    value = loss(two.model(image), target)
    value.backward()
    assert one.progress.losses == [pytest.approx(value.item(), rel=1e-6)]
    for ours, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


class NanLoss(Loss):
    """Not a number once the prediction's mean is above a limit."""

    after: float = -1.0

    def per_sample(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mean = prediction.flatten(1).mean(1)
        return torch.where(mean > self.after, mean * float("nan"), mean)


def test_a_loss_that_is_not_finite_ends_the_fit_with_epoch_and_cause(task: FitTask, tmp_path: Path) -> None:
    result = fit(task.replace(folder=str(tmp_path), recipe=RECIPE.replace(loss=NanLoss())))
    assert result.state == "failed"
    assert result.score is None
    assert result.reason.startswith("loss is nan in epoch 1, step 1: NanLoss() is not finite for finite predictions")


def test_diverged_weights_are_named_as_the_cause(task: FitTask, tmp_path: Path) -> None:
    wild = RECIPE.replace(optim=Optim(lr=1e30, epochs=2, batch_size=8), activation=Sigmoid())
    result = fit(task.replace(folder=str(tmp_path), recipe=wild))
    assert result.state == "failed"
    assert "weights diverged; try a smaller lr than 1e+30" in result.reason


def test_every_candidate_sees_the_same_weights_batches_and_fields(task: FitTask, tmp_path: Path) -> None:
    one = RunningFit(task.replace(folder=_folder(tmp_path / "a")), Worker())
    other_recipe = RECIPE.replace(loss=Dice(), activation=Sigmoid(), label="hard")
    two = RunningFit(task.replace(folder=_folder(tmp_path / "b"), candidate="d", recipe=other_recipe), Worker())
    weights = [
        (a, b) for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True) if "bias" not in name
    ]
    assert weights
    assert all(torch.equal(a, b) for a, b in weights)
    assert one.batches.order(1) == two.batches.order(1)
    (image, soft), (same, hard) = (t.batches.batch(1, [0, 3, 5], "cpu") for t in (one, two))
    assert torch.equal(image, same)
    assert torch.equal(hard, (soft >= 0.5).float())


def test_every_epoch_sees_every_item_once_and_never_another_subject(task: FitTask) -> None:
    store = Store.open(task.store)
    batches = Batches.of(task, store)
    assert sorted(batches.order(0)) == list(range(len(batches.items)))
    assert batches.order(0) != batches.order(1)
    assert {store.cases[case].subject for case, _ in batches.items} == set(task.split.train)


def test_rows_cover_validation_and_test_against_the_mean_every_rater_and_the_truth(
    task: FitTask, straight: tuple[Path, FitResult]
) -> None:
    folder, result = straight
    rows = pq.read_table(cases_path(folder)).to_pandas()
    assert set(rows[rows.subset == "validation"].subject) == set(task.split.validation)
    assert set(rows[rows.subset == "test"].subject) == set(task.split.test)
    assert set(rows.reference) == {"mean", "raters", "truth", *Store.open(task.store).cases[0].rater_names}
    curve = rows[(rows.metric == "dice") & (rows.reference == "mean") & (rows.case == rows.case.iloc[0])]
    assert set(CURVE) <= set(curve.threshold)
    mean = rows[(rows.subset == "test") & (rows.reference == "mean") & (rows.metric == "dice_dml")]
    assert result.test_score == pytest.approx(mean.groupby("subject", observed=True).value.mean().mean())


def test_early_stopping_waits_for_patience_epochs(task: FitTask, tmp_path: Path) -> None:
    frozen = RECIPE.replace(
        optim=Optim(lr=1e-12, epochs=20, patience=2, batch_size=8), network=UNet(filters=(4, 8), norm="instance")
    )
    result = fit(task.replace(folder=str(tmp_path), recipe=frozen))
    assert result.best_epoch is not None
    assert result.epochs == result.best_epoch + 2 < 20
    assert result.converged
    rarely = fit(task.replace(folder=str(tmp_path / "rarely"), recipe=frozen, validate_every=6))
    validated = [row["epoch"] for row in history(tmp_path / "rarely") if "dice_dml" in row]
    assert validated == [1, 6]  # patience that is shorter than that does not end a fit unseen
    assert rarely.epochs == max(rarely.best_epoch or 0, 1) + 6


def test_a_best_epoch_at_the_end_of_the_budget_is_not_converged(task: FitTask, tmp_path: Path) -> None:
    rising = RECIPE.replace(optim=Optim(lr=1e-3, epochs=2, batch_size=8))
    result = fit(task.replace(folder=str(tmp_path), recipe=rising))
    assert result.converged is (result.best_epoch == 1)


def test_an_epoch_report_reaches_the_worker(task: FitTask, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    fit(task.replace(folder=str(tmp_path)), Worker(report=seen.append))
    assert [row["epoch"] for row in seen] == [1, 2, 3]
    assert {"loss", "dice_dml", "lr", "dead_share"} <= set(seen[0])
