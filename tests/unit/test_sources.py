"""Which code a class reaches: any change of it is seen, with file and line, and nothing else counts."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sealed_files import put, value_of
from synthetic_run import write_run

from softseg_dist import NUMERICS
from softseg_dist.engine.progress import PlainLines
from softseg_dist.errors import UserError
from softseg_dist.frozen import code_of, digest
from softseg_dist.pipeline import RunOptions, refit_run, report_run
from softseg_dist.record.ledger import Ledger
from softseg_dist.sources import Sources, code_changes
from softseg_dist.study_file import StudyFile, load_study

STUDY = """
import functools
from typing import ClassVar
import torch
import scaling
from lab import losses
from lab.losses import Base as Parent, scale
from softseg_dist import *

try:
    import no_such_package as fast
except ImportError:
    import math as fast

WEIGHT = 1.0
TABLE = {}
TABLE["power"] = 2
UNUSED = 1

def decorated(function):
    @functools.wraps(function)
    def inner(*arguments):
        return fast.sqrt(2) * function(*arguments)
    return inner

@decorated
def squared(x, power=TABLE["power"]):
    return x**power

half = functools.partial(scaling.times, 0.5)

class Mine(Parent):
    '''A loss.'''
    factor: float = scaling.FACTOR
    WEIGHT: ClassVar[float] = WEIGHT

    def per_sample(self, prediction, target):
        error = [squared(row) for row in prediction - target]  # one by one
        return scale(half(torch.stack(error)).flatten(1).mean(1)) + losses.deep.nested()

class Other(Loss):
    def per_sample(self, prediction, target):
        return (prediction - target).abs().flatten(1).mean(1)

def propose(trial):
    return Recipe(loss=Other(), optim=Optim(lr=trial.suggest_float("lr", 1e-4, scaling.HIGHEST)))

STUDY = Study(name="mine", question="?", data=Phantom(subjects=6), splits=MonteCarlo(count=2),
              candidates={"mine": Recipe(loss=Mine()), "other": Recipe(loss=Other())}, search=Search(propose, trials=3))
"""
FILES = {
    "s009_mine.py": STUDY,
    "scaling.py": "FACTOR = 3.0\nHIGHEST = 0.1\n\n\ndef times(factor, x):\n    return factor * x\n",
    "lab/__init__.py": "",
    "lab/losses.py": "from softseg_dist import Loss\nfrom . import deep\nfrom .settings import *\n\n\n"
    "class Base(Loss):\n    shift: float = 0.0\n\n\ndef scale(x):\n    return EXPONENT * x\n",
    "lab/deep.py": "def nested():\n    from scaling import FACTOR\n    return FACTOR\n",
    "lab/settings.py": "EXPONENT = 2\n",
    "unused.py": "raise RuntimeError\n",
}


def write(folder: Path, **edits: str) -> Path:
    """The study's files; `edits` maps "old text" to "new text", each in the one file that has it."""
    for file, text in FILES.items():
        for old, new in edits.items():
            text = text.replace(old, new)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder / "s009_mine.py"


def load(folder: Path, edits: dict[str, str] | None = None) -> StudyFile:
    return load_study(write(folder, **(edits or {})))


def codes(file: StudyFile) -> dict[str, str | None]:
    study = file.study
    assert study.search is not None
    things = {name: type(recipe.loss) for name, recipe in study.candidates.items()} | {"propose": study.search.propose}
    return {name: code_of(thing) for name, thing in things.items()}


def test_a_study_travels_with_the_helper_modules_that_it_imports_and_no_others(tmp_path: Path) -> None:
    sources = load(tmp_path).sources
    assert sorted(sources.texts) == sorted(FILES.keys() - {"unused.py"})
    assert pickle.loads(pickle.dumps(sources)) == sources


# An edit, the line that is shown for it, and whose code it changes.
EDITS = {
    "constant": ("WEIGHT = 1.0", "WEIGHT = 5.0", "s009_mine.py, line 15, WEIGHT: WEIGHT = 1.0 -> WEIGHT = 5.0", "mine"),
    "import that is tried": ("import no_such", "import other", "import no_such_package as fast -> import other", "mine"),
    "decorator": ("return inner", "return function", "decorated: return inner -> return function", "mine"),
    "default argument": ("power=TABLE", "power=2 * TABLE", "squared: def squared(x, power=TABLE['power']):", "mine"),
    "entry of a constant": ('["power"] = 2', '["power"] = 3', "TABLE['power'] = 2 -> TABLE['power'] = 3", "mine"),
    "partial": ("times, 0.5", "times, 0.7", "line 30, half: half = functools.partial(scaling.times, 0.5) ->", "mine"),
    "function of a helper": ("factor * x", "factor + x", "scaling.py, line 6, times: return factor * x ->", "mine"),
    "constant of a helper": ("FACTOR = 3.0", "FACTOR = 4.0", "scaling.py, line 1, FACTOR: FACTOR = 3.0 ->", "mine"),
    "base class": ("shift: float = 0.0", "shift: float = 1.0", "lab/losses.py, line 7, Base: shift: float = 0.0", "mine"),
    "class attribute": ("factor: float", "factor: int", "Mine: factor: float = scaling.FACTOR -> factor: int", "mine"),
    "starred constant": ("EXPONENT = 2", "EXPONENT = 3", "lab/settings.py, line 1, EXPONENT: EXPONENT = 2 ->", "mine"),
    "nested package": ("return FACTOR", "return -FACTOR", "lab/deep.py, line 3, nested: return FACTOR ->", "mine"),
    "import of a helper": ("import deep", "import settings as deep", "lab/losses.py, line 2, deep: from . import deep", "mine"),
    "propose": ("1e-4", "1e-5", "line 46, propose: return Recipe(loss=Other(), optim=Optim(lr=trial", "propose"),
    "bound of propose": ("HIGHEST = 0.1", "HIGHEST = 0.2", "scaling.py, line 2, HIGHEST: HIGHEST = 0.1 ->", "propose"),
    "loss of propose": ("(prediction - target).abs()", "(prediction - target)", "Other: return (pred", "other propose"),
    "at import": ("UNUSED = 1", "torch.manual_seed(3)", "at import: none -> torch.manual_seed(3)", "mine other propose"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_the_code_of_what_reaches_it_and_is_shown(tmp_path: Path, edit: str) -> None:
    old, new, line, changed = EDITS[edit]
    before, after = load(tmp_path), load(tmp_path, {old: new})
    assert before.sources != after.sources, "the edit is one"
    was, now = codes(before), codes(after)
    assert {name for name in was if was[name] != now[name]} == set(changed.split())
    name = {"mine": "Mine", "other": "Other", "propose": "propose"}[changed.split()[0]]
    shown = code_changes(before.sources, after.sources, "s009_mine", name)
    assert [text for text in shown if line in text], shown
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # one by one", ""),
        ("    '''A loss.'''\n", "    '''A better\n    description.'''\n"),
        ("return x**power", "return (\n        x  # to the\n        ** power\n    )"),
        ("UNUSED = 1", "UNUSED = 2"),
        ("UNUSED = 1", "class Third(Loss):\n    pass"),
        ("UNUSED = 1", "if __name__ == '__main__':\n    torch.manual_seed(3)"),
        ("from softseg_dist import *", "from softseg_dist import " + "Loss, MonteCarlo, Optim, Phantom, Recipe, Search, Study"),
        ('question="?"', 'question="Why?"'),
    ],
)  # fmt: skip
def test_what_does_nothing_to_a_class_does_not_count(tmp_path: Path, old: str, new: str) -> None:
    before, after = load(tmp_path), load(tmp_path, {old: new})
    assert before.sources != after.sources, "the edit is one"
    assert codes(before) == codes(after)


def test_a_class_defined_anew_after_its_module_was_loaded_keeps_the_code_that_it_is_made_of(tmp_path: Path) -> None:
    before = load(tmp_path)
    known = codes(before)
    load(tmp_path, {"FACTOR = 3.0": "FACTOR = 4.0"})
    assert codes(before) == known


def test_a_helper_with_the_name_of_an_installed_module_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, **{"import functools": "import functools, scipy"})
    (tmp_path / "scipy.py").write_text("raise RuntimeError('my notes')")
    with pytest.raises(UserError, match=r"s009_mine.py imports 'scipy', which is scipy.py beside the study and an installed"):
        load_study(path)
    (tmp_path / "scipy.py").rename(tmp_path / "numpy.py")
    assert "numpy.py" not in load_study(path).sources.texts, "a file that is not imported is nobody's helper"


def test_a_mistake_in_a_helper_is_shown_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"settings.py, line 1: NameError: name 'nothing'"):
        load(tmp_path, {"EXPONENT = 2": "EXPONENT = nothing"})
    assert load(tmp_path).study.name == "mine", "the mistake is mended, and nothing of it is left"


IN_A_WORKER = """
import inspect, json, pickle, sys
from softseg_dist import Study
from softseg_dist.study_file import load_sources
load_sources(pickle.loads(bytes.fromhex(sys.argv[1])))
study = Study.model_validate(json.loads(sys.argv[2]))
loss = study.candidates["mine"].loss
print(inspect.getsource(type(loss).__mro__[1]).splitlines()[0], study.fingerprint, "scaling" in sys.modules)
"""


@pytest.mark.engine
def test_another_process_needs_the_texts_alone(tmp_path: Path) -> None:
    file = load(tmp_path / "here")
    arguments = [pickle.dumps(file.sources).hex(), file.study.model_dump_json()]
    command = [sys.executable, "-c", IN_A_WORKER, *arguments]
    (tmp_path / "scaling.py").write_text("raise RuntimeError('another one of this name')")
    told = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"class Base(Loss): {file.study.fingerprint} True"


NAMELESS = {
    "two losses of one factory": (
        "def make(w):\n    class Weighted(Brier):\n        weight: float = w\n    return Weighted()\n",
        "make(100.0)",
        r"candidates.a.loss is make.<locals>.Weighted, which is made in a function and has no name after a restart; move it out",
    ),
    "lambda": (
        "class Through(Brier):\n    f: Callable\n",
        "Through(f=lambda x: x.abs())",
        r"candidates.a.loss.f is a lambda, which has no name after a restart; use a function made with def",
    ),
    "partial as a field": (
        "class Through(Brier):\n    f: Callable\n",
        "Through(f=partial(pow, 2))",
        r"candidates.a.loss.f is functools.partial\(.*\), which JSON cannot name; use a function made with def",
    ),
    "two classes of one name": (
        "class Same(Brier):\n    pass\nFIRST = Same()\nclass Same(Brier):\n    power: int = 2\n",
        "FIRST",
        r"candidates.a.loss is Same, but this name means something else in its file now; give each its own name",
    ),
    "a field that is lost in JSON": (
        "class Hidden(Brier):\n    weight: float = Field(1.0, exclude=True)\n    def model_post_init(self, context):\n"
        "        object.__setattr__(self, 'weight', self.weight + 1)\n",
        "Hidden(weight=3.0)",
        r"it comes back from its own JSON as another one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMELESS)
def test_what_has_no_name_after_a_restart_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    definitions, loss, message = NAMELESS[kind]
    (tmp_path / "s.py").write_text(
        "from functools import partial\nfrom typing import Callable\nfrom pydantic import Field\nfrom softseg_dist import *\n"
        f"{definitions}STUDY = Study(name='s', question='?', data=Phantom(subjects=6), splits=MonteCarlo(count=1),\n"
        f"    candidates={{'a': Recipe(loss={loss})}})\n"
    )
    with pytest.raises(UserError, match=message) as refused:
        load_study(tmp_path / "s.py")
    assert str(refused.value).startswith(f"{tmp_path / 's.py'}: ")


def test_a_function_made_with_def_may_be_a_field(tmp_path: Path) -> None:
    text = "from typing import Callable\nfrom softseg_dist import *\ndef absolute(x):\n    return x.abs()\n"
    text += "class Through(Brier):\n    f: Callable\n"
    text += "STUDY = Study(name='s', question='?', data=Phantom(subjects=6), splits=MonteCarlo(count=1),\n"
    text += "    candidates={'a': Recipe(loss=Through(f=absolute))})\n"
    (tmp_path / "s.py").write_text(text)
    study = load_study(tmp_path / "s.py").study
    assert type(study).model_validate_json(study.model_dump_json()) == study
    (tmp_path / "s.py").write_text(text.replace("x.abs()", "x**2"))
    assert load_study(tmp_path / "s.py").study.fingerprint != study.fingerprint


def opened(folder: Path, file: StudyFile) -> Ledger:
    ledger = Ledger(folder)
    ledger.open_study(file.study, file.study.make_splits({f"sub-{i}": "s" for i in range(6)}), sources=file.sources)
    return ledger


def test_a_changed_helper_is_refused_with_old_and_new_line_and_every_text_is_kept(tmp_path: Path) -> None:
    file = load(tmp_path)
    ledger = opened(tmp_path / "run", file)
    kept = {path: path.read_text() for path in (tmp_path / "run/sources").iterdir()}
    assert sorted(kept.values()) == sorted(file.sources.texts.values())
    line = r"scaling.py, line 6, times: return factor \* x -> return factor \+ x \(used by 1 \(candidates.mine.loss\)\)"
    with pytest.raises(UserError, match=line + r"\. Finished fits are untouched: give the study a new name"):
        opened(tmp_path / "run", load(tmp_path, {"factor * x": "factor + x"}))
    assert ledger.sources() == file.sources
    opened(tmp_path / "run", edited := load(tmp_path, {"  # one by one": ""}))
    assert ledger.sources() == edited.sources
    assert {path: path.read_text() for path in kept} == kept, "nothing is overwritten"
    assert len(value_of(tmp_path / "run/code.json")["sources"]) == 2


def test_a_text_of_a_run_that_was_changed_is_refused(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "run", load(tmp_path))
    next((tmp_path / "run/sources").iterdir()).write_text("STUDY = None")
    with pytest.raises(UserError, match=r"sources/.*\.py: .* as it was run is missing or changed; restore it"):
        ledger.sources()


@pytest.mark.engine
def test_a_report_runs_no_code_of_the_run(tmp_path: Path) -> None:
    run, text = write_run(tmp_path / "run"), "raise RuntimeError('the report runs the code of a study')"
    (run / "sources").mkdir()
    (run / f"sources/{digest(text)}.py").write_text(text)
    put(run / "code.json", value_of(run / "code.json") | {"sources": [{"study": "s.py", "files": {"s.py": digest(text)}}]})
    assert report_run(run).is_file()
    with pytest.raises(UserError, match=r"executes its code \(s\.py\), which you have not run on this machine; .* give --trust"):
        refit_run(run, None, RunOptions(), PlainLines(sys.stderr))
    with pytest.raises(UserError, match=r"s\.py, line 1: RuntimeError: the report runs"):
        refit_run(run, None, RunOptions(), PlainLines(sys.stderr), trust=True)


def test_code_is_trusted_that_this_user_has_run_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    ran, other = Sources("s.py", {"s.py": "STUDY = 1", "h.py": ""}), Sources("s.py", {"s.py": "STUDY = 1 ", "h.py": ""})
    for _ in range(2):
        ran.record_as_run()
    ran.check_trusted("run", "training")
    (kept,) = (tmp_path / "config/softseg").iterdir()
    assert kept.read_text().split() == [ran.digest]
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    with pytest.raises(UserError, match=r"^run: training executes its code \(s.py, h.py\), which you have not run"):
        other.check_trusted("run", "training")
    Sources("", {}).check_trusted("run", "training")  # a study of the package alone


def test_where_nothing_can_be_kept_all_code_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    ran = Sources("s.py", {"s.py": "STUDY = 1"})
    ran.record_as_run()
    with pytest.raises(UserError, match="give --trust"):
        ran.check_trusted("run", "training")


@pytest.mark.parametrize("numerics", [0, 99])
def test_a_run_of_other_numerics_is_refused_in_one_line_that_says_so(tmp_path: Path, numerics: int) -> None:
    """Whatever else differs, such as a store that was prepared otherwise."""
    file = load(tmp_path)
    opened(tmp_path / "run", file)
    put(tmp_path / "run/code.json", value_of(tmp_path / "run/code.json") | {"numerics": numerics})
    put(tmp_path / "run/store.json", {"fingerprint": "of a store of the old format"})
    other = f"another version of softseg_dist (numerics {numerics}, this version has {NUMERICS})"
    with pytest.raises(UserError, match=re.escape(f"run was made by {other}")) as refused:
        opened(tmp_path / "run", file)
    assert "\n" not in str(refused.value)
    assert "->" not in str(refused.value)


IN_A_SCRIPT = """
import json, sys
sys.path.insert(0, {folder!r})
{setup}
from softseg_dist import Brier, MonteCarlo, Phantom, Recipe, Study
from softseg_dist.errors import UserError
from softseg_dist.study_file import StudyFile
{definitions}
study = Study(name="s", question="?", data=Phantom(subjects=6), splits=MonteCarlo(count=1), candidates={{"a": Recipe(loss={loss})}})
if __name__ == "__main__":
    try:
        file = StudyFile.of(study)
        print(json.dumps([file.sources.study, sorted(file.sources.texts), file.study.fingerprint, {check}]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
IN_A_FILE = "from scaling import FACTOR\nfrom softseg_dist import Brier\n\n\nclass Mine(Brier):\n    factor: float = FACTOR\n"


def told_by_a_script(
    folder: Path, setup: str = "", definitions: str = "", loss: str = "Brier()", check: str = "0", *, notebook: bool
) -> Any:
    text = IN_A_SCRIPT.format(folder=str(folder), setup=setup, definitions=definitions, loss=loss, check=check)
    write(folder)
    (folder / "mine.py").write_text(IN_A_FILE)
    (folder / "script.py").write_text(text)
    command = [sys.executable, *(["-c", text] if notebook else [str(folder / "script.py")])]  # neither -c nor a cell has a file
    return json.loads(subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout)


@pytest.mark.engine
def test_a_study_built_in_python_brings_the_modules_of_what_it_reaches(tmp_path: Path) -> None:
    assert told_by_a_script(tmp_path, notebook=True)[:2] == ["", []], "the package alone needs no texts"
    imported = told_by_a_script(tmp_path, setup="from mine import Mine", loss="Mine(factor=2)", notebook=True)
    assert imported[:2] == ["", ["mine.py", "scaling.py"]]
    own = "class Mine(Brier):\n    factor: float = 1.0\n"
    assert told_by_a_script(tmp_path, definitions=own, loss="Mine()", notebook=False)[:2] == ["script.py", ["script.py"]]
    message = "study s: candidates.a.loss: Mine has no source file; put it in a file, and import it from there"
    assert told_by_a_script(tmp_path, definitions=own, loss="Mine()", notebook=True) == message


@pytest.mark.engine
def test_a_study_built_in_python_is_run_by_the_text_of_its_modules_as_it_is_now(tmp_path: Path) -> None:
    edit = f"import mine, pathlib\npathlib.Path(mine.__file__).write_text({IN_A_FILE.replace('= FACTOR', '= -FACTOR')!r})"
    edited = told_by_a_script(tmp_path, setup=edit, definitions="loss = mine.Mine()", loss="loss", notebook=True)
    fresh = told_by_a_script(tmp_path, setup="import mine", loss="mine.Mine()", notebook=True)
    assert edited[1] == fresh[1]
    assert edited[2] != fresh[2]


@pytest.mark.engine
def test_what_a_notebook_has_imported_stays_what_it_is_there(tmp_path: Path) -> None:
    check = "type(study.candidates['a'].loss) is importlib.import_module('mine').Mine"
    told = told_by_a_script(tmp_path, "import importlib, mine", loss="mine.Mine()", check=check, notebook=True)
    assert told[3] is True
