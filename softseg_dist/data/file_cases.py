"""Cases whose image and masks are NIfTI files.

Legend: C image channels, R raters, K classes, X Y Z canonical (RAS+) voxel axes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softseg_dist.data.dataset import Case, CaseData, Float32
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.volume import Volume, read_geometry, read_volume
from softseg_dist.errors import UserError

ROUNDING = 1e-6  # labels this far outside [0, 1] are rounding errors of the tool that wrote them, and are clipped


@dataclass(frozen=True)
class MaskFile:
    """A mask on disk: its voxels are the label, in [0, 1]; with a `value`, it is 1 where they have that value."""

    path: Path
    value: int | None = None


class ImageCase(Case):
    """An image without labels, as one has it for prediction. `images` are its channels, all on one grid.

    `center_mask` is the mask that centres the crop, where the preprocessing wants one.
    """

    def __init__(
        self,
        name: str,
        images: Sequence[Path],
        subject: str = "",
        site: str = "",
        center_mask: MaskFile | None = None,
    ) -> None:
        self.name = name
        self.subject = subject or name
        self.site = site
        self.rater_names: tuple[str, ...] = ()
        self.images = tuple(images)
        self.center_mask = center_mask

    def check_headers(self) -> None:
        """Raises UserError if a file is missing or no NIfTI, or on another grid; reads no voxels."""
        reference = read_geometry(self.images[0])
        for path in (*self.images[1:], *([self.center_mask.path] if self.center_mask else [])):
            _check_grid(read_geometry(path), path, reference, self.images[0])

    def sources(self, parts: Sequence[str] = ()) -> tuple[str, ...]:
        """See `Case.sources`."""
        return tuple(f"{path.name} {_sha256(path)}" for path in self._files(parts))

    def load(self) -> CaseData:
        """See `Case.load`: no raters, so `raters` is [0 0 X Y Z]."""
        image, geometry = self._read_images()
        raters = np.zeros((0, 0, *image.shape[1:]), dtype=np.float32)
        return CaseData(image, raters, None, geometry.canonical_affine, geometry)

    def mask(self, part: str) -> Float32:
        """See `Case.mask`: `center_mask`, whatever its file is called."""
        if self.center_mask is None:
            raise UserError(f"{self.name}: an image alone has no mask {part!r} to centre the crop on")
        return self._read_mask(self.center_mask, read_geometry(self.images[0]), {}, part)

    def _files(self, parts: Sequence[str]) -> tuple[Path, ...]:
        return (*self.images, *([self.center_mask.path] if self.center_mask and parts else []))

    def _read_images(self) -> tuple[Float32, Geometry]:
        volumes = [read_volume(path) for path in self.images]
        for path, volume in zip(self.images[1:], volumes[1:], strict=True):
            _check_grid(volume.geometry, path, volumes[0].geometry, self.images[0])
        return np.stack([volume.data for volume in volumes]), volumes[0].geometry

    def _read_mask(self, mask: MaskFile, geometry: Geometry, read: dict[Path, Volume], what: str) -> Float32:
        if mask.path not in read:
            read[mask.path] = read_volume(mask.path)
            _check_grid(read[mask.path].geometry, mask.path, geometry, self.images[0])
        values = read[mask.path].data
        if mask.value is not None:
            if (fractions := int(np.count_nonzero(values != np.rint(values)))) > 0:
                raise UserError(
                    f"{what}: value {mask.value} needs a map of integers, got {fractions} other voxels in {mask.path}"
                )
            return (values == mask.value).astype(np.float32)
        low, high = float(values.min()), float(values.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            worst = high if high > 1 + ROUNDING else low
            raise UserError(
                f"{what}: labels must lie in [0, 1], got {worst:g} in {mask.path}; "
                'scale it, or name one value of an integer map in the study file as "part:value"'
            )
        return values.clip(0, 1)


class LabelledCase(ImageCase):
    """An image with masks. `labels`: rater -> class -> file; `problems`: what is missing, one sentence each.

    `find_mask` finds the file of any mask of this case by its part, or raises UserError; it is used to centre the crop.
    """

    def __init__(
        self,
        name: str,
        images: Sequence[Path],
        subject: str,
        site: str,
        labels: Mapping[str, Mapping[str, MaskFile]],
        problems: Sequence[str],
        find_mask: Callable[[str], MaskFile],
    ) -> None:
        super().__init__(name, images, subject, site)
        self.rater_names = tuple(labels)
        self.labels = labels
        self.problems = tuple(problems)
        self.find_mask = find_mask

    def missing(self) -> tuple[str, ...]:
        """See `Case.missing`."""
        return self.problems

    def load(self) -> CaseData:
        """See `Case.load`. A file that several classes share is read once."""
        if self.problems:
            raise UserError(self.problems[0])
        image, geometry = self._read_images()
        read: dict[Path, Volume] = {}
        raters = [
            [self._read_mask(mask, geometry, read, f"rater {rater}, class {name}") for name, mask in masks.items()]
            for rater, masks in self.labels.items()
        ]
        return CaseData(image, np.array(raters, dtype=np.float32), None, geometry.canonical_affine, geometry)

    def mask(self, part: str) -> Float32:
        """See `Case.mask`."""
        return self._read_mask(self.find_mask(part), read_geometry(self.images[0]), {}, part)

    def _files(self, parts: Sequence[str]) -> tuple[Path, ...]:
        masks = [mask.path for masks in self.labels.values() for mask in masks.values()]
        return tuple(dict.fromkeys([*self.images, *masks, *(self.find_mask(part).path for part in parts)]))


def _check_grid(geometry: Geometry, path: Path, reference: Geometry, reference_path: Path) -> None:
    if difference := reference.difference(geometry):
        raise UserError(
            f"{path} is on another grid than {reference_path}: {difference}; resample it to the image first"
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
