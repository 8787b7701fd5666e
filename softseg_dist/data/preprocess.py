"""From a case as it lies on disk to a sample that can be trained on: resampled, cropped, normalised.

Legend: N items (2D: slices, 3D: 1), C image channels, R raters, K classes, X Y Z canonical (RAS+) axes, *S the axes
of an item (2D: X Y, so that an item is an axial slice; 3D: X Y Z).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from softseg_dist.data.cases import Case, CaseData
from softseg_dist.data.geometry import Float32, Geometry, spacing_of
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.data.resampling import Axis, Method, resample, restore
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen

Voxel = TypeVar("Voxel", bound=np.generic)

FLAT = 1e-6  # an image whose values differ by no more than this part of the largest one has no spread but rounding
PERCENTILES = (0.5, 99.5)  # "percentile" maps these to 0 and 1
MOSTLY_ZERO = 0.75  # where more voxels than this share are 0, as without the skull, they are no part of what was measured


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a sample lies in its file: all that is needed to put predictions back on the original grid.

    `axes`: how each of X, Y, Z was resampled and cropped. `slices`: the Z index of each item in 2D, None in 3D.
    """

    geometry: Geometry
    axes: tuple[Axis, ...]
    slices: tuple[int, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        geometry = {"shape": self.geometry.shape, "affine": self.geometry.affine.tolist()}
        return {"geometry": geometry, "axes": [asdict(axis) for axis in self.axes], "slices": self.slices}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Placement:
        """The inverse of `to_dict`."""
        x, y, z = fields["geometry"]["shape"]
        geometry = Geometry((x, y, z), np.asarray(fields["geometry"]["affine"], dtype=np.float64))
        slices = None if fields["slices"] is None else tuple(fields["slices"])
        return cls(geometry, tuple(Axis(**axis) for axis in fields["axes"]), slices)


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared case.

    `image` [N C *S] normalised; `raters` [N R K *S] in [0, 1]; `nearest` [N R K *S] in {0, 1}: each rater's mask >=
    0.5 resampled by nearest neighbour, None if nothing was resampled (then it would be `raters` >= 0.5); `truth` [N K
    *S] or None; `spacing_mm` of *S; `voxel_mm3` the volume of a voxel (in 2D with the slice's thickness); `placement`
    leads back; `own` has the raters' masks on the grid of the file.
    """

    name: str
    subject: str
    site: str
    rater_names: tuple[str, ...]
    image: Float32
    raters: Float32
    nearest: NDArray[np.uint8] | None
    truth: Float32 | None
    spacing_mm: tuple[float, ...]
    voxel_mm3: float
    placement: Placement
    own: OwnMasks


class Preprocess(Frozen):
    """Resample, crop, normalise: the same for every candidate of a study.

    Args:
        dim: 2 trains on axial slices, 3 on volumes.
        spacing_mm: voxel size to resample to, per axis of an item (2D: in plane only); None keeps each case's own.
        crop: size of an item in voxels; where the image is smaller it is padded (image: its minimum, labels: 0). None
            keeps the whole field of view; `Patch` trains on parts of it. Without one, smaller images are padded to the size of
            the largest in training (image: its border values, labels: 0).
        center: what the crop is centred on: "image" (its middle), "foreground" (the centre of the voxels that are
            brighter than the mean), or a mask as the data set names it, as in "seg-manual" for `Bids` (that mask's centre of
            mass). "seg-manual|image" takes the middle of the image where the mask is empty, as in a healthy control.
        label_resampling: "area": along axes that get coarser the exact share of each new voxel that is labelled, so that
            label x voxel volume adds up to the same; linear along the others. "linear": along all; lesions of few voxels
            may vanish on a coarser grid. Images are always averaged along axes that get coarser, linear along the others.
        normalize: per case, over the voxels of the crop: "zscore" (mean 0, sd 1), "percentile" (0.5 % to 99.5 %
            become 0 to 1, clipped; of the voxels that are not 0, if more than three quarters are), "none".
        slices: 2D only: "all", or "labelled" to keep only slices that some rater labelled, "labelled|all" to keep all of a
            case without any.
    """

    dim: Literal[2, 3] = 2
    spacing_mm: tuple[PositiveFloat, ...] | None = None
    crop: tuple[PositiveInt, ...] | None = None
    center: Annotated[str, Field(pattern=r"^[^|]+(\|[^|]+)*$")] = "image"
    label_resampling: Literal["area", "linear"] = "area"
    normalize: Literal["zscore", "percentile", "none"] = "zscore"
    slices: Literal["all", "labelled", "labelled|all"] = "all"

    @model_validator(mode="after")
    def _as_many_as_axes(self) -> Self:
        for name, value in (("spacing_mm", self.spacing_mm), ("crop", self.crop)):
            if value is not None and len(value) != self.dim:
                raise ValueError(f"{name} needs {self.dim} numbers for dim={self.dim}, got {value}")
        if self.slices != "all" and self.dim == 3:
            raise ValueError(f'slices="{self.slices}" is for dim=2; a volume is kept whole')
        return self

    @property
    def mask_parts(self) -> tuple[str, ...]:
        """The masks that centre the crop, besides the labels."""
        return () if self.crop is None else tuple(each for each in self.center.split("|") if each not in ("image", "foreground"))

    def apply(self, case: Case) -> Sample:
        """The sample of `case`. Raises UserError naming the case if it cannot be read or used."""
        return self.transform(case, case.load())

    def transform(self, case: Case, data: CaseData) -> Sample:
        """As `apply`, for voxels that are loaded already."""
        axes = self._axes(case, data)
        image = self._image(case, data.image, axes)
        raters = self._labels(data.raters, axes, self.label_resampling, np.float32)
        truth = None if data.truth is None else self._labels(data.truth, axes, self.label_resampling, np.float32)
        nearest = None
        if any(axis.is_resampled for axis in axes):
            nearest = self._labels(data.raters >= 0.5, axes, "nearest", np.uint8)
        slices = self._slices(case, raters)
        return Sample(
            name=case.name,
            subject=case.subject,
            site=case.site,
            rater_names=case.rater_names,
            image=_chosen(image, slices),
            raters=_chosen(raters, slices),
            nearest=None if nearest is None else _chosen(nearest, slices),
            truth=None if truth is None else _chosen(truth, slices),
            spacing_mm=tuple(axis.spacing_mm for axis in axes[: self.dim]),
            voxel_mm3=float(abs(np.linalg.det(data.affine[:3, :3])) * np.prod([axis.step for axis in axes])),
            placement=Placement(data.geometry, axes, slices),
            own=OwnMasks.of(data),
        )

    def restore(self, maps: Float32, placement: Placement) -> Float32:
        """Maps [N K *S] of a sample back on the grid of its file [K X Y Z], canonical; float32, clipped to [0, 1].

        Linear along axes where the file's grid is finer, area-weighted where it is coarser; 0 in slices that were left out and
        outside the crop.
        """
        if placement.slices is None:
            volume = maps[0]
        else:
            volume = np.moveaxis(maps, 0, -1)
            if len(placement.slices) < placement.axes[2].size:
                volume = np.zeros((*maps.shape[1:], placement.axes[2].size), dtype=np.float32)
                volume[..., list(placement.slices)] = np.moveaxis(maps, 0, -1)
        restored = restore(volume, placement.axes)
        return restored.clip(0, 1, out=restored)

    def _axes(self, case: Case, data: CaseData) -> tuple[Axis, ...]:
        spacings = spacing_of(data.affine)
        wanted: tuple[float | None, ...] = (*(self.spacing_mm or (None,) * self.dim), None)[:3]
        axes = tuple(map(Axis.whole, data.image.shape[1:], spacings, wanted))
        if self.crop is None:
            return axes
        center = self._center(case, data)
        return tuple(axis.window(n, c) for axis, n, c in zip(axes, self.crop, center, strict=False)) + axes[self.dim :]

    def _center(self, case: Case, data: CaseData) -> tuple[float, ...]:
        """The voxel index [X Y Z], with fractions, that the crop is centred on."""
        for center in self.center.split("|"):
            if center == "image":
                return tuple((n - 1) / 2 for n in data.image.shape[1:])
            if center == "foreground":
                weights = (data.image[0] > data.image[0].mean(dtype=np.float64)).astype(np.float32)
            else:
                weights = case.mask(center)
            if (total := float(weights.sum(dtype=np.float64))) > 0:
                planes = zip(((1, 2), (0, 2), (0, 1)), weights.shape, strict=True)
                return tuple(float(weights.sum(plane, dtype=np.float64) @ np.arange(n)) / total for plane, n in planes)
        raise UserError(
            f"{case.name}: the crop is to be centred on {self.center!r}, which is empty there; name what is taken then, as in "
            f'center="{self.center}|image", or leave the case out: exclude=("{case.name}",) of the data set'
        )

    def _image(self, case: Case, volume: Float32, axes: tuple[Axis, ...]) -> Float32:
        """[C X Y Z] -> [N C *S], normalised and then padded by each channel's minimum."""
        items, whole, window = self._blank(volume.shape[:1], axes, np.float32)
        for c, channel in enumerate(volume):
            values = self._normalized(resample(channel, axes, "average"), f"{case.name}, channel {c}")
            whole[c] = values.min()
            whole[c][window] = values
        return items

    def _labels(self, volume: NDArray[Any], axes: tuple[Axis, ...], method: Method, kind: type[Voxel]) -> NDArray[Voxel]:
        """[... X Y Z] -> [N ... *S], padded by 0."""
        items, whole, window = self._blank(volume.shape[:-3], axes, kind)
        for index in np.ndindex(volume.shape[:-3]):
            whole[index][window] = resample(volume[index], axes, method)
        return items

    def _blank(
        self, lead: tuple[int, ...], axes: tuple[Axis, ...], kind: type[Voxel]
    ) -> tuple[NDArray[Voxel], NDArray[Voxel], tuple[slice, ...]]:
        """Items [N ... *S] of 0; a view of them as [... X Y Z]; where that is not padding. So results are written in place."""
        x, y, z = (axis.size for axis in axes)
        items = np.zeros((z, *lead, x, y) if self.dim == 2 else (1, *lead, x, y, z), dtype=kind)
        return items, np.moveaxis(items, 0, -1) if self.dim == 2 else items[0], tuple(axis.inside for axis in axes)

    def _normalized(self, channel: Float32, where: str) -> Float32:
        if self.normalize == "none":
            return channel
        first, last = float(channel.min()), float(channel.max())
        if last - first <= FLAT * max(abs(first), abs(last)):
            raise UserError(f"{where}: the image is constant ({first:g}) within the crop, so it cannot be normalised")
        if self.normalize == "zscore":
            low, scale = float(channel.mean(dtype=np.float64)), float(channel.std(dtype=np.float64))
        else:
            is_sparse = np.count_nonzero(channel) < (1 - MOSTLY_ZERO) * channel.size
            low, high = (float(value) for value in np.percentile(channel[channel != 0] if is_sparse else channel, PERCENTILES))
            low = 0.0 if is_sparse and low == high else low  # a mask
            scale = high - low
        if scale <= 0:
            most = f"at least 99 % of the voxels within the crop are {low:g}"
            raise UserError(f'{where}: {most}, so that percentiles cannot normalise it; use normalize="zscore" or a smaller crop')
        scaled: Float32 = channel - np.float32(low)
        scaled /= np.float32(scale)
        return scaled.clip(0, 1, out=scaled) if self.normalize == "percentile" else scaled

    def _slices(self, case: Case, raters: Float32) -> tuple[int, ...] | None:
        if self.dim == 3:
            return None
        every = tuple(range(len(raters)))
        if self.slices == "all" or not case.rater_names:  # an image to predict has no raters: all its slices count
            return every
        labelled = np.flatnonzero(raters.any(axis=tuple(range(1, raters.ndim))))
        if not labelled.size and self.slices == "labelled":
            raise UserError(
                f'{case.name}: slices="labelled" keeps none, as no slice has a label within the crop; "labelled|all" keeps all '
                f'slices of such a case, exclude=("{case.name}",) of the data set leaves it out'
            )
        return tuple(labelled.tolist()) or every


def _chosen(items: NDArray[Voxel], slices: tuple[int, ...] | None) -> NDArray[Voxel]:
    """[N ... *S]: the items of these slices; all of them are not copied."""
    return items if slices is None or len(slices) == len(items) else items[list(slices)]
