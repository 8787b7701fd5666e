"""Study files are loaded from their path; what they define works by name; what is wrong with them is one line."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from softseg_dist import Recipe
from softseg_dist.cli.submit import with_given_splits
from softseg_dist.errors import UserError
from softseg_dist.sources import Sources
from softseg_dist.study_file import check_restart, load_sources, load_study

OF_A_PACKAGE = """
from softseg_dist import Brier
class Own(Brier):
    power: float = 1.0
"""
MINE = '''
import torch
from softseg_dist import Loss, Phantom, MonteCarlo, Recipe, Search, Study

class Cubic(Loss):
    """Mean of |p - y|^3."""
    power: float = 3.0

    def per_sample(self, prediction, target):
        return (prediction - target).abs().pow(self.power).flatten(1).mean(1)

def propose(trial):
    return Recipe(loss=Cubic(power=trial.suggest_float("power", 1, 4)))

STUDY = Study(name="mine", question="?", data=Phantom(subjects=6), splits=MonteCarlo(count=2),
              candidates={"cubic": Recipe(loss=Cubic(power=2))}, search=Search(propose, trials=3))
'''


def write(folder: Path, text: str) -> Path:
    path = folder / "s009_mine.py"
    path.write_text(text)
    return path


def test_a_loss_defined_in_a_study_file_goes_through_json(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, MINE)).study
    again = type(study).model_validate_json(study.model_dump_json())
    assert again == study
    loss = again.candidates["cubic"].loss
    assert loss(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)).item() == 0.5**2


def test_a_study_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load_study(write(tmp_path, f"\ufeff{MINE}")).study.name == "mine"


def test_a_metric_defined_in_a_study_file_may_be_the_objective(tmp_path: Path) -> None:
    text = MINE.replace("import Loss,", "import Loss, Metric,").replace("search=Search", "objective=Bias(), search=Search")
    bias = """class Bias(Metric):
    short = "bias"
    higher_is_better = False

    def __call__(self, prediction, reference, scale):
        return abs(prediction - reference).mean(axis=(0, 2, 3))
"""
    study = load_study(write(tmp_path, text.replace("def propose", f"{bias}\n\ndef propose"))).study
    assert type(study).model_validate_json(study.model_dump_json()) == study
    assert (study.objectives[0].row.name, study.objectives[0].row.sign) == ("bias", -1)
    twice = study.model_dump(mode="json") | {"second_objective": study.model_dump(mode="json")["objective"]}
    with pytest.raises(ValidationError, match="second_objective must differ from the objective, got 'bias' for both"):
        type(study).model_validate(twice)


def test_another_process_needs_only_the_text(tmp_path: Path) -> None:
    file = load_study(write(tmp_path, MINE))
    text = file.study.candidates["cubic"].model_dump_json()
    load_sources(pickle.loads(pickle.dumps(file.sources)))
    assert type(Recipe.model_validate_json(text).loss).__name__ == "Cubic"


def test_editing_a_loss_or_propose_changes_the_fingerprint(tmp_path: Path) -> None:
    before = load_study(write(tmp_path, MINE)).study.fingerprint
    edited_loss = load_study(write(tmp_path, MINE.replace(".mean(1)", ".sum(1)"))).study.fingerprint
    edited_propose = load_study(write(tmp_path, MINE.replace("1, 4", "1, 5"))).study.fingerprint
    assert len({before, edited_loss, edited_propose}) == 3
    assert load_study(write(tmp_path, MINE)).study.fingerprint == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("STUDY = (", r"s009_mine\.py, line 1: SyntaxError"),
        ("import softseg_dist\nsoftseg_dist.NoSuchLoss()", r"line 2: AttributeError.*NoSuchLoss"),
        ("import no_such_package", "line 1: ModuleNotFoundError"),
        ("x = 1", r"sets STUDY = Study\(\.\.\.\); found NoneType"),
        ("from softseg_dist import Optim\n\nOptim(lr=-1)", r"line 3: Optim\.lr: Input should be greater than 0, got -1"),
    ],
)
def test_a_study_file_with_an_error_is_one_line_with_file_line_and_cause(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_study(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_a_missing_study_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such study file"):
        load_study(tmp_path / "nothing.py")


LOADS_ITSELF = """
import linecache
from concurrent.futures import ThreadPoolExecutor
from softseg_dist.sources import Sources
from softseg_dist.study_file import check_restart, load_sources
text = "".join(linecache.getlines("s009_again.py"))
OTHER = ThreadPoolExecutor(1).submit(lambda: load_sources(Sources("s009_again.py", {"s009_again.py": text})).LAST)
LAST = 1
"""


def test_a_thread_that_needs_a_study_file_waits_until_another_has_loaded_it() -> None:
    assert load_sources(Sources("s009_again.py", {"s009_again.py": LOADS_ITSELF})).OTHER.result(timeout=60) == 1


def test_a_study_as_sent_runs_its_code_anew_as_a_worker_does(tmp_path: Path) -> None:
    """So an object that the study file changes while it is loaded and used does not hide what only a worker meets."""
    path = tmp_path / "s999_sent.py"
    path.write_text(SENT)
    loaded = load_study(path)
    loss = loaded.study.candidates["a"].loss
    type(loss).calls.append(1)  # type: ignore[attr-defined]
    sent = loaded.as_sent()
    again = sent.study.candidates["a"].loss
    assert (sent.sources, sent.study.fingerprint) == (loaded.sources, loaded.study.fingerprint)
    assert type(again) is not type(loss)
    assert type(again).calls == []  # type: ignore[attr-defined]
    assert sent.study.search is not None
    assert isinstance(sent.study.search.propose(None).loss, type(again))
    check_restart(sent.study.search.propose(None), "its proposal")
    assert inspect.getsourcefile(type(again)) == str(path)  # for breakpoints


SENT = """
from typing import ClassVar
from softseg_dist import Brier, MonteCarlo, Phantom, Recipe, Search, Study

class Counting(Brier):
    calls: ClassVar[list] = []

def propose(trial):
    return Recipe(loss=Counting())

STUDY = Study(name="sent", question="?", data=Phantom(subjects=6), splits=MonteCarlo(count=2),
              candidates={"a": Recipe(loss=Counting())}, search=Search(propose, trials=1))
"""


MISTAKES = {
    "class L(Brier):\n    weight = 2.0": "weight = 2.0: a field has a type, such as weight: float = 2.0",
    "class L(Brier):\n    short: str = 'l'": "L: short is no field; write it without a type",
    "FocalTversky(0.3)": "arguments are given by name, such as FocalTversky(alpha=0.3)",
    "FocalTversky(alfa=0.3)": "FocalTversky.alfa: there is no such field, got 0.3",
}


@pytest.mark.filterwarnings("ignore:Field name")
@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_in_a_class_is_named_with_what_to_write(code: str, tmp_path: Path) -> None:
    path = tmp_path / "mistaken.py"
    path.write_text(f"from softseg_dist import *\n{code}\n")
    with pytest.raises(UserError, match=re.escape(MISTAKES[code])):
        load_study(path)


def test_given_splits_are_read_beside_the_study_file_and_are_part_of_the_study(tmp_path: Path) -> None:
    text = MINE.replace("MonteCarlo(count=2)", 'GivenSplits("splits.json")').replace("MonteCarlo,", "GivenSplits,")
    names = [f"p{i}" for i in range(6)]
    (tmp_path / "splits.json").write_text(json.dumps([{"train": names[1:], "val": names[:1]}]))
    before = load_study(write(tmp_path, text))
    (tmp_path / "splits.json").write_text(json.dumps([{"train": names[:-1], "val": names[-1:]}]))
    after = load_study(write(tmp_path, text))
    assert before.study.fingerprint != after.study.fingerprint
    assert [s.test for s in before.study.make_splits(dict.fromkeys(names, ""))] == [("p0",)]
    assert with_given_splits(after).texts["splits.json"] == (tmp_path / "splits.json").read_text()
    (tmp_path / "splits.json").unlink()  # a worker, or a debugger of it, has the texts alone
    assert before.as_sent().study.fingerprint == before.study.fingerprint
    assert len(before.study.debug().make_splits(dict.fromkeys(names[1:], ""))) == 2
    with pytest.raises(UserError, match=r"cannot read the splits .*splits\.json"):
        load_study(write(tmp_path, text))


def test_a_class_of_an_installed_package_is_found_by_a_process_that_has_not_imported_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "lab_losses.py").write_text(OF_A_PACKAGE)
    monkeypatch.syspath_prepend(str(folder))
    text = Recipe(loss=importlib.import_module("lab_losses").Own(power=2)).model_dump_json()
    del sys.modules["lab_losses"]
    again = Recipe.model_validate_json(text)
    assert (type(again.loss).__module__, again.loss.power) == ("lab_losses", 2)  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="'lab_losses:Other' is unknown"):
        Recipe.model_validate_json(text.replace(":Own", ":Other"))
    with pytest.raises(ValidationError, match="'no_such_package:Own' is unknown"):
        Recipe.model_validate_json(text.replace("lab_losses", "no_such_package"))


@pytest.mark.parametrize("code", ["0", "1", "'no data'"])
def test_a_study_file_that_ends_the_program_is_refused(tmp_path: Path, code: str) -> None:
    with pytest.raises(UserError, match=r"s009_mine\.py, line 2: SystemExit"):
        load_study(write(tmp_path, f"import sys\nsys.exit({code})\n"))
