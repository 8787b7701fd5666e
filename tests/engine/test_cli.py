"""The command line as a user meets it: a study runs, is killed, goes on, reports; every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest
from commands import softseg, softseg_here
from features import listed_files, pattern_of
from sealed_files import put, value_of

pytestmark = pytest.mark.engine

STUDY = '''"""Tiny."""
from softseg_dist import (AdaptiveWing, Brier, Dice, MonteCarlo, NormReLU, Optim, Phantom, Preprocess, Recipe, Search, Sigmoid,
                          Study, UNet, factorial)

class Halved(Brier):
    """A loss that exists in this file alone."""
    def per_sample(self, prediction, target):
        return 0.5 * super().per_sample(prediction, target)

BASE = Recipe(network=UNet(filters=(4, 8)), optim=Optim(lr=5e-3, epochs={epochs}, batch_size=8))

def propose(trial):
    return BASE.replace(loss=Halved(), optim=BASE.optim.replace(lr=trial.suggest_float("lr", 1e-3, 1e-2, log=True)))

STUDY = Study(
    name="tiny", question="Does it run?", data=Phantom(subjects=6, size=(24, 24), num_slices=4, raters=2),
    preprocess=Preprocess(dim=2), splits=MonteCarlo(count=2),
    candidates=factorial(BASE, label=("hard", "soft")), control="hard", search=Search(propose, trials=2),
)
'''

STOP_ONCE = """STOPS = []

def stop_once():
    if not STOPS:
        STOPS.append(1)
        breakpoint()

class Halved"""


def write(folder: Path, text: str, epochs: int = 2) -> Path:
    path = folder / "tiny.py"
    path.write_text(text.replace("{epochs}", str(epochs)))
    return path


def table(run: Path) -> pd.DataFrame:
    keys = ["candidate", "split", "repeat", "subset", "grid", "case", "class", "reference", "threshold", "metric"]
    rows = pd.read_parquet(run / "results.parquet")
    return rows.astype({name: str for name in keys if name not in ("split", "repeat", "threshold")}).sort_values(
        keys, ignore_index=True
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("cli")
    ran = softseg("run", write(folder, STUDY), "--json", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["end"] == "done"
    return folder / "runs" / "tiny"


def test_a_run_leaves_what_the_design_promises(done: Path) -> None:
    left = ("study.json", "splits.json", "run.json", "results.parquet", "report/index.html", "mlflow.db")
    for name in (*left, "model/model.json", "model/model.safetensors"):
        assert (done / name).is_file(), name
    fit = done / "fits" / "hard" / "000"
    assert fit.with_suffix(".json").is_file()
    assert {p.name for p in fit.iterdir()} >= {"history.jsonl", "best.safetensors", "cases.parquet"}
    assert {"overlays.png", "differences.png"} <= {p.name for p in (done / "report").iterdir()}
    assert sorted(p.name for p in (done / "fits").iterdir()) == ["hard", "soft", "trial-000", "trial-001"]
    assert not list(done.rglob("checkpoint.pt"))


def test_a_run_leaves_the_listed_files_and_no_others(done: Path) -> None:
    """Hidden files, such as locks, are the engine's own."""
    top = done.parents[1]
    names = [str(path.relative_to(top)) for path in done.rglob("*") if path.is_file()]
    left = [name for name in names if "/." not in name]
    assert not [name for name in left if not any(pattern_of(known).fullmatch(name) for known in listed_files())]
    always = [name for name, every_run in listed_files().items() if every_run and name.startswith("runs/")]
    assert not [name for name in always if not any(map(pattern_of(name).fullmatch, left))]


def test_running_again_runs_nothing_and_changes_nothing(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "fits").rglob("*") if path.is_file()}
    again = softseg("run", done.parents[1] / "tiny.py", "--json", cwd=done.parents[1])
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (done / "fits").rglob("*") if path.is_file()} == before


WITHOUT_RAY = """
import sys
from softseg_dist.cli.main import app
try:
    app(sys.argv[1:])
finally:
    assert "ray" not in sys.modules
"""


def test_a_local_run_gives_the_same_table_without_ray_and_stops_at_breakpoints(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)  # a Ray of an earlier test in this process leaves its own
    text = STUDY.replace("        return 0.5", "        stop_once()\n        return 0.5").replace("class Halved", STOP_ONCE)
    command = [sys.executable, "-c", WITHOUT_RAY, "run", str(write(tmp_path, text)), "--local"]
    script = "p 'six times seven is', 6 * 7\ncontinue\n"
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, input=script, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "('six times seven is', 42)" in ran.stdout
    pd.testing.assert_frame_equal(table(tmp_path / "runs" / "tiny"), table(done), check_exact=True)
    left = [{path.relative_to(run) for path in run.glob("fits/*/*/*")} for run in (done, tmp_path / "runs" / "tiny")]
    assert left[0] == left[1]
    refitted = [sys.executable, "-c", WITHOUT_RAY, "refit", str(tmp_path / "runs/tiny"), "--candidate", "soft", "--local"]
    again = subprocess.run(refitted, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr


@pytest.mark.long  # in test_data_parallel.py without the command line
def test_two_workers_per_fit_give_the_rows_of_one_and_its_soft_scores_up_to_rounding(done: Path, tmp_path: Path) -> None:
    one_candidate = STUDY.replace('("hard", "soft")', '("hard",)').replace(", search=Search(propose, trials=2)", "")
    ran = softseg("run", write(tmp_path, one_candidate), "--workers-per-fit", 2, "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    keys = ["candidate", "split", "subset", "grid", "case", "class", "reference", "metric"]
    two, one = table(tmp_path / "runs" / "tiny"), table(done).query("candidate == 'hard'").reset_index(drop=True)
    pd.testing.assert_series_equal(two.value_counts(keys, sort=False), one.value_counts(keys, sort=False))
    for metric in ("brier", "dice_dml", "mae"):  # masks at a threshold amplify the last digits of a map
        values = [rows[rows["metric"] == metric].set_index(keys)["value"] for rows in (two, one)]
        pd.testing.assert_series_equal(*values, check_exact=False, rtol=0, atol=1e-3)
    of_fit = json.loads((tmp_path / "runs/tiny/fits/hard/000.json").read_text())
    assert of_fit["num_workers"] == 2


def test_any_candidate_is_trained_on_everybody_and_predicts_on_the_grid_of_an_image(done: Path, tmp_path: Path) -> None:
    refused = softseg_here("refit", done, "--candidate", "nobody", cwd=tmp_path)
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
    assert "has no candidate 'nobody'; there are hard, soft" in refused.stderr

    names = {"hard", "soft"} - {json.loads((done / "model/model.json").read_text())["candidate"]}
    name = sorted(names)[0]
    ran = softseg("refit", done, "--candidate", name, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    model = Path(ran.stdout.splitlines()[-1])
    card = json.loads((model / "model.json").read_text())
    assert (model.name, card["candidate"], card["num_subjects"]) == (f"model-{name}", name, 6)

    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    voxels = np.random.default_rng(0).normal(size=(24, 24, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "new.nii.gz")
    predicted = softseg_here("predict", model, tmp_path / "new.nii.gz", "--out", tmp_path / "maps", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    assert "its voxels are 2 x 3 x 4 mm, the model was trained on 0.5 x 0.5 x 2.5 mm; look at the maps" in predicted.stderr
    soft = nib.load(predicted.stdout.splitlines()[0])
    assert soft.shape == voxels.shape
    assert np.array_equal(soft.affine, affine)
    assert soft.get_data_dtype() == np.float32
    assert 0 <= soft.get_fdata().min() < soft.get_fdata().max() <= 1


def test_report_prints_the_numbers_of_the_page(done: Path) -> None:
    numbers = json.loads(softseg_here("report", done, "--json", cwd=done.parents[1]).stdout)
    assert {c["name"] for c in numbers["ranking"]} == {"hard", "soft", "trial-000", "trial-001"}
    page = (done / "report" / "index.html").read_text()
    assert all(f"{c['mean']:.3f}" in page for c in numbers["ranking"])
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_a_changed_study_is_refused_with_what_changed_and_fits_stay(done: Path) -> None:
    folder = done.parents[1]
    before = table(done)
    changed = write(folder, STUDY.replace("lr=5e-3", "lr=5e-4"))
    refused = softseg_here("run", changed, cwd=folder)
    write(folder, STUDY)
    assert refused.returncode == 2
    assert "candidates.hard.optim.lr: 0.005 -> 0.0005" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    pd.testing.assert_frame_equal(table(done), before)


@pytest.mark.long  # also of a driver that is killed: test_run.py, and test_remote.py compares the tables
def test_kill_minus_nine_and_the_same_command_again_give_the_same_table(done: Path, tmp_path: Path) -> None:
    study = write(tmp_path, STUDY)
    command = [sys.executable, "-m", "softseg_dist.cli.main", "run", str(study), "--json"]
    driver = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    fits, run = tmp_path / "runs/tiny/fits", tmp_path / "runs/tiny"
    deadline = time.monotonic() + 120
    while not list(fits.glob("*/*[0-9].json")) and time.monotonic() < deadline:
        time.sleep(0.05)  # polling a file that another process writes
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = {path: path.stat().st_mtime_ns for path in fits.glob("*/*[0-9].json")}
    assert kept, "no fit had finished in two minutes"
    assert len(kept) < 8
    again = softseg("run", study, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pd.testing.assert_frame_equal(table(run), table(done))


@pytest.mark.long  # also in test_run.py, and at many moments in test_endings.py and the fault suite
def test_ctrl_c_stops_resumably_with_exit_code_130(tmp_path: Path) -> None:
    study = write(tmp_path, STUDY, epochs=2000)
    command = [sys.executable, "-m", "softseg_dist.cli.main", "run", str(study), "--json"]
    driver = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs/tiny/fits").glob("*/*/history.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)  # polling a file that another process writes
    os.killpg(driver.pid, signal.SIGINT)  # what a terminal does: the whole group gets it
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["end"] == "interrupted"
    assert list((tmp_path / "runs/tiny/fits").glob("*/*/checkpoint.pt"))
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("subjects=6, size", "subjects=2, size"), "at least 3 subjects"),
        (('control="hard"', 'control="harder"'), "control 'harder' is not a candidate"),
        (("UNet(filters=(4, 8))", "UNet(filters=(4, 8, 16, 32, 64, 128, 256))"), "cannot be trained on images of size"),
        (("Phantom(subjects=6, size=(24, 24), num_slices=4, raters=2)", 'Phantom(subjects=6, colour="red")'), "Phantom.colour"),
        (
            (
                "Phantom(subjects=6, size=(24, 24), num_slices=4, raters=2)",
                '__import__("softseg_dist").Bids("nowhere", image="T1w", labels={"a": "b"})',
            ),
            "nowhere",
        ),
        (("return BASE.replace", "return 1 or BASE.replace"), "propose"),
    ],
    ids=["too few subjects", "control", "network too deep", "unknown field", "missing folder", "propose"],
)
def test_a_mistake_is_one_line_with_exit_code_2_before_any_fit(tmp_path: Path, edit: tuple[str, str], message: str) -> None:
    assert edit[0] in STUDY
    ran = softseg_here("run", write(tmp_path, STUDY.replace(*edit)), "--local", cwd=tmp_path)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/fits/*/*.json"))


@pytest.mark.timed
def test_a_local_run_takes_less_than_half_the_processor_time_of_one_through_ray(tmp_path: Path) -> None:
    """Of a two-fit study with report and model; Ray's own processes are counted while they live, as they end by a signal."""
    study = write(tmp_path, STUDY.replace(", search=Search(propose, trials=2)", "").replace('("hard", "soft")', '("hard",)'))
    assert softseg("prepare", study, cwd=tmp_path).returncode == 0
    local_s = processor_s(tmp_path, study, "--out", "local", "--local")
    ray_s = processor_s(tmp_path, study, "--out", "ray")
    print(f"\nprocessor time: {local_s:.1f} s local, {ray_s:.1f} s through Ray")
    assert local_s < ray_s / 2


def processor_s(folder: Path, *args: object) -> float:
    """Processor seconds, user and system, of a run and all processes that it starts."""
    command = [sys.executable, "-m", "softseg_dist.cli.main", "run", *map(str, args)]
    driver, spent = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL), {}
    while driver.poll() is None:
        with suppress(psutil.Error):
            for process in (psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)):
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    spent[process.pid] = times.user + times.system
        time.sleep(0.1)  # polling processes of another program
    assert driver.returncode == 0
    return sum(spent.values())


@pytest.mark.timed
def test_debug_runs_the_quickstart_in_under_a_minute(tmp_path: Path) -> None:
    study = Path(__file__).parents[2] / "studies" / "s001_quickstart.py"
    started = time.monotonic()
    ran = softseg("run", study, "--debug", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert time.monotonic() - started < 60
    assert (tmp_path / "runs/s001_quickstart-debug/report/index.html").is_file()


def test_check_finds_the_problem_and_draws_the_rest(tmp_path: Path) -> None:
    ran = softseg_here("check", write(tmp_path, STUDY), "--json", cwd=tmp_path)
    found = json.loads(ran.stdout)
    assert found["cases"] == 6
    assert ran.returncode == 0
    assert Path(tmp_path, found["picture"]).read_bytes().startswith(b"\x89PNG")


def test_prepare_builds_the_store_once(tmp_path: Path) -> None:
    study = write(tmp_path, STUDY)
    first = softseg_here("prepare", study, cwd=tmp_path)
    (store,) = (tmp_path / "stores").glob("*.arrow")
    written = store.stat().st_mtime_ns
    again = softseg_here("prepare", study, cwd=tmp_path)
    assert again.stdout.strip() == first.stdout.splitlines()[-1]
    assert store.stat().st_mtime_ns == written


@pytest.mark.timed
def test_help_answers_in_half_a_second() -> None:
    executable = shutil.which("softseg", path=str(Path(sys.executable).parent))
    assert executable is not None
    times = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([executable, "--help"], check=True, capture_output=True)
        times.append(time.monotonic() - started)
    assert min(times) < 0.5


def test_a_report_without_the_prepared_images_says_so(done: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(done, copy)
    put(copy / "run.json", value_of(copy / "run.json") | {"store": str(tmp_path / "gone.arrow")})
    ran = softseg_here("report", copy, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "No pictures: the prepared images" in (copy / "report" / "index.html").read_text()
