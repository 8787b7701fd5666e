"""What a study says about machines holds until a flag of the command line says something else."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from softseg_dist import MonteCarlo, Phantom, Recipe, Resources, Study
from softseg_dist.cli.main import app
from softseg_dist.errors import UserError
from softseg_dist.pipeline import RunOptions, resources_of


def study(**resources: object) -> Study:
    return Study(
        name="s", question="?", data=Phantom(subjects=6), splits=MonteCarlo(count=2), candidates={"a": Recipe()},
        resources=Resources(**resources),
    )  # fmt: skip


def test_flags_stand_above_the_study() -> None:
    options = RunOptions(fits_per_gpu=4, max_concurrent=2)
    assert resources_of(study(fits_per_gpu=8, cpus_per_fit=3), options) == Resources(
        fits_per_gpu=4, max_concurrent=2, cpus_per_fit=3
    )
    assert resources_of(study(fits_per_gpu=2), RunOptions()) == Resources(fits_per_gpu=2)


def test_a_flag_that_says_how_fits_share_a_gpu_takes_the_place_of_what_the_study_says_of_it() -> None:
    assert resources_of(study(gpus_per_fit=0.25), RunOptions(fits_per_gpu=2)) == Resources(fits_per_gpu=2)
    assert resources_of(study(fits_per_gpu=4), RunOptions(gpus_per_fit=0.0)) == Resources(gpus_per_fit=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(fits_per_gpu=4, gpus_per_fit=0.25), "--fits-per-gpu 4 .*--gpus-per-fit 0.25"),
        (RunOptions(fits_per_gpu=3, workers_per_fit=2), "--fits-per-gpu 3 .*--workers-per-fit 2"),
    ],
)
def test_flags_that_exclude_each_other_are_refused_with_both_names(options: RunOptions, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        resources_of(study(), options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["0", "-1", "auto", "1.5"])
def test_fits_per_gpu_is_a_count(text: str) -> None:
    said = CliRunner().invoke(app, ["run", "study.py", "--fits-per-gpu", text])
    assert said.exit_code == 2
    assert "--fits-per-gpu" in said.output
