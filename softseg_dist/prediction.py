"""From a saved model and new images to soft maps on the grids of the images.

`load_model` gives a `Predictor` for images in memory, `predict_images` is for files. Neither imports Ray, MLflow or Optuna.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from softseg_dist.data.cases import NOT_IN_A_NAME, ImageCase, MaskFile, VolumeCase, named_values
from softseg_dist.data.check import SPACING_OUTLIER
from softseg_dist.data.geometry import Affine4
from softseg_dist.data.preprocess import Placement, Sample
from softseg_dist.data.source_files import Spacing, part_of
from softseg_dist.data.volume import Volume, image_of, is_image, stem_of, volume_of, write_volume
from softseg_dist.errors import UserError
from softseg_dist.places import make_folder
from softseg_dist.study_file import load_sources
from softseg_dist.training.inference import MapSource, method_of, weights_of_fits
from softseg_dist.training.model import Model
from softseg_dist.training.saved_model import CARD, ModelCard, read_card, read_model
from softseg_dist.words import count, dimensions, listed, next_command

CONTRASTS = frozenset({"T1w", "T2w", "T2starw", "PDw", "FLAIR", "UNIT1", "dwi", "bold", "ct", "MTR", "T1map", "T2map"})  # of BIDS


@dataclass(frozen=True)
class Predictor:
    """A model that predicts images in memory; made by `load_model`. `card` says what it is and where it comes from."""

    card: ModelCard
    source: MapSource

    @property
    def classes(self) -> tuple[str, ...]:
        """The K classes, in the order of the maps."""
        return self.card.classes

    def predict(self, image: Any, affine: Affine4 | None = None, *, center_mask: Any = None) -> Any:
        """The soft map of every class, float32 in [0, 1], on the image's own grid; 0 outside the model's crop.

        Args:
            image: a nibabel image, or a sequence of them, one for each channel; or an array [X Y Z] or [C X Y Z].
            affine: [4 4], voxel index of the array -> mm; for arrays only.
            center_mask: nibabel image or array [X Y Z] that centres the crop, if the model was trained so.

        Returns a nibabel image [X Y Z], with several classes [X Y Z K]; the values that `softseg predict` writes, with the
        image's own orientation codes and units. Of an array: an array [K X Y Z].
        Raises UserError if the image, its channels or the mask do not fit the model, and warns if the crop is smaller than it.
        """
        preprocess = self.card.preprocess
        channels = _channels(image, affine)
        _check_channels(self.card, len(channels))
        if preprocess.mask_parts and center_mask is None:
            raise UserError(f"this model's crop is centred on the mask {preprocess.center!r}: give it as center_mask")
        center = volume_of(center_mask, affine, "center_mask") if preprocess.mask_parts else None
        sample = preprocess.apply(VolumeCase("the image", channels, center))
        maps = preprocess.restore(self.source(sample)[0], sample.placement)
        if (covered := _covered(sample.placement)) < 1:
            warnings.warn(f"the model's crop covers {covered:.1%} of the image; the map is 0 outside", stacklevel=2)
        geometry = channels[0].geometry
        if isinstance(image, np.ndarray):
            return np.ascontiguousarray(geometry.from_canonical(maps))
        return image_of(maps, geometry, image if is_image(image) else image[0])


def _channels(image: Any, affine: Affine4 | None) -> list[Volume]:
    if isinstance(image, np.ndarray):
        if affine is None:
            raise UserError("an array needs an affine, which takes its voxel index to mm: predict(array, affine)")
        found = list(image) if image.ndim == 4 else [image]
    else:
        found = [image] if is_image(image) else list(image)
        if not found or not all(map(is_image, found)):
            raise UserError(f"predict takes nibabel images or a numpy array with its affine, got {type(image).__name__}")
    return [volume_of(channel, affine, f"channel {number} of the image") for number, channel in enumerate(found)]


def load_model(path: str | Path, candidate: str | None = None, *, device: str = "auto", trust: bool = False) -> Predictor:
    """The model in a model folder, or in a run folder that has one.

    Args:
        path: the folder.
        candidate: candidate of a run folder whose model is used; None: the winner.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        trust: execute the study file that the model carries, if its network is defined there and you have not run it yourself.

    Raises UserError if there is no such model, or it cannot be used.
    """
    folder = _folder(Path(path), candidate)
    card = read_card(folder)
    return Predictor(card, MapSource(_load(folder, card, trust).on(_device(device)), card.study))


@dataclass(frozen=True)
class Prediction:
    """The result for one image: files of the soft map, mask and entropy of each class; or the error.

    `covered` is the share of the field of view that lies within the model's crop; the map is 0 outside. `unlike` says in what the
    image is unlike those that the model was trained on; "" if in nothing that its card knows.
    """

    image: Path
    maps: Mapping[str, Path] = field(default_factory=dict)
    masks: Mapping[str, Path] = field(default_factory=dict)
    entropies: Mapping[str, Path] = field(default_factory=dict)
    covered: float = 1.0
    unlike: str = ""
    error: str = ""


def predict_images(
    model: Path,
    images: Sequence[Sequence[Path]],
    out: Path,
    *,
    center_masks: Sequence[Path] = (),
    spacing_mm: Sequence[float | str] = (),
    binary: str | None = None,
    candidate: str | None = None,
    ensemble: bool = False,
    uncertainty: bool = False,
    samples: int | None = None,
    device: str = "auto",
    trust: bool = False,
) -> Iterator[Prediction]:
    """Predict image after image; the files of each replace existing ones and are complete when it is yielded.

    The soft map of a class is float32 in [0, 1], never rounded, on the grid of the image's first channel:
    `<stem>_label-<class>_softseg.nii.gz`. Voxels outside the model's crop are 0.

    Args:
        model: a model folder, or a run folder that has one.
        images: one sequence of files per image, its channels in the order of training; "a.nii.gz[0]" is a volume of a 4-D file.
        out: folder of the maps.
        spacing_mm: of PNG and TIFF files along columns, rows and pages; () takes what they say.
        center_masks: one per image if the model's crop is centred on a mask, else none.
        binary: a rule of the card's thresholds, or a number: masks {map >= threshold} are written too, as uint8
            `<stem>_label-<class>_mask.nii.gz`.
        ensemble: the map is the mean over all finished fits of the model's candidate, from the run folder around it.
        uncertainty: the map's entropy in bits is written too, as float32 `<stem>_label-<class>_entropy.nii.gz`: of an ensemble
            that of its mean, else that of the mean of several maps by one model (see `method_of`).
        samples: number of maps; None: the default of the method.
        candidate, device, trust: see `load_model`.

    Raises UserError, before anything is written, if the model cannot be used, an argument or a header does not fit it, or
    two maps would have one name. What only the voxels show (NaN, a cut file, an empty centre mask) is the `error` of its image.
    """
    folder = _folder(model, candidate)
    card = read_card(folder)
    threshold = None if binary is None else _threshold(card, binary)
    try:
        sizes = TypeAdapter(Spacing).validate_python(tuple(spacing_mm))
    except ValidationError as error:
        raise UserError(f"spacing_mm takes two or three numbers above 0, got {listed([*map(str, spacing_mm)])}") from error
    cases = _cases(card, images, center_masks, sizes)
    outputs = [_outputs(case, card, out, threshold, uncertainty) for case in cases]
    _check_names(outputs, [*itertools.chain(*images), *center_masks])
    for case in cases:
        case.check_headers()
    source = _source(_load(folder, card, trust).on(_device(device)), folder, card, ensemble, uncertainty, samples)
    make_folder(out)
    return (_predict(source, card, case, output, threshold) for case, output in zip(cases, outputs, strict=True))


def _folder(model: Path, candidate: str | None) -> Path:
    """The model folder `model`, or the one in the run folder `model`."""
    if candidate is None:
        return model if (model / CARD).exists() or not (model / "model").is_dir() else model / "model"
    for folder in (model / f"model-{candidate}", model / "model"):
        if (folder / CARD).exists() and read_card(folder).candidate == candidate:
            return folder
    run = model.parent if (model / CARD).exists() else model
    raise UserError(f"{model} holds no model of {candidate}; train it: {next_command('refit', run, candidate=candidate)}")


def how_to_predict(model: Path) -> str:
    """The command that predicts with a model folder, with a file for each channel; a second line says what its mask is."""
    card = read_card(model)
    image = ",".join(f"IMAGE{n}.nii.gz" for n in range(1, card.channels + 1)) if card.channels > 1 else "IMAGE.nii.gz"
    part = next(iter(card.preprocess.mask_parts), None)
    used = next_command("predict", model, image, out="maps", center_mask=part and "MASK.nii.gz", trust=card.needs_study_file)
    return used if part is None else f"{used}\n         MASK is {part!r} of the image: the crop is centred on it, as in training"


def _source(model: Model, folder: Path, card: ModelCard, ensemble: bool, uncertainty: bool, samples: int | None) -> MapSource:
    if samples is not None and (ensemble or not uncertainty):
        raise UserError("--samples is of --uncertainty of one model: leave it out, or give --uncertainty and no --ensemble")
    if ensemble:
        return MapSource(model, card.study, members=weights_of_fits(folder, card), with_entropy=uncertainty)
    return MapSource(model, card.study, method=method_of(card, model, samples) if uncertainty else None)


def _load(folder: Path, card: ModelCard, trust: bool) -> Model:
    if card.needs_study_file:
        if card.study_source is None:
            raise UserError(f"{folder}: its network is defined in the study file of {card.study}, which it does not carry")
        if not trust:
            card.study_source.check_trusted(folder, "predicting")
        load_sources(card.study_source)
    return read_model(folder, card)


def _cases(card: ModelCard, images: Sequence[Sequence[Path]], center_masks: Sequence[Path], spacing_mm: Spacing) -> list[ImageCase]:
    for paths in images:
        _check_channels(card, len(paths), f": {', '.join(map(str, paths))}; join them as A.nii,B.nii or A.nii[0],A.nii[1]")
    masks: list[MaskFile | None] = [None] * len(images)
    if parts := card.preprocess.mask_parts:
        if len(center_masks) != len(images):
            got = f"got {len(center_masks)} for {count(len(images), 'image')}, the first of which is {images[0][0]}"
            raise UserError(f"this model's crop is centred on the mask {parts[0]!r}: give --center-mask FILE once per image; {got}")
        _, values = named_values(parts[0])  # "part:1+2" are values of an integer map, as in training
        masks = [MaskFile(path, values) for path in center_masks]
    elif center_masks:
        raise UserError(f"this model's crop is not centred on a mask, so it takes no --center-mask, got {center_masks[0]}")
    return [ImageCase(stem_of(of[0]), of, center_mask=mask, spacing_mm=spacing_mm) for of, mask in zip(images, masks, strict=True)]


def _check_channels(card: ModelCard, found: int, detail: str = "") -> None:
    if found != card.channels:
        takes = f"this model takes {count(card.channels, 'channel')} per image, in the order of training"
        raise UserError(f"{takes}, got {found}{detail}")


def _threshold(card: ModelCard, binary: str) -> float:
    if binary in card.thresholds:
        return card.thresholds[binary]
    try:
        threshold = float(binary)
    except ValueError:
        threshold = math.nan
    if not 0 < threshold <= 1:
        rules = ", ".join(f"{rule} ({value:.3g})" for rule, value in card.thresholds.items())
        raise UserError(f"--binary takes a number above 0 and up to 1, or a rule of this model: {rules}; got {binary!r}")
    return threshold


def _outputs(case: ImageCase, card: ModelCard, out: Path, threshold: float | None, uncertainty: bool) -> Prediction:
    stems = {name: f"{case.name}_label-{NOT_IN_A_NAME.sub('-', name)}" for name in card.classes}
    kinds = {"softseg": True, "mask": threshold is not None, "entropy": uncertainty}
    maps, masks, entropies = (
        {name: out / f"{stem}_{kind}.nii.gz" for name, stem in stems.items() if wanted} for kind, wanted in kinds.items()
    )
    return Prediction(case.images[0], maps, masks, entropies)


def _check_names(outputs: Sequence[Prediction], inputs: Sequence[Path]) -> None:
    """Raises UserError if a map would replace an input, or the map of another image that has the same file name."""
    taken = {part_of(path)[0].resolve() for path in inputs}
    for output in outputs:
        for path in (*output.maps.values(), *output.masks.values(), *output.entropies.values()):
            if path.resolve() in taken:
                do = "give another --out, and predict images of one name one by one"
                raise UserError(f"{output.image}: its map would be written over {path}, an input or the map of another image; {do}")
            taken.add(path.resolve())


def _predict(source: MapSource, card: ModelCard, case: ImageCase, output: Prediction, threshold: float | None) -> Prediction:
    preprocess = card.preprocess
    try:
        sample = preprocess.apply(case)
        soft_maps, unsure = source(sample)

        def write(paths: Mapping[str, Path], maps: np.ndarray) -> None:
            for path, volume in zip(paths.values(), maps, strict=True):
                write_volume(path, volume, sample.placement.geometry, like=case.images[0])

        maps = preprocess.restore(soft_maps, sample.placement)
        write(output.maps, maps)
        if threshold is not None:
            write(output.masks, (maps >= threshold).astype(np.uint8))
        if unsure is not None:
            write(output.entropies, preprocess.restore(unsure, sample.placement))
    except (UserError, torch.OutOfMemoryError) as error:
        text = str(error) if isinstance(error, UserError) else "the memory of the GPU is too small for it; use --device cpu"
        return Prediction(output.image, error=text if str(output.image) in text else f"{output.image}: {text}")
    return replace(output, covered=_covered(sample.placement), unlike="; ".join(_unlike(card, case, sample)))


def _unlike(card: ModelCard, case: ImageCase, sample: Sample) -> Iterator[str]:
    """In what an image is unlike those of training: its contrasts by their names, and by a factor voxels or the field of view."""
    ends = [re.split("[_-]", stem_of(path))[-1] for path in case.images]
    known = CONTRASTS.union(*card.channel_names)
    if any(end in known and end not in names for end, names in zip(ends, card.channel_names, strict=False)):
        yield f"it is {', '.join(ends)} by its name, the model was trained on {', '.join(map('/'.join, card.channel_names))}"
    spacing_mm = sample.placement.geometry.spacing_mm
    ranges = [(low / SPACING_OUTLIER, high * SPACING_OUTLIER) for low, high in card.spacings_mm]
    if not all(low <= size <= high for size, (low, high) in zip(spacing_mm, ranges, strict=False)):
        trained = " x ".join(f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}" for low, high in card.spacings_mm)
        yield f"its voxels are {dimensions(spacing_mm)} mm, the model was trained on {trained} mm"
    size = sample.image.shape[2:]
    if any(n > SPACING_OUTLIER * most for n, most in zip(size, card.size, strict=True)):
        yield f"it has {dimensions(size)} voxels at the model's resolution, images of training had at most {dimensions(card.size)}"


def _covered(placement: Placement) -> float:
    return math.prod((axis.kept[1] - axis.kept[0]) / axis.num_resampled for axis in placement.axes)


def _device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: there is no GPU that this torch can use; use device auto or cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
