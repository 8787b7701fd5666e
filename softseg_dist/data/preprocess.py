"""From a case as it lies on disk to a sample that can be trained on: resampled, cropped, normalised.

Legend: N items (2D: slices, 3D: 1), C image channels, R raters, K classes, X Y Z canonical (RAS+) axes, *S the axes
of an item (3D: X Y Z; 2D: these without the one that slices are taken across, so X Y of an axial slice).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator

from softseg_dist.data.cases import Case, CaseData, LabelledCase
from softseg_dist.data.geometry import Float32, Geometry, spacing_of
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.data.resampling import Axis, Method, resample, restore
from softseg_dist.data.volume import read_geometry
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen

Voxel = TypeVar("Voxel", bound=np.generic)

FLAT = 1e-6  # an image whose values differ by no more than this part of the largest one has no spread but rounding
TOUCHED = 1e-6  # share of a voxel that is to be ignored: below it is rounding
PERCENTILES = (0.5, 99.5)  # "percentile" maps these to 0 and 1
MOSTLY_ZERO = 0.75  # where more voxels than this share are 0, as without the skull, they are no part of what was measured


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a sample lies in its file: all that is needed to put predictions back on the original grid.

    `axes`: how X, Y and Z were resampled and cropped. `slices`, None in 3D: of each item along `slice_axis` (0, 1, 2: X, Y, Z).
    """

    geometry: Geometry
    axes: tuple[Axis, ...]
    slices: tuple[int, ...] | None
    slice_axis: int = 2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        geometry = {"shape": self.geometry.shape, "affine": self.geometry.affine.tolist()}
        axes = [asdict(axis) for axis in self.axes]
        return {"geometry": geometry, "axes": axes, "slices": self.slices, "slice_axis": self.slice_axis}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Placement:
        """The inverse of `to_dict`."""
        x, y, z = fields["geometry"]["shape"]
        geometry = Geometry((x, y, z), np.asarray(fields["geometry"]["affine"], dtype=np.float64))
        slices = None if fields["slices"] is None else tuple(fields["slices"])
        return cls(geometry, tuple(Axis(**axis) for axis in fields["axes"]), slices, fields["slice_axis"])


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared case.

    `image` [N C *S] normalised; `raters` [N R K *S] in [0, 1], NaN in voxels that touch one to ignore; `nearest` [N R K *S] in
    {0, 1}: each rater's mask >= 0.5 resampled by nearest neighbour, None if nothing was resampled (then it would be
    `raters` >= 0.5); `truth` [N K *S] or None; `spacing_mm` of *S; `voxel_mm3` the volume of a voxel (in 2D with the slice's
    thickness); `placement` leads back; `own` has the raters' masks on the grid of the file.
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
        dim: 2 trains on slices, 3 on volumes.
        axis: 2D only: the axis that slices are taken across: "z" (axial slices), "y" (coronal), "x" (sagittal), or "auto": of each
            file the one along which its voxels are longest, of equal ones (within 1 %) the last. The axes of an item are the
            other two, in the order x, y, z.
        spacing_mm: voxel size to resample to, per axis of an item (2D: in plane only); None keeps each case's own. "median": along
            each axis the median over the files of the study's cases; stores, models and reports have the numbers.
        crop: size of an item in voxels; where the image is smaller it is padded (image: its minimum, labels: 0). None
            keeps the whole field of view; `Patch` trains on parts of it. Without one, smaller images are padded in the same
            way to the size of the largest.
        center: what the crop is centred on: "image" (its middle), "foreground" (the centre of the voxels that are
            brighter than the mean), or a mask as the data set names it, as in "seg-manual" for `Bids` (that mask's centre of
            mass). "seg-manual|image" takes the middle of the image where the mask is empty, as in a healthy control.
        label_resampling: "area": the exact share of each new voxel that is labelled, along axes that get finer by linear
            interpolation, so that label x voxel volume adds up to the same. "linear": at its centre; lesions of few voxels
            may vanish on a coarser grid. Images are always averaged along axes that get coarser, linear along the others.
        normalize: per case, over the voxels of the crop: "zscore" (mean 0, sd 1), "percentile" (0.5 % to 99.5 %
            become 0 to 1, clipped; of the voxels that are not 0, if more than three quarters are), "none".
        slices: 2D only: "all", or "labelled": those that some rater labelled, "labelled|all": all of a case without any.
    """

    dim: Literal[2, 3] = 2
    axis: Literal["x", "y", "z", "auto"] = "z"
    spacing_mm: tuple[PositiveFloat, ...] | Literal["median"] | None = None
    crop: tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None = None
    center: Annotated[str, Field(pattern=r"^[^|]+(\|[^|]+)*$")] = "image"
    label_resampling: Literal["area", "linear"] = "area"
    normalize: Literal["zscore", "percentile", "none"] = "zscore"
    slices: Literal["all", "labelled", "labelled|all"] = "all"

    @model_validator(mode="after")
    def _as_many_as_axes(self) -> Self:
        for name, value in (("spacing_mm", self.spacing_mm), ("crop", self.crop)):
            if isinstance(value, tuple) and len(value) != self.dim:
                raise ValueError(f"{name} needs {self.dim} numbers for dim={self.dim}, got {value}")
        for name, chosen, whole in (("slices", self.slices, "all"), ("axis", self.axis, "z")):
            if chosen != whole and self.dim == 3:
                raise ValueError(f'{name}="{chosen}" is for dim=2; a volume is kept whole')
        return self

    @property
    def mask_parts(self) -> tuple[str, ...]:
        """The masks that centre the crop, besides the labels."""
        return () if self.crop is None else tuple(each for each in self.center.split("|") if each not in ("image", "foreground"))

    def resolved(self, cases: Iterable[Case]) -> Self:
        """The same with numbers for spacing_mm="median", of 6 digits, from the headers of the cases' files.

        A file that cannot be read does not count, as preparation refuses it; if none can, voxel sizes stay as they are.
        """
        if self.spacing_mm != "median":
            return self
        grids = [grid for grid in map(_grid_of, cases) if grid is not None]
        median = np.median([[grid.spacing_mm[axis] for axis in self._item_axes(grid)] for grid in grids], axis=0) if grids else ()
        return self.replace(spacing_mm=tuple(float(f"{mm:.6g}") for mm in median) or None)

    def slice_axis(self, geometry: Geometry) -> int:
        """The canonical axis (0, 1, 2) that slices of a file are taken across in 2D."""
        return geometry.thickest if self.axis == "auto" else "xyz".index(self.axis)

    def apply(self, case: Case) -> Sample:
        """The sample of `case`. Raises UserError naming the case if it cannot be read or used."""
        return self.transform(case, case.load())

    def transform(self, case: Case, data: CaseData) -> Sample:
        """As `apply`, for voxels that are loaded already."""
        axes = self._axes(case, data)
        grid = Placement(data.geometry, axes, None, self.slice_axis(data.geometry))
        image = self._image(case, data.image, grid)
        ignored = np.logical_or.reduce(np.isnan(data.raters), axis=(0, 1))
        drawn = np.nan_to_num(data.raters) if ignored.any() else data.raters
        raters = self._labels(drawn, grid, self.label_resampling, np.float32)
        if ignored.any():
            touched = self._labels(ignored.astype(np.float32), grid, self.label_resampling, np.float32) > TOUCHED
            if touched.all():
                raise UserError(f'{case.name}: every voxel is to be ignored; exclude=("{case.name}",) leaves the case out')
            np.copyto(raters, np.nan, where=touched[:, None, None])
        truth = None if data.truth is None else self._labels(data.truth, grid, self.label_resampling, np.float32)
        is_resampled = any(axis.is_resampled for axis in axes)
        nearest = self._labels(data.raters >= 0.5, grid, "nearest", np.uint8) if is_resampled else None
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
            spacing_mm=tuple(axes[axis].spacing_mm for axis in self._item_axes(data.geometry)),
            voxel_mm3=float(abs(np.linalg.det(data.affine[:3, :3])) * np.prod([axis.step for axis in axes])),
            placement=replace(grid, slices=slices),
            own=OwnMasks.of(data),
        )

    def restore(self, maps: Float32, placement: Placement) -> Float32:
        """Maps [N K *S] of a sample back on the grid of its file [K X Y Z], canonical; float32, clipped to [0, 1].

        Linear along axes where the file's grid is finer, area-weighted where it is coarser; 0 in other slices and outside the crop.
        """
        slices, num_slices = placement.slices, placement.axes[placement.slice_axis].size
        if slices is not None and len(slices) < num_slices:
            chosen, maps = maps, np.zeros((num_slices, *maps.shape[1:]), dtype=np.float32)
            maps[list(slices)] = chosen
        restored = restore(maps[0] if slices is None else np.moveaxis(maps, 0, placement.slice_axis - 3), placement.axes)
        return restored.clip(0, 1, out=restored)

    def _axes(self, case: Case, data: CaseData) -> tuple[Axis, ...]:
        if isinstance(self.spacing_mm, str):
            raise UserError(f'spacing_mm="{self.spacing_mm}" is that of several cases: take Preprocess(...).resolved(cases)')
        inside = self._item_axes(data.geometry)
        wanted = dict(zip(inside, self.spacing_mm or (), strict=False))
        sizes = zip(data.image.shape[1:], spacing_of(data.affine), strict=True)
        axes = [Axis.whole(n, mm, wanted.get(axis)) for axis, (n, mm) in enumerate(sizes)]
        if self.crop is not None:
            center = self._center(case, data)
            for axis, n in zip(inside, self.crop, strict=True):
                axes[axis] = axes[axis].window(n, center[axis])
        return tuple(axes)

    def _item_axes(self, geometry: Geometry) -> tuple[int, ...]:
        return tuple(axis for axis in range(3) if self.dim == 3 or axis != self.slice_axis(geometry))

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
        to_do = f'name what is taken then, as in center="{self.center}|image", or leave the case out: exclude=("{case.name}",)'
        raise UserError(f"{case.name}: the crop is to be centred on {self.center!r}, which is empty there; {to_do} of the data set")

    def _image(self, case: Case, volume: Float32, grid: Placement) -> Float32:
        """[C X Y Z] -> [N C *S], normalised and then padded by each channel's minimum."""
        items, whole, window = self._blank(volume.shape[:1], grid, np.float32)
        for c, channel in enumerate(volume):
            values = self._normalized(resample(channel, grid.axes, "average"), f"{case.name}, channel {c}")
            whole[c] = values.min()
            whole[c][window] = values
        return items

    def _labels(self, volume: NDArray[Any], grid: Placement, method: Method, kind: type[Voxel]) -> NDArray[Voxel]:
        """[... X Y Z] -> [N ... *S], padded by 0."""
        items, whole, window = self._blank(volume.shape[:-3], grid, kind)
        for index in np.ndindex(volume.shape[:-3]):
            whole[index][window] = resample(volume[index], grid.axes, method)
        return items

    def _blank(
        self, lead: tuple[int, ...], grid: Placement, kind: type[Voxel]
    ) -> tuple[NDArray[Voxel], NDArray[Voxel], tuple[slice, ...]]:
        """Items [N ... *S] of 0; a view of them as [... X Y Z]; where that is not padding. So results are written in place."""
        sizes, window = [axis.size for axis in grid.axes], tuple(axis.inside for axis in grid.axes)
        num_items = sizes.pop(grid.slice_axis) if self.dim == 2 else 1
        items = np.zeros((num_items, *lead, *sizes), dtype=kind)
        return items, np.moveaxis(items, 0, grid.slice_axis - 3) if self.dim == 2 else items[0], window

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
        labelled = np.flatnonzero((raters > 0).any(axis=tuple(range(1, raters.ndim))))
        if not labelled.size and self.slices == "labelled":
            to_do = f'"labelled|all" keeps all slices of such a case, exclude=("{case.name}",) of the data set leaves it out'
            raise UserError(f'{case.name}: slices="labelled" keeps none, as no slice has a label within the crop; {to_do}')
        return tuple(labelled.tolist()) or every


def _grid_of(case: Case) -> Geometry | None:
    """Of its file, by the header where it has one; None if the case lacks something or cannot be read."""
    if case.missing():
        return None
    try:
        return read_geometry(case.images[0], case.spacing_mm) if isinstance(case, LabelledCase) else case.load().geometry
    except UserError:
        return None


def _chosen(items: NDArray[Voxel], slices: tuple[int, ...] | None) -> NDArray[Voxel]:
    """[N ... *S]: the items of these slices; all of them are not copied."""
    return items if slices is None or len(slices) == len(items) else items[list(slices)]
