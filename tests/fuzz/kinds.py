"""What is read, by kind: a valid input, which of its files are damaged, the reader, and the command that reads it.

A reader returns what it has understood, as plain values and arrays. What it says of a file that it makes again (warnings, notes)
it puts into the list that it is given.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "unit"))
sys.path.append(str(Path(__file__).parents[1] / "engine"))
from damage import bytes_of, json_of
from model_folders import card_of, model_of, saved
from synthetic_run import write_run

from softseg_dist import Bids, Dice, GivenSplits, NnUNet, Optim, Phantom, Preprocess, Recipe, Table, UNet
from softseg_dist.data.case_table import read_table
from softseg_dist.data.challenges import classes_of
from softseg_dist.data.check import check_cases, unread
from softseg_dist.data.discovery import look_at
from softseg_dist.data.source_files import sha256_of
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store, fingerprint, local_store
from softseg_dist.data.volume import read_volumes
from softseg_dist.engine.plan import load_prices
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.status import status_of
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.tables import summarise
from softseg_dist.sealed import sealed_json
from softseg_dist.study_file import load_study
from softseg_dist.tracking.delivery import Spool
from softseg_dist.training.fit import fit
from softseg_dist.training.saved_model import read_card, read_model
from softseg_dist.training.task import FitTask, Interrupted, Worker

Said = list[str]


@dataclass(frozen=True)
class Kind:
    """`own`: files of ours, of which no difference may be accepted; of an input of the user a valid change of values is right.

    `reader` reads the folder; `of` are patterns of the files that are damaged; `share` says how often; `command` are words of
    `softseg` for the same input, in which {} is the folder. `vouch` damages a file as its writer would have written it.
    """

    name: str
    make: Callable[[Path], None]
    reader: Callable[[Path, Said], Any]
    of: Sequence[str]
    share: int
    own: bool = False
    commands: Sequence[str] = ()
    vouch: Callable[[Path, Random], str] | None = None


# Inputs of the user.


def write_nifti(path: Path, seed: int = 0, kind: type = np.int16, mask: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 2, (8, 8, 4)).astype(np.uint8) if mask else draw.integers(0, 900, (8, 8, 4)).astype(kind)
    image = nib.Nifti1Image(values, np.diag((-0.5, 0.5, 3, 1)))
    image.set_qform(image.affine, 1)
    nib.save(image, path)


def of_volumes(folder: Path, said: Said) -> Any:
    found = []
    for path in sorted(folder.iterdir()):
        for _, volume in read_volumes([path], (1.0, 1.0, 1.0)):
            assert np.isfinite(volume.data).all(), "a voxel is not finite"
            assert volume.data.nbytes < 2**26, "more voxels than so small a file holds"
            found.append((volume.data, volume.geometry.affine))
    return found


def write_pictures(folder: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 255, (12, 9), dtype=np.uint8)
    Image.fromarray(gray).save(folder / "a.png", dpi=(300, 300))


def write_tiff(folder: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 255, (12, 9), dtype=np.uint8)
    pages = [Image.fromarray(gray.astype(np.uint16)) for _ in range(2)]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])


def write_bids(folder: Path) -> None:
    for number in range(1, 4):
        name = f"sub-{number:02d}"
        write_nifti(folder / name / "anat" / f"{name}_T2starw.nii.gz", number)
        write_nifti(folder / "derivatives/labels" / name / "anat" / f"{name}_T2starw_label-GM_seg.nii.gz", number, mask=True)
    rows = [f"sub-{number:02d}\t{site}\t{30 + number}" for number, site in enumerate("ABA", start=1)]
    (folder / "participants.tsv").write_text("\n".join(["participant_id\tsite\tage", *rows, ""]))
    bids = 'Bids(".", image="T2starw", labels={"GM": "label-GM_seg"})'
    (folder / "study.py").write_text(STUDY.replace("Phantom(subjects=8)", bids).replace("Phantom", "Bids"))


def of_data(data: Any, said: Said) -> Any:
    cases = data.scan(None)
    problems = [*unread(data, None), *check_cases(cases, Preprocess(dim=2), classes=data.classes)]
    said += [problem.detail for problem in problems]
    right = [case for case in cases if not case.missing() and case.name not in {p.case for p in problems if p.level == "error"}]
    loaded = [(case.name, case.subject, case.site, case.load()) for case in right]
    return [(name, subject, site, one.image, one.raters) for name, subject, site, one in loaded]


def of_bids(folder: Path, said: Said) -> Any:
    found = of_data(Bids(str(folder), image="T2starw", labels={"GM": "label-GM_seg"}), said)
    said += look_at(folder).problems
    return found


def write_table(folder: Path) -> None:
    for number in range(1, 4):
        write_nifti(folder / f"i{number}.nii.gz", number)
        write_nifti(folder / f"m{number}.nii.gz", number, mask=True)
    rows = [f"c{n},p{n},{site},i{n}.nii.gz,m{n}.nii.gz:1" for n, site in enumerate("ABA", start=1)]
    (folder / "cases.csv").write_text("\n".join(["case,subject,site,image,GM", *rows, ""]))


def of_table(folder: Path, said: Said) -> Any:
    return read_table(folder / "cases.csv"), of_data(Table(str(folder / "cases.csv"), labels=("GM",)), said)


def write_nnunet(folder: Path) -> None:
    for number in range(1, 4):
        write_nifti(folder / f"imagesTr/a_{number:03d}_0000.nii.gz", number)
        write_nifti(folder / f"labelsTr/a_{number:03d}.nii.gz", number, mask=True)
    facts = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "GM": 1}, "numTraining": 3, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(facts))


def of_nnunet(folder: Path, said: Said) -> Any:
    found = classes_of(folder), of_data(NnUNet(str(folder), labels=("GM",)), said)
    said += look_at(folder).problems
    return found


GIVEN = [
    {"train": ["p1", "p2"], "validation": ["p3"], "test": ["p4"]},
    {"train": ["p4", "p2"], "validation": ["p1"], "test": ["p3"]},
]


def write_splits(folder: Path) -> None:
    (folder / "splits.json").write_text(json.dumps(GIVEN))
    lines = [f"- train: [p1, p2]\n  validation: [p3]\n  test: [p{number}]" for number in (4, 4)]
    (folder / "splits.yaml").write_text("\n".join(lines) + "\n")


def of_splits(folder: Path, said: Said) -> Any:
    people = {f"p{number}": "" for number in range(1, 5)}
    both = [GivenSplits(path).bound(folder).make(people, 0) for path in ("splits.json", "splits.yaml")]
    return [split.model_dump() for splits in both for split in splits]


STUDY = '''"""Is it read?"""
from softseg_dist import (
    AdaptiveWing, Affine, Dice, MonteCarlo, NormReLU, Optim, Phantom, Preprocess, Recipe, Sigmoid, Study, UNet, factorial)

BASE = Recipe(
    network=UNet(filters=(4, 8)), activation=Sigmoid(), loss=Dice(smooth=1.0), label="hard", fusion="mean",
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),), optim=Optim(lr=1e-3, epochs=6, batch_size=4))


class Mine(Dice):
    """Of the user."""

    power: float = 2.0


STUDY = Study(
    name="s009_mine",
    question="Is it read?",
    data=Phantom(subjects=8),
    preprocess=Preprocess(dim=2, spacing_mm=(0.5, 0.5), crop=(32, 32)),
    splits=MonteCarlo(count=3, fractions=(0.6, 0.2, 0.2)),
    repeats=2,
    objective="brier_skill",
    candidates=factorial(BASE, label=("hard", "soft"), loss=(Dice(), AdaptiveWing(omega=14.0), Mine(power=3.0))),
    control="hard-dice",
)
'''


def write_study(folder: Path) -> None:
    (folder / "s009_mine.py").write_text(STUDY)


def of_study(folder: Path, said: Said) -> Any:
    study = load_study(folder / "s009_mine.py").study
    return study.model_dump_json()


PRICES = Path(__file__).parents[2] / "cluster/prices.yaml"


def write_prices(folder: Path) -> None:
    shutil.copyfile(PRICES, folder / "prices.yaml")


def of_prices(folder: Path, said: Said) -> Any:
    return load_prices(folder / "prices.yaml").model_dump_json()


# Files of ours.


def write_study_run(folder: Path) -> None:
    names = ("hard-sigmoid-dice", "soft-sigmoid-dice")
    write_run(folder, names, num_splits=2, num_subjects=9, num_tested=3, raters=("rater1",))


def write_open_run(folder: Path) -> None:
    names = ("hard-sigmoid-dice", "soft-sigmoid-dice")
    write_run(folder, names, num_splits=2, num_subjects=9, num_tested=3, raters=("rater1",), collected=False)


def of_run(folder: Path, said: Said) -> Any:
    status = status_of(str(folder))
    run = load_run(folder)
    numbers = summarise(run)
    plain = {name: value for name, value in vars(status).items() if name not in ("quiet_s", "run")}
    data = {name: value for name, value in vars(run).items() if name != "folder"}
    return plain, data, numbers, Ledger(folder).candidates()


PHANTOM = Phantom(subjects=5, size=(16, 16), num_slices=1, raters=2)
PREPARED = Preprocess(dim=2)
STORE = f"{fingerprint(PHANTOM.cases(None), PHANTOM, PREPARED)}.arrow"


def write_store(folder: Path) -> None:
    build_store(folder, PHANTOM.cases(None), PHANTOM, PREPARED)
    (folder / ".digests").unlink(missing_ok=True)


def of_store(folder: Path, said: Said) -> Any:
    store = Store.open(local_store(folder / STORE))
    samples = [store.sample(index) for index in range(len(store.cases))]
    return store.fingerprint, store.cases, [(s.name, s.image, s.raters, s.spacing_mm) for s in samples]


def of_store_again(folder: Path, said: Said) -> Any:
    """Prepared again where it is damaged, in this process."""
    build_store(folder, PHANTOM.cases(None), PHANTOM, PREPARED, spread=lambda prepare, parts: (prepare(p) for p in parts))
    return of_store(folder, said)


BASE = Recipe(network=UNet(filters=(2, 4)), loss=Dice(), optim=Optim(lr=1e-2, epochs=3, batch_size=8))


def task_of(folder: Path) -> FitTask:
    path = folder / STORE
    people = sorted({case.subject for case in PHANTOM.cases(None)})
    split = Split(index=0, train=tuple(people[:3]), validation=(people[3],), test=(people[4],))
    return FitTask(
        study="s", seed=0, candidate="c", recipe=BASE, split=split, objective="dice_dml",
        store=str(path), store_fingerprint=path.stem, folder=str(folder / "fit"),
    )  # fmt: skip


def write_stopped(folder: Path) -> None:
    write_store(folder)
    steps = iter(range(1, 100))
    try:
        fit(task_of(folder), Worker(stop=lambda: next(steps) >= 2))
    except Interrupted:
        return
    raise AssertionError("the fit was to stop")


def write_ended(folder: Path) -> None:
    write_store(folder)
    fit(task_of(folder))


def of_fit(folder: Path, said: Said) -> Any:
    result = fit(task_of(folder))
    said += result.notes
    return result.score, result.test_score, result.best_epoch, result.files["best.safetensors"], result.files["history.jsonl"]


def write_model(folder: Path) -> None:
    card = card_of(PREPARED)
    saved(folder / "model", card, model_of(card))
    (folder / "model.safetensors").unlink()
    write_nifti(folder / "image.nii.gz")


def of_model(folder: Path, said: Said) -> Any:
    card = read_card(folder / "model")
    model = read_model(folder / "model", card)
    return card.model_dump(exclude={"weights_sha256"}), {name: value.numpy() for name, value in model.state_dict().items()}


def vouch_model(path: Path, draw: Random) -> str:
    """A stranger's model: the card is sealed, and holds the digest of the weights that lie beside it."""
    card = path.with_name("model.json")
    if path == card:
        content, what = json_of(path.read_bytes(), draw, "")
        path.write_bytes(content)
        return f"sealed again, {what}"
    content, what = bytes_of(path.read_bytes(), draw)
    path.write_bytes(content)
    fields = json.loads(card.read_bytes()) | {"weights_sha256": sha256_of(path)}
    fields.pop("seal")
    card.write_bytes(sealed_json(fields))
    return f"with its digest in the card, {what}"


RECORDS: list[dict[str, Any]] = [
    {
        "what": "log",
        "key": f"fit-{number}",
        "metrics": [{"key": "loss", "value": 0.5 + number, "step": 1, "timestamp": 1}],
        "params": {"lr": f"0.{number}"},
        "tags": {"a": "b"},
    }
    for number in range(5)
]


def write_spool(folder: Path) -> None:
    Spool(folder / "mlflow_spool.jsonl").append(RECORDS)


def of_spool(folder: Path, said: Said) -> Any:
    """What would be sent: of each run its items, for a record that is sent twice does no harm. A damaged line is left out."""
    spool = Spool(folder / "mlflow_spool.jsonl")
    found = {(record["key"], json.dumps(item)) for record in spool.collect() for item in _items(record)}
    expected = {(record["key"], json.dumps(item)) for record in RECORDS for item in _items(record)}
    said += ["mlflow_spool.jsonl: lines are left out"] * (found < expected)
    return sorted(found)


def _items(record: dict[str, Any]) -> list[Any]:
    return [*record["metrics"], record["params"], record["tags"]]


INIT = "init {} --out {}/new.py"
RUN_FILES = ("*.json", "fits/**/*.json", "**/*.parquet", "**/*.jsonl")
KINDS = (
    Kind("NIfTI", lambda at: write_nifti(at / "a.nii"), of_volumes, ("*",), 14),
    Kind("NIfTI, gzip", lambda at: write_nifti(at / "a.nii.gz", kind=np.float32), of_volumes, ("*",), 14),
    Kind("PNG", write_pictures, of_volumes, ("*",), 4),
    Kind("TIFF", write_tiff, of_volumes, ("*",), 4),
    Kind("BIDS", write_bids, of_bids, ("participants.tsv", "**/*.gz"), 8, commands=(INIT, "check {}/study.py")),
    Kind("table", write_table, of_table, ("cases.csv", "cases.csv", "*.gz"), 6, commands=(INIT,)),
    Kind("dataset.json", write_nnunet, of_nnunet, ("dataset.json", "dataset.json", "*/*.gz"), 5, commands=(INIT,)),
    Kind("given splits", write_splits, of_splits, ("*",), 5),
    Kind("study file", write_study, of_study, ("*",), 8, commands=("plan {}/s009_mine.py",)),
    Kind("price list", write_prices, of_prices, ("*",), 1),
    Kind("run folder", write_study_run, of_run, RUN_FILES, 6, True, ("status {} --json", "report {} --json")),
    Kind("run folder, not collected", write_open_run, of_run, RUN_FILES, 4, True, ("status {}", "report {} --csv")),
    Kind("store", write_store, of_store, ("*.arrow",), 8, True),
    Kind("store, prepared again", write_store, of_store_again, ("*.arrow",), 4, True),
    Kind("checkpoint", write_stopped, of_fit, ("fit/*",), 2, True),
    Kind("finished fit", write_ended, of_fit, ("fit/*",), 2, True),
    Kind("model", write_model, of_model, ("model/*",), 6, True, ("predict {}/model {}/image.nii.gz --out {}/out",), vouch_model),
    Kind("MLflow spool", write_spool, of_spool, ("*",), 6, True),
)
