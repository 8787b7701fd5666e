"""What the fuzzer of tests/fuzz has found, each once: damage is refused in one line, or what it hit is made again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from model_folders import card_of, model_of, saved
from sealed_files import put, value_of
from synthetic_run import write_run

from softseg_dist import NnUNet, Preprocess, Table
from softseg_dist.data.case_table import read_table
from softseg_dist.data.cases import named_values
from softseg_dist.data.challenges import classes_of
from softseg_dist.data.participants import read_participants
from softseg_dist.data.source_files import sha256_of
from softseg_dist.data.splits import read_splits
from softseg_dist.engine.plan import load_prices
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.record.status import status_of
from softseg_dist.study_file import load_study
from softseg_dist.tracking.delivery import Spool
from softseg_dist.training.saved_model import read_card, read_model

DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("splits.json", DEEP, read_splits),
        ("splits.yaml", DEEP[2400:-2400], read_splits),
        ("prices.yaml", DEEP[2400:-2400], load_prices),
        ("dataset.json", DEEP, lambda path: classes_of(path.parent)),
        ("model.json", DEEP, lambda path: read_card(path.parent)),
        ("s009_mine.py", "x = " + DEEP, load_study),
        ("s009_mine.py", "x = " + "-" * 3000 + "1", load_study),
        ("dataset.json", '{"labels": {"background": 0}}', lambda path: classes_of(path.parent)),
        ("dataset.json", '{"labels": {"GM": ""}}', lambda path: NnUNet(str(path.parent), labels=("GM",)).scan(None)),
        ("cases.csv", "case,image,GM\na,i.nii,m.nii\na,i.nii,m.nii\n", lambda path: Table(str(path), labels=("GM",)).scan(None)),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(tmp_path: Path, name: str, text: str, read: Callable[[Path], object]) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name) as refused:
        read(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_message_stays_short_whatever_a_file_has(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"GM": 1}, "file_ending": "x" * 200_000}))
    with pytest.raises(UserError, match=r"file_ending must be .* in .*dataset.json") as refused:
        NnUNet(str(tmp_path), labels=("GM",)).scan(None)
    assert len(str(refused.value)) < 500


def test_a_cell_too_long_for_a_path_is_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(f"case,image,GM\na,{'x' * 5000},m.nii\n")
    (case,) = Table(str(tmp_path / "cases.csv"), labels=("GM",)).scan(None)
    assert any("there is no file" in sentence for sentence in case.missing())
    assert read_table(tmp_path / "cases.csv")[0] == ["case", "image", "GM"]


def test_a_cell_too_long_for_csv_costs_no_site(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text(f"participant_id\tsite\tnote\nsub-01\tA\t{'x' * 200_000}\n")
    assert read_participants(path, "site", ["sub-01"], expected=True)[0] == {"sub-01": "A"}


@pytest.mark.parametrize("value", ["16777217", "9" * 400, "9" * 5000])
def test_a_value_that_float32_does_not_have_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="at most 7 digits"):
        named_values(f"dseg:{value}")


@pytest.mark.parametrize("number", range(3))
def test_a_folder_or_a_circle_in_place_of_a_file_is_refused(tmp_path: Path, number: int) -> None:
    path = tmp_path / "run.json"
    [path.mkdir, lambda: path.symlink_to(path), lambda: path.symlink_to(tmp_path)][number]()
    with pytest.raises(UserError, match=r"run\.json must be a file"):
        Place.at(path).read()


def test_a_models_weights_that_are_none_are_refused_even_with_their_digest(tmp_path: Path) -> None:
    card = card_of(Preprocess(dim=2))
    folder = saved(tmp_path / "m", card, model_of(card))
    (folder / "model.safetensors").write_bytes(b"none")
    card = read_card(folder).replace(weights_sha256=sha256_of(folder / "model.safetensors"))
    with pytest.raises(UserError, match=r"model\.safetensors cannot be used"):
        read_model(folder, card)


def test_a_models_recipe_that_makes_no_network_is_refused(tmp_path: Path) -> None:
    card = card_of(Preprocess(dim=2))
    folder = saved(tmp_path / "m", card, model_of(card))
    recipe = {**card.recipe, "network": {**card.recipe["network"], "filters": [2**63, 4]}}
    with pytest.raises(UserError, match=r"model\.json cannot be used: recipe"):
        read_model(folder, read_card(folder).replace(recipe=recipe))


def test_a_number_that_changed_in_the_spool_is_not_sent(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "mlflow_spool.jsonl")
    spool.append([{"what": "open", "key": str(number)} for number in range(3)])
    spool.path.write_bytes(spool.path.read_bytes().replace(b'"key": "1"', b'"key": "7"'))
    assert [record["key"] for record in Spool(spool.path).collect()] == ["0", "2"]


def test_status_names_a_damaged_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run", ("hard-sigmoid-dice",), num_splits=2, num_subjects=9, num_tested=3)
    record = run / "fits/hard-sigmoid-dice/000.json"
    put(record, value_of(record) | {"score": 0.5})
    assert status_of(str(run)).finished == 2
    record.write_bytes(record.read_bytes().replace(b'"score": 0.5', b'"score": 0.6'))
    with caplog.at_level(logging.WARNING):
        assert status_of(str(run)).finished == 1
    assert "000.json" in caplog.text
