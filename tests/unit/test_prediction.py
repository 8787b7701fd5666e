"""A prediction lies where its image lies, is as soft as the model made it, and a mistake costs one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from model_folders import PASSING, RECIPE, card_of, model_of, passing_model, saved
from scipy.spatial.transform import Rotation
from sealed_files import put, vouch

from softseg_dist import Affine, Bids, Elastic, Flip, Network, Preprocess, Recipe, UNet
from softseg_dist.cli.main import main
from softseg_dist.data.store import Store, build_store
from softseg_dist.data.volume import read_geometry
from softseg_dist.errors import UserError
from softseg_dist.judging.thresholds import FIXED
from softseg_dist.judging.uncertainty import entropy
from softseg_dist.prediction import Prediction, predict_images
from softseg_dist.sealed import sealed_json
from softseg_dist.sources import Sources
from softseg_dist.training.inference import predict_sample
from softseg_dist.training.model import Model, save_weights
from softseg_dist.training.saved_model import CARD
from softseg_dist.training.task import FitResult, weights_path
from softseg_dist.words import next_command

SHAPE = (14, 12, 10)
TURN = Rotation.from_euler("zxy", [15, -6, 8], degrees=True).as_matrix()
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3], OBLIQUE[:3, 3] = TURN @ np.diag([0.8, 0.8, 1.5]), (-31, 12, 4)
ORIENTATIONS = ("RAS", "LPI", "AIL", "SLP", "PSR", "IRA")
RULES = {"fixed": FIXED, "grid": 0.35}


def scan(path: Path, orientation: str = "RAS", seed: int = 0, affine: np.ndarray = OBLIQUE) -> Path:
    """An int16 file with a scale; the same voxels at the same place in space, in whatever order they are stored."""
    voxels = np.random.default_rng(seed).integers(0, 1000, SHAPE, dtype=np.int16)
    canonical = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation))
    stored = canonical.as_reoriented(turn)
    stored.header.set_slope_inter(0.25, -20)
    stored.set_qform(stored.affine, code=1)
    stored.set_sform(stored.affine, code=2 if orientation[0] in "RL" else 0)  # some have both forms, some one
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(stored, path)
    return path


def write(path: Path, data: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def read(path: Path) -> np.ndarray:
    """Voxels in canonical order."""
    voxels: np.ndarray = nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
    return voxels


def predicted(model: Path, images: Sequence[Path], out: Path, **options: object) -> list[Prediction]:
    done = list(predict_images(model, [[image] for image in images], out, **options))  # type: ignore[arg-type]
    assert [one.error for one in done] == [""] * len(images)
    return done


def random_model(folder: Path, preprocess: Preprocess, **fields: object) -> Path:
    card = card_of(preprocess, **fields)
    return saved(folder, card, model_of(card))


PREPROCESSING = [
    Preprocess(dim=2),
    Preprocess(dim=2, crop=(8, 16), center="foreground", normalize="percentile"),
    Preprocess(dim=2, spacing_mm=(1.1, 0.6), crop=(8, 8), center="seg"),
    Preprocess(dim=2, axis="x", spacing_mm=(1.1, 0.9), crop=(8, 8), center="seg"),
    Preprocess(dim=2, axis="y", crop=(16, 8)),
    Preprocess(dim=2, axis="auto"),
    Preprocess(dim=3, crop=(8, 8, 8), center="seg"),
    Preprocess(dim=3, spacing_mm=(1.0, 1.0, 1.0), crop=(16, 8, 20)),
]


@pytest.mark.parametrize("preprocess", PREPROCESSING, ids=str)
def test_the_map_does_not_depend_on_how_the_image_is_stored(tmp_path: Path, preprocess: Preprocess) -> None:
    model = random_model(tmp_path / "model", preprocess)
    images = [scan(tmp_path / f"{o}.nii.gz", o) for o in ORIENTATIONS]
    masks = []
    if preprocess.mask_parts:
        for image in images:
            stored = nib.load(image)
            inside = (stored.get_fdata() > 200).astype(np.uint8)
            masks.append(write(tmp_path / f"mask_{image.name}", inside, stored.affine))
    done = predicted(model, images, tmp_path / "out", center_masks=masks)
    first = nib.as_closest_canonical(nib.load(done[0].maps["GM"]))
    assert np.ptp(first.get_fdata()[first.get_fdata() > 0]) > 0.05, "a map that is flat could not tell"
    for image, one in zip(images, done, strict=True):
        soft = nib.load(one.maps["GM"])
        assert nib.aff2axcodes(soft.affine) == nib.aff2axcodes(nib.load(image).affine)
        canonical = nib.as_closest_canonical(soft)
        assert np.allclose(canonical.affine, first.affine, atol=1e-4)
        assert np.allclose(canonical.get_fdata(), first.get_fdata(), atol=1e-5)
        assert one.covered == done[0].covered


@pytest.mark.parametrize("dim", [2, 3])
def test_the_map_is_the_prediction_for_the_stored_sample(tmp_path: Path, dim: int) -> None:
    image = scan(tmp_path / "set/sub-1/anat/sub-1_T1w.nii.gz", "AIL")
    label = (nib.load(image).get_fdata() > 100).astype(np.uint8)
    write(tmp_path / "set/derivatives/labels/sub-1/anat/sub-1_T1w_seg.nii.gz", label, nib.load(image).affine)
    data, preprocess = Bids("set", image="T1w", labels={"GM": "seg"}), Preprocess(dim=dim)
    sample = Store.open(build_store(tmp_path / "stores", data.cases(tmp_path), data, preprocess)).sample(0)
    card = card_of(preprocess)
    model = model_of(card)
    done = predicted(saved(tmp_path / "model", card, model), [image], tmp_path / "out")
    expected = predict_sample(model, sample)
    expected = np.moveaxis(expected[:, 0], 0, -1) if dim == 2 else expected[0, 0]
    assert np.array_equal(read(done[0].maps["GM"]), expected)


def test_an_image_whose_voxels_no_training_image_had_is_told(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", Preprocess(dim=2, crop=(8, 8)), spacings_mm=((0.5, 0.8), (0.8, 0.8), (1, 1.5)))
    thick = OBLIQUE @ np.diag([1, 1, 2, 1])
    images = [scan(tmp_path / "same.nii.gz"), scan(tmp_path / "thick.nii.gz", "LPI", affine=thick)]
    same, other = predicted(model, images, tmp_path / "out")
    assert same.unlike == ""
    assert other.unlike == "its voxels are 0.8 x 0.8 x 3 mm, the model was trained on 0.5 to 0.8 x 0.8 x 1 to 1.5 mm"
    unknown = random_model(tmp_path / "older", Preprocess(dim=2, crop=(8, 8)))
    assert [one.unlike for one in predicted(unknown, images, tmp_path / "out")] == ["", ""]


def test_an_image_of_another_contrast_by_its_name_or_of_another_size_is_told(tmp_path: Path) -> None:
    names = (("T1w", "UNIT1"), ("b",))
    model = random_model(tmp_path / "model", Preprocess(dim=2), channels=2, channel_names=names, size=(12, 12))
    expected = {("T1w", "b"): "", ("scan", "other"): "", ("T2w", "b"): "T2w, b", ("b", "T1w"): "b, T1w"}
    pairs = [[scan(tmp_path / f"{n}_{end}.nii.gz") for n, end in enumerate(ends)] for ends in expected]
    told = [one.unlike for one in predict_images(model, pairs, tmp_path / "out")]
    trained = "the model was trained on T1w/UNIT1, b"
    assert told == [f"it is {found} by its name, {trained}" if found else "" for found in expected.values()]
    small = random_model(tmp_path / "small", Preprocess(dim=2), size=(9, 8))
    (done,) = predicted(small, [pairs[0][0]], tmp_path / "again")
    assert done.unlike == "it has 14 x 12 voxels at the model's resolution, images of training had at most 9 x 8"


@pytest.mark.parametrize(("dim", "axis"), [(2, "x"), (2, "y"), (2, "z"), (3, "z")])
def test_a_model_that_hands_the_image_on_gives_back_its_soft_map(tmp_path: Path, dim: int, axis: str) -> None:
    soft = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    soft[6, 5, 4] = 1.0  # NormReLU divides by the highest value, which shall be 1
    soft[6, 5, 5] = 0.5  # on the threshold is inside
    image = write(tmp_path / "image.nii.gz", soft)
    card = card_of(Preprocess(dim=dim, axis=axis, normalize="none", crop=(8,) * dim), PASSING, thresholds=RULES)
    model = saved(tmp_path / "model", card, passing_model(card))
    (done,) = predicted(model, [image], tmp_path / "out", binary="grid")
    window = [slice(3, 11), slice(2, 10), slice(1, 9)]
    if dim == 2:
        window["xyz".index(axis)] = slice(None)
    expected = np.zeros(SHAPE, dtype=np.float32)
    expected[tuple(window)] = soft[tuple(window)]
    assert np.array_equal(read(done.maps["GM"]), expected)
    assert nib.load(done.maps["GM"]).get_data_dtype() == np.float32
    assert done.covered == pytest.approx(np.prod([8 / n for n, part in zip(SHAPE, window, strict=True) if part != slice(None)]))
    mask = nib.load(done.masks["GM"])
    assert mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.get_fdata() == 1, expected >= np.float32(0.35))
    (done,) = predicted(model, [image], tmp_path / "out", binary="0.5")
    assert np.array_equal(read(done.masks["GM"]) == 1, expected >= 0.5)


def test_channels_are_taken_in_order_and_classes_written_by_name(tmp_path: Path) -> None:
    preprocess, recipe = Preprocess(dim=3), RECIPE.replace(network=UNet(filters=(2, 3)))
    card = card_of(preprocess, recipe, channels=2, classes=("gray matter", "lesion"))
    model = saved(tmp_path / "run/model", card, model_of(card, recipe))
    one, two = scan(tmp_path / "T1w.nii.gz", seed=1), scan(tmp_path / "T2w.nii.gz", seed=2)
    (done,) = predict_images(tmp_path / "run", [[one, two]], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "T1w_label-gray-matter_softseg.nii.gz",
        "T1w_label-lesion_softseg.nii.gz",
    }
    (swapped,) = predict_images(model, [[two, one]], tmp_path / "swapped")
    assert not np.allclose(read(done.maps["lesion"]), read(swapped.maps["lesion"]), atol=1e-3)
    assert not np.allclose(read(done.maps["lesion"]), read(done.maps["gray matter"]), atol=1e-3)


def test_volumes_of_a_4d_file_are_channels_in_any_order(tmp_path: Path) -> None:
    preprocess, recipe = Preprocess(dim=3), RECIPE.replace(network=UNet(filters=(2, 3)))
    card = card_of(preprocess, recipe, channels=2)
    model = saved(tmp_path / "model", card, model_of(card, recipe))
    one, two = scan(tmp_path / "T1w.nii.gz", seed=1), scan(tmp_path / "T2w.nii.gz", seed=2)
    both = np.stack([nib.load(path).get_fdata(dtype=np.float32) for path in (one, two)], axis=-1)
    whole = write(tmp_path / "both.nii.gz", both)
    (expected,) = predict_images(model, [[two, one]], tmp_path / "out")
    (done,) = predict_images(model, [[Path(f"{whole}[1]"), Path(f"{whole}[0]")]], tmp_path / "out")
    assert done.maps["GM"] == tmp_path / "out/both_label-GM_softseg.nii.gz"
    assert np.array_equal(read(done.maps["GM"]), read(expected.maps["GM"]))
    assert np.array_equal(nib.load(done.maps["GM"]).affine, nib.load(whole).affine)
    assert "join them as A.nii,B.nii or A.nii[0],A.nii[1]" in refused(model, [[whole]], tmp_path / "none")
    assert "there is no volume [2]" in refused(model, [[Path(f"{whole}[1]"), Path(f"{whole}[2]")]], tmp_path / "none")


@pytest.mark.parametrize("part", ["dseg:2", "dseg:2+3"])
def test_values_of_an_integer_map_centre_the_crop_as_in_training(tmp_path: Path, part: str) -> None:
    preprocess = Preprocess(dim=2, crop=(4, 4), center=part)
    model = random_model(tmp_path / "model", preprocess)
    values = np.ones(SHAPE, dtype=np.uint8)
    values[9:11, 3:5] = 2
    values[9, 3] = 2 + part.count("3")
    (done,) = predicted(model, [scan(tmp_path / "image.nii")], tmp_path, center_masks=[write(tmp_path / "map.nii", values)])
    assert np.argwhere(read(done.maps["GM"]).any(axis=2)).min(axis=0).tolist() == [8, 2]


CENTERED = Preprocess(dim=2, crop=(8, 8), center="seg-manual")
WHOLE = Preprocess(dim=2)


def refused(model: Path, images: Sequence[Sequence[Path]], out: Path, **options: object) -> str:
    """The refusal, in one line; nothing has been written."""
    with pytest.raises(UserError) as caught:
        predict_images(model, images, out, **options)  # type: ignore[arg-type]
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_headers_tell_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, out, good = random_model(tmp_path / "model", WHOLE), tmp_path / "out", scan(tmp_path / "good.nii.gz")
    movie = write(tmp_path / "movie.nii.gz", np.zeros((8, 8, 8, 3), dtype=np.float32))
    assert "takes 1 channel per image" in refused(model, [[good], [good, good]], out)
    assert "3 dimensions, got 8 x 8 x 8 x 3" in refused(model, [[good], [movie]], out)
    assert f"there is no file {tmp_path / 'gone.nii.gz'}" in refused(model, [[good], [tmp_path / "gone.nii.gz"]], out)
    assert "must be a .nii or .nii.gz file" in refused(model, [[tmp_path]], out)
    same = scan(tmp_path / "elsewhere/good.nii.gz")
    assert "the map of another image" in refused(model, [[good], [same]], out)
    assert "takes no --center-mask" in refused(model, [[good]], out, center_masks=[good])
    for wrong in ("best", "0", "1.1", "-0.1", "nan"):
        message = refused(model, [[good]], out, binary=wrong)
        assert f"fixed (0.5), grid (0.35); got '{wrong}'" in message
    two = random_model(tmp_path / "two", WHOLE, channels=2)
    message = refused(two, [[good, scan(tmp_path / "moved.nii.gz", affine=OBLIQUE + np.eye(4)[:, [3, 3, 3, 0]])]], out)
    assert "moved.nii.gz is on another grid than" in message
    assert f"{tmp_path / 'elsewhere'} holds no model" in refused(tmp_path / "elsewhere", [[good]], out)


def test_a_picture_gets_maps_as_nifti_files_on_its_grid_if_its_size_is_known(tmp_path: Path) -> None:
    model, out = random_model(tmp_path / "model", Preprocess(dim=2)), tmp_path / "out"
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16), dtype=np.uint8))
    picture.save(tmp_path / "bare.png")
    picture.save(tmp_path / "a.png", dpi=(254, 254))
    message = refused(model, [[tmp_path / "a.png"], [tmp_path / "bare.png"]], out)
    assert "bare.png does not say the size of a voxel in mm" in message
    message = refused(model, [[tmp_path / "bare.png"]], out, spacing_mm=("0.1",))
    assert "spacing_mm takes two or three numbers above 0, got 0.1" in message
    (done,) = predicted(model, [tmp_path / "a.png"], out, binary="0.5")
    assert done.maps["GM"] == out / "a_label-GM_softseg.nii.gz"
    found, grid = nib.load(done.maps["GM"]), read_geometry(tmp_path / "a.png")
    assert found.shape == (16, 12, 1)
    assert np.allclose(found.affine, grid.affine)
    assert np.ptp(found.get_fdata()) > 0.01
    (again,) = predicted(model, [tmp_path / "bare.png"], out, spacing_mm=(0.1, 0.1))
    told = nib.load(again.maps["GM"])
    assert np.allclose(told.affine, grid.affine)
    assert np.array_equal(told.get_fdata(), found.get_fdata())


def test_a_crop_that_is_centred_on_a_mask_needs_one_per_image(tmp_path: Path) -> None:
    model, out = random_model(tmp_path / "model", CENTERED), tmp_path / "out"
    one, two = scan(tmp_path / "1.nii.gz"), scan(tmp_path / "2.nii.gz")
    mask = write(tmp_path / "seg.nii.gz", np.ones(SHAPE, dtype=np.uint8))
    message = refused(model, [[one], [two]], out)
    assert "centred on the mask 'seg-manual'" in message
    assert "--center-mask FILE once per image" in message
    assert "got 1 for 2 images" in refused(model, [[one], [two]], out, center_masks=[mask])
    other = write(tmp_path / "other.nii.gz", np.ones(SHAPE, dtype=np.uint8), OBLIQUE + np.eye(4)[:, [3, 3, 3, 0]])
    assert "is on another grid" in refused(model, [[one]], out, center_masks=[other])


def test_the_mask_that_centres_a_crop_may_be_stored_in_another_axis_order(tmp_path: Path) -> None:
    model, mask = random_model(tmp_path / "model", CENTERED), np.zeros(SHAPE, dtype=np.uint8)
    mask[9:11, 3:5] = 1
    stored = nib.Nifti1Image(mask, OBLIQUE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(OBLIQUE), nib.orientations.axcodes2ornt("PIR"))
    turned = stored.as_reoriented(turn)
    masks = [write(tmp_path / "RAS.nii", mask), write(tmp_path / "PIR.nii", np.asarray(turned.dataobj), turned.affine)]
    image = scan(tmp_path / "a.nii.gz")
    one, other = (predicted(model, [image], tmp_path / each.stem, center_masks=[each])[0] for each in masks)
    assert one.maps["GM"] != other.maps["GM"]
    assert np.array_equal(read(one.maps["GM"]), read(other.maps["GM"]))


def test_a_map_is_never_written_over_an_input(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", CENTERED)
    image = scan(tmp_path / "a.nii.gz")
    mask = write(tmp_path / "a_label-GM_softseg.nii.gz", np.ones(SHAPE, dtype=np.uint8))
    for same in (mask, Path(f"{mask}[0]")):
        with pytest.raises(UserError, match=r"would be written over .*a_label-GM_softseg"):
            predict_images(model, [[image]], tmp_path, center_masks=[same])


def test_what_only_the_voxels_tell_costs_that_image_alone(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", CENTERED)
    voxels = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    images = [write(tmp_path / f"{name}.nii.gz", voxels) for name in ("good", "nan", "torn", "empty", "flat", "last")]
    voxels[3, 3, 3] = np.nan
    write(images[1], voxels)
    images[2].write_bytes(images[2].read_bytes()[:-2000])
    write(images[4], np.ones(SHAPE, dtype=np.float32))
    full, none = (write(tmp_path / f"m{value}.nii.gz", np.full(SHAPE, value, dtype=np.uint8)) for value in (1, 0))
    out = tmp_path / "out"
    done = list(predict_images(model, [[i] for i in images], out, center_masks=[full, full, full, none, full, full]))
    messages = ("", "got 1 NaN or infinite", "is cut off", "'seg-manual', which is empty", "image is constant", "")
    for image, one, message in zip(images, done, messages, strict=True):
        assert one.image == image
        assert message in one.error
        assert (str(image) in one.error) is bool(message)
        assert "\n" not in one.error
        assert bool(one.maps) is not bool(message)
    assert sorted(path.name[:4] for path in out.iterdir()) == ["good", "last"]


def test_an_image_that_is_too_small_for_the_network_is_named(tmp_path: Path) -> None:
    recipe = RECIPE.replace(network=UNet(filters=(2, 2, 2, 2, 2)))
    card = card_of(WHOLE, recipe)
    model = saved(tmp_path / "model", card, model_of(card, recipe))
    (done,) = predict_images(model, [[scan(tmp_path / "small.nii.gz")]], tmp_path / "out")
    assert re.search("small.nii.gz: a U-Net of 5 levels needs images of at least 16 voxels .* got 14 x 12", done.error)


def test_a_network_of_a_study_file_is_run_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from torch import nn\nfrom softseg_dist import Network\n\n\nclass Pointwise(Network):\n"
    text += "    def build(self, i, o, dim):\n        return nn.Conv2d(i, o, 1)\n"
    recipe = {"network": {"type": "s000_pointwise:Pointwise"}, "activation": {"type": "Sigmoid"}}
    card = card_of(WHOLE).replace(recipe=recipe, study_source=Sources("s000_pointwise.py", {"s000_pointwise.py": text}))
    weights = torch.nn.Module()
    weights.network = torch.nn.Conv2d(1, 1, 1)
    model = saved(tmp_path / "model", card, weights)
    images, out = [[scan(tmp_path / "a.nii")]], tmp_path / "out"
    assert "give --trust" in refused(model, images, out)
    assert not [cls for cls in Network.__subclasses__() if cls.__name__ == "Pointwise"], "nothing of it has been run"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    card.study_source.record_as_run()  # as `softseg run` does
    assert next(iter(predict_images(model, images, out))).maps
    (done,) = predict_images(model, images, out, trust=True)
    assert done.error == ""
    card_alone = json.loads((model / CARD).read_text()) | {"study_source": None}
    (model / CARD).write_bytes(sealed_json(card_alone))
    with pytest.raises(UserError, match="which it does not carry"):
        predict_images(model, images, out, trust=True)


def run_with_fits(folder: Path, preprocess: Preprocess, seeds: Sequence[int]) -> tuple[Path, list[Model]]:
    """A run folder with a model and finished fits of its candidate, which have other weights than it; and those fits' models."""
    card = card_of(preprocess)
    saved(folder / "model", card, model_of(card))
    fits = [model_of(card, seed=seed) for seed in seeds]
    for split, fit in enumerate(fits):
        weights = weights_path(folder / "fits" / card.candidate / f"{split:03d}")
        weights.parent.mkdir(parents=True)
        save_weights(fit, weights)
        state = "finished" if split else "failed"  # the first one is no member
        result = FitResult(candidate=card.candidate, split=split, state=state)
        put(weights.parent.parent / f"{split:03d}.json", result.model_dump(mode="json"))
        vouch(weights.parent)
    return folder, fits[1:]


def test_an_ensemble_is_the_mean_of_its_fits_and_its_entropy_that_of_the_mean(tmp_path: Path) -> None:
    preprocess = Preprocess(dim=2, crop=(8, 8))
    run, fits = run_with_fits(tmp_path / "run", preprocess, seeds=(1, 2, 3))
    image = scan(tmp_path / "a.nii.gz", "LPI")
    (plain,) = predicted(run, [image], tmp_path / "plain")
    assert not plain.entropies
    (done,) = predicted(run, [image], tmp_path / "out", ensemble=True, uncertainty=True)
    members = []
    for index, fit in enumerate(fits):
        alone = saved(tmp_path / f"alone-{index}/model", card_of(preprocess), fit)
        members.append(read(predicted(alone, [image], tmp_path / f"alone-{index}")[0].maps["GM"]))
    mean = read(done.maps["GM"])
    assert np.allclose(mean, np.mean(members, axis=0), atol=1e-6)
    assert not np.allclose(mean, read(plain.maps["GM"]), atol=1e-3)
    unsure = nib.load(done.entropies["GM"])
    assert done.entropies["GM"].name == "a_label-GM_entropy.nii.gz"
    assert (unsure.shape, unsure.get_data_dtype()) == (nib.load(image).shape, np.float32)
    assert np.allclose(unsure.affine, nib.load(image).affine, atol=1e-4)
    assert np.allclose(read(done.entropies["GM"]), entropy(mean), atol=1e-4)
    (silent,) = predicted(run, [image], tmp_path / "silent", ensemble=True)
    assert not silent.entropies
    assert np.array_equal(read(silent.maps["GM"]), mean)


def test_an_ensemble_without_its_fits_is_refused(tmp_path: Path) -> None:
    run, _ = run_with_fits(tmp_path / "run", WHOLE, seeds=(1, 2, 3))
    out, images = tmp_path / "out", [[scan(tmp_path / "a.nii")]]
    weights_path(run / "fits/soft/002").unlink()
    assert "002/best.safetensors is not as it was written (missing" in refused(run, images, out, ensemble=True)
    (run / "fits/soft/002.json").unlink()
    assert "two or more finished fits, but" in refused(run, images, out, ensemble=True)
    message = refused(run, images, out, candidate="hard")
    assert message == f"{run} holds no model of hard; train it: {next_command('refit', run, candidate='hard')}"
    assert refused(run / "model", images, out, candidate="hard").endswith(message.partition("; ")[2]), "the run, not its model"
    assert [done.error for done in predict_images(run, images, out, candidate="soft")] == [""]


@pytest.mark.parametrize(
    "recipe",
    [RECIPE.replace(network=UNet(filters=(2, 4), dropout=0.3)), RECIPE.replace(augment=(Elastic(), Flip(), Affine(degrees=15)))],
    ids=["dropout", "augmentation"],
)
def test_one_model_tells_what_it_is_unsure_of_and_predicts_the_same(tmp_path: Path, recipe: Recipe) -> None:
    card = card_of(Preprocess(dim=3, crop=(8, 8, 8), spacing_mm=(1, 1, 1)), recipe)
    model, image = saved(tmp_path / "model", card, model_of(card, recipe)), scan(tmp_path / "a.nii.gz", "AIL")
    (plain,) = predicted(model, [image], tmp_path / "plain")
    first, again = (predicted(model, [image], tmp_path / n, uncertainty=True, samples=4)[0] for n in ("1", "2"))
    assert np.array_equal(read(first.maps["GM"]), read(plain.maps["GM"]))
    unsure = read(first.entropies["GM"])
    assert np.array_equal(unsure, read(again.entropies["GM"])), "the same image, the same draws"
    assert 0 < unsure.max() <= 1
    assert ((unsure > 0) == (read(plain.maps["GM"]) > 0)).mean() > 0.99, "0 outside the crop, like the map"
    assert not np.allclose(unsure, entropy(read(plain.maps["GM"])), atol=1e-3)


def test_a_model_that_has_one_answer_only_says_so(tmp_path: Path) -> None:
    model, out, images = random_model(tmp_path / "model", WHOLE), tmp_path / "out", [[scan(tmp_path / "a.nii")]]
    assert "use all fits of its run folder with --ensemble" in refused(model, images, out, uncertainty=True)
    assert "--samples is of --uncertainty of one model" in refused(model, images, out, samples=3)


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["softseg", "predict", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_the_command_prints_a_line_per_map_and_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = random_model(tmp_path / "run/model", Preprocess(dim=2, crop=(8, 8)))
    good = scan(tmp_path / "good.nii.gz")
    bad = write(tmp_path / "bad.nii.gz", np.full(SHAPE, np.nan, dtype=np.float32))
    out = tmp_path / "out"
    assert command(monkeypatch, tmp_path / "run", good, "--out", out, "--binary", "0.4", "--device", "cpu") == 0
    printed = capfd.readouterr()
    assert [Path(line) for line in printed.out.splitlines()] == [
        out / "good_label-GM_softseg.nii.gz",
        out / "good_label-GM_mask.nii.gz",
    ]
    assert f"warning: {good}: the model's crop covers 38.1% of it; the maps are 0 outside" in printed.err
    assert command(monkeypatch, model, bad, good, "--out", out, "--json") == 2
    printed = capfd.readouterr()
    failed, done = json.loads(printed.out)
    assert "NaN" in failed["error"]
    assert done["maps"] == {"GM": str(out / "good_label-GM_softseg.nii.gz")}
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["error", "warning"]
    assert command(monkeypatch, model, f"{good},{good}", "--out", out) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("error: this model takes 1 channel")


@pytest.mark.data
def test_a_real_image_gets_its_map_on_its_own_grid(real_data: Path, tmp_path: Path) -> None:
    preprocess = Preprocess(dim=2, spacing_mm=(0.5, 0.5), crop=(96, 96), center="seg-manual")
    model = random_model(tmp_path / "model", preprocess)
    root = real_data / "gm_challenge"
    images = sorted(root.glob("sub-9*/anat/*_T2starw.nii.gz"))[:3]
    masks = [next(root.glob(f"derivatives/labels/*/anat/{i.name[:-7]}_seg-manual.nii.gz")) for i in images]
    for image, mask, one in zip(images, masks, predicted(model, images, tmp_path, center_masks=masks), strict=True):
        before, soft = nib.load(image), nib.load(one.maps["GM"])
        assert soft.shape == before.shape
        assert np.array_equal(soft.affine, before.affine)
        values = soft.get_fdata()
        assert 0 <= values.min() < 0.01
        assert 0.5 < values.max() <= 1
        assert (values[nib.load(mask).get_fdata() > 0] > 0).all(), "the crop holds the cord, and a sigmoid is above 0"
        assert np.mean(values > 0) == pytest.approx(one.covered, rel=0.05)
