"""A simulated data set with a known soft truth: bodies with an analytic boundary, images of them, and raters who move the boundary.

A body is star-shaped around its centre (or centre line): a point q, in coordinates scaled by the body's half axes, lies inside
if |q| < radius(direction of q). Its partial volume in a voxel is computed from sample points. A `Wobble` moves the boundary by a
smooth random distance, as another rater would. An image is tissue weighted by partial volumes, with texture, bias field and noise.

Legend: P points, 3 coordinates x y z in mm; X Y Z voxels.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, model_validator
from scipy import ndimage

from softseg_dist.data.cases import Case, CaseData, DataSet
from softseg_dist.data.geometry import Float32, Float64, Geometry, Shape3
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.errors import UserError

Vector3 = tuple[float, float, float]
Wobble = Callable[[Float64], Float64]  # how far a rater moves the boundary: directions [P 3] -> mm [P]

TRUTH_POINTS = (8, 8, 4)  # sample points per voxel and axis for the exact partial volume (volumes are right to 0.5 %)
RATER_POINTS = (4, 4, 2)  # where fewer points are enough: a rater's mask asks only whether the partial volume reaches 1/2
FAR = 3.0  # half axes: no rater draws an ellipsoid that large


def draw_wobble(generator: np.random.Generator, bias_mm: float, sd_mm: float) -> Wobble:
    """A smooth random function of direction: bias + sd sqrt(2/6) sum_m cos(waves_m . n + phases_m), of about two periods."""
    waves, phases = generator.normal(0, 2.0, (6, 3)), generator.uniform(0, 2 * math.pi, 6)
    return lambda directions: bias_mm + sd_mm * math.sqrt(2 / 6) * np.cos(directions @ waves.T + phases).sum(axis=1)


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """A lesion."""

    center_mm: Vector3
    half_axes_mm: Vector3

    def inside(self, points: Float64, wobble: Wobble | None) -> NDArray[np.bool_]:
        """[P 3] -> [P]. The direction of a wobble is that from the centre, plus the centre: lesions differ."""
        scaled = (points - self.center_mm) / self.half_axes_mm
        distance = np.linalg.norm(scaled, axis=1)
        inside = distance < 1
        if wobble is not None:
            near = np.flatnonzero(distance < FAR)
            directions = scaled[near] / np.maximum(distance[near], 1e-9)[:, None] + self.center_mm
            inside[near] = distance[near] < 1 + wobble(directions) / math.prod(self.half_axes_mm) ** (1 / 3)
        return inside


@dataclass(frozen=True, eq=False)
class Column:
    """A body along z: spinal cord or gray matter. Its section has radius sum_k a_k cos(k t) + b_k sin(k t) at angle t.

    The section is scaled by `half_axes_mm`, by (1 + taper z / height) along z, and its centre drifts by `drift` mm per mm of z.
    """

    height_mm: float
    center_mm: tuple[float, float]
    drift: tuple[float, float]
    half_axes_mm: tuple[float, float]
    taper: float
    cosines: Float64  # a_0, a_1, ...
    sines: Float64  # b_0 (unused), b_1, ...

    def inside(self, points: Float64, wobble: Wobble | None) -> NDArray[np.bool_]:
        """[P 3] -> [P]"""
        z = points[:, 2]
        scale = 1 + self.taper * z / self.height_mm
        u, v = (
            (points[:, axis] - self.center_mm[axis] - self.drift[axis] * z) / (self.half_axes_mm[axis] * scale) for axis in (0, 1)
        )
        distance = np.hypot(u, v)
        turn = (u + 1j * v) / np.maximum(distance, 1e-9)  # e^(i t), so that its k-th power holds cos(k t) and sin(k t)
        radius = np.full(len(points), self.cosines[0])
        power = np.ones_like(turn)
        for a, b in zip(self.cosines[1:], self.sines[1:], strict=True):
            power *= turn
            radius += a * power.real + b * power.imag
        if wobble is not None:
            directions = np.stack([turn.real, turn.imag, 2 * z / self.height_mm], axis=1)
            radius += wobble(directions) / math.sqrt(math.prod(self.half_axes_mm))
        return distance < radius


Body = Ellipsoid | Column


def partial_volume(
    bodies: Sequence[Body],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    points: Sequence[int] = TRUTH_POINTS,
    wobble: Wobble | None = None,
) -> Float32:
    """The share of each voxel that lies in the union of `bodies` [X Y Z], of a grid that is centred on the origin.

    Voxels that agree with their 26 neighbours (thick voxels are looked at in several places) are taken as pure; the
    others are sampled at `points` regular places per axis.
    """
    centers = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    grid = np.stack(np.meshgrid(*centers, indexing="ij"), axis=-1).reshape(-1, 3)
    coarse = [max(1, round(s / min(spacing_mm) / 2)) for s in spacing_mm]

    def union(places: Float64) -> NDArray[np.bool_]:
        return np.any([body.inside(places, wobble) for body in bodies], axis=0)

    looks = [union(grid + offset) for offset in _offsets(coarse, spacing_mm)]
    some, every = (combine(looks, axis=0).reshape(shape) for combine in (np.any, np.all))
    mixed = np.flatnonzero(ndimage.grey_dilation(some, (3, 3, 3)) != ndimage.grey_erosion(every, (3, 3, 3)))
    share = every.astype(np.float32).reshape(-1)
    share[mixed] = sum(union(grid[mixed] + offset).astype(float) for offset in _offsets(points, spacing_mm)) / math.prod(points)
    return share.reshape(shape)


def _offsets(points: Sequence[int], spacing_mm: Sequence[float]) -> Float64:
    """Regular places within a voxel, from its centre [prod(points) 3]."""
    places = [((np.arange(n) + 0.5) / n - 0.5) * s for n, s in zip(points, spacing_mm, strict=True)]
    return np.array(list(itertools.product(*places)))


SPACING_MM: dict[int, Vector3] = {2: (0.5, 0.5, 2.5), 3: (1.0, 1.0, 1.0)}
SIZE: dict[int, tuple[int, ...]] = {2: (48, 48), 3: (32, 32, 32)}
# Image intensity of each tissue at the first site; the other sites have less contrast and more noise.
FLUID, WHITE, GRAY, LESION = 1.0, 0.5, 0.75, 0.9
SITE_CONTRAST, SITE_NOISE = 0.85, 1.25  # factors from one site to the next
INTENSITY = 400.0  # images are in arbitrary units, as MRI is
VERSION = 1  # raised when the same fields would give other voxels


class Phantom(DataSet):
    """Simulated images with a known soft truth and raters who move its boundary.

    Args:
        shape: "cord" has gray matter (class "GM") in a spinal cord; "lesions" has several ellipsoids (class "lesion").
        subjects: number of people, one case each.
        dim: 2 for thick axial slices (0.5 x 0.5 x 2.5 mm), 3 for 1 mm volumes.
        size: voxels of an item; None is 48 x 48 (dim=2) or 32 x 32 x 32 (dim=3).
        num_slices: slices per case for dim=2.
        raters: number of raters, named "A", "B", ... Each has a bias of his own; all masks are binary.
        disagreement_mm: half of the range of the raters' biases, and standard deviation of the rest of their boundary shift.
        sites: number of sites, named "site1", ...; contrast falls and noise rises from one to the next.
        noise: standard deviation of the noise at the first site (tissues differ by 0.25).
        bias_field: the slow brightness change over the image is about 1 +- this.
        seed: another seed, another set of people.

    >>> Phantom(subjects=2).cases(None)[0].load().raters.shape
    (4, 1, 48, 48, 8)
    """

    shape: Literal["cord", "lesions"] = "cord"
    subjects: int = Field(30, ge=1, le=9999)
    dim: Literal[2, 3] = 2
    size: tuple[int, ...] | None = None
    num_slices: int = Field(8, ge=1, le=512)
    raters: int = Field(4, ge=1, le=26)
    disagreement_mm: NonNegativeFloat = 0.25
    sites: int = Field(2, ge=1, le=26)
    noise: NonNegativeFloat = 0.1
    bias_field: float = Field(0.15, ge=0, lt=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _size_fits(self) -> Self:
        if self.size is not None and (len(self.size) != self.dim or not all(16 <= n <= 512 for n in self.size)):
            raise ValueError(f"size needs {self.dim} numbers of 16 to 512 for dim={self.dim}, got {self.size}")
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        return ("GM",) if self.shape == "cord" else ("lesion",)

    @property
    def rater_names(self) -> tuple[str, ...]:
        return tuple(chr(ord("A") + r) for r in range(self.raters))

    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        """One case per person; no file is read, so `data_root` does not matter."""
        return tuple(PhantomCase(self, index) for index in range(self.subjects))

    @property
    def grid(self) -> Shape3:
        """Voxels of a case."""
        x, y, z = (*(self.size or SIZE[self.dim]), self.num_slices)[:3]
        return x, y, z

    @property
    def spacing_mm(self) -> Vector3:
        """Voxel size of a case."""
        return SPACING_MM[self.dim]

    def rater_biases_mm(self) -> list[float]:
        """How far outside the true boundary each rater draws on average; they add up to 0."""
        outermost = self.disagreement_mm if self.raters > 1 else 0.0
        return [float(bias) for bias in np.linspace(-outermost, outermost, self.raters)]


class PhantomCase(Case):
    """One simulated person."""

    def __init__(self, phantom: Phantom, index: int) -> None:
        self.phantom = phantom
        self.index = index
        self.name = self.subject = f"sub-{index + 1:03d}"
        self.site = f"site{index % phantom.sites + 1}"
        self.rater_names = phantom.rater_names

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        """See `Case.sources`: all fields but the number of people say everything."""
        return (f"phantom {VERSION} case {self.index} {self.phantom.replace(subjects=1).fingerprint}",)

    def load(self) -> CaseData:
        phantom, grid = self.phantom, self.phantom.grid
        target, surround = self.bodies()
        truth = partial_volume(target, grid, phantom.spacing_mm)
        masks = []
        for rater, bias_mm in enumerate(phantom.rater_biases_mm()):
            wobble = draw_wobble(self._generator("rater", rater), bias_mm, phantom.disagreement_mm)
            share = partial_volume(target, grid, phantom.spacing_mm, RATER_POINTS, wobble)
            masks.append((share >= 0.5).astype(np.float32))
        around = partial_volume(surround, grid, phantom.spacing_mm, RATER_POINTS) if surround else None
        image = self._image(truth, around)
        affine = np.diag([*phantom.spacing_mm, 1.0])
        affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(grid, phantom.spacing_mm, strict=True)]  # the middle at the origin
        geometry = Geometry(grid, affine)
        return CaseData(image[None], np.stack(masks)[:, None], truth[None], geometry.canonical_affine, geometry)

    def mask(self, part: str) -> Float32:
        """See `Case.mask`: the class's own name, or "cord"."""
        target, surround = self.bodies()
        parts = {self.phantom.classes[0]: target} | ({"cord": surround} if surround else {})
        if part not in parts:
            raise UserError(f"{self.name}: the phantom has no mask {part!r}; there are {', '.join(parts)}")
        return partial_volume(parts[part], self.phantom.grid, self.phantom.spacing_mm)

    def bodies(self) -> tuple[list[Body], list[Body]]:
        """What is labelled, and what it lies in (nothing for lesions)."""
        generator = self._generator("shape")
        extent = [n * s for n, s in zip(self.phantom.grid, self.phantom.spacing_mm, strict=True)]
        if self.phantom.shape == "cord":
            return _cord(generator, extent)
        return list(_lesions(generator, extent, min(self.phantom.spacing_mm))), []

    def _image(self, target: Float32, surround: Float32 | None) -> Float32:
        """Tissues mixed by their partial volume, times the bias field, plus noise: [X Y Z]."""
        generator = self._generator("image")
        level = self.index % self.phantom.sites
        contrast = SITE_CONTRAST**level
        if surround is None:
            tissue = WHITE + 0.06 * _texture(generator, target.shape) + contrast * (LESION - WHITE) * target
        else:
            outside = FLUID + 0.25 * _texture(generator, target.shape)
            inside = WHITE + contrast * (GRAY - WHITE) * target
            tissue = (1 - surround) * outside + surround * inside
        x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in target.shape), indexing="ij")
        terms = np.stack([x, y, z, x * y, x * x - 0.5, y * y - 0.5])  # a random quadratic, within about +- 1
        bias = np.exp(self.phantom.bias_field * np.tensordot(generator.normal(0, 0.5, len(terms)), terms, 1))
        noise = generator.normal(0, self.phantom.noise * SITE_NOISE**level, target.shape)
        return (INTENSITY * (tissue * bias + noise)).astype(np.float32)

    def _generator(self, purpose: str, number: int = 0) -> np.random.Generator:
        key = f"phantom/{self.phantom.seed}/{self.phantom.shape}/{self.index}/{purpose}/{number}"
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))


def _cord(generator: np.random.Generator, extent_mm: Sequence[float]) -> tuple[list[Body], list[Body]]:
    """A gray matter butterfly and the cord around it, the cord taking about half of the field of view."""
    width, height = (share * extent for share, extent in zip((0.29, 0.23), extent_mm, strict=False))
    width, height = (side * generator.uniform(0.85, 1.15) for side in (width, height))
    center = (float(generator.normal(0, 0.04 * extent_mm[0])), float(generator.normal(0, 0.04 * extent_mm[1])))
    drift = (float(generator.normal(0, 0.02)), float(generator.normal(0, 0.02)))
    taper = float(generator.uniform(-0.2, 0.2))
    size = generator.uniform(0.9, 1.1)
    # Four horns (k = 4), wider than high (k = 2), thicker in front (sine of k = 1 and 3), all different.
    cosines = size * (np.array([0.44, 0.0, 0.08, 0.0, -0.22, 0.0, 0.0]) + generator.normal(0, 0.015, 7))
    sines = size * (np.array([0.0, 0.03, 0.0, 0.04, 0.0, 0.0, 0.0]) + generator.normal(0, 0.015, 7))
    gray = Column(extent_mm[2], center, drift, (width, height), taper, cosines, sines)
    return [gray], [Column(extent_mm[2], center, drift, (width, height), taper / 2, np.array([1.0]), np.array([0.0]))]


def _lesions(generator: np.random.Generator, extent_mm: Sequence[float], smallest_mm: float) -> list[Ellipsoid]:
    """Two to six ellipsoids that do not touch, their mean half axes 2.5 to 7 of the smallest voxel side."""
    lesions: list[Ellipsoid] = []
    wanted = int(generator.integers(2, 7))
    for _ in range(100):
        mean = math.exp(generator.uniform(math.log(2.5), math.log(7.0))) * smallest_mm
        a, b, c = (float(mean * generator.uniform(0.75, 1.3)) for _ in range(3))
        half_axes = (a, b, max(c, 0.08 * extent_mm[2]))
        room = [max(extent / 2 - half - smallest_mm, 0.0) for extent, half in zip(extent_mm, half_axes, strict=True)]
        x, y, z = (float(generator.uniform(-r, r)) for r in room)
        apart = [math.dist((x, y, z), o.center_mm) - max(half_axes) - max(o.half_axes_mm) for o in lesions]
        if all(gap > 2 * smallest_mm for gap in apart):
            lesions.append(Ellipsoid((x, y, z), half_axes))
        if len(lesions) == wanted:
            break
    return lesions


def _texture(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Smooth noise over about 3 voxels, standard deviation 1."""
    field = ndimage.gaussian_filter(generator.normal(size=shape), (2.0, 2.0, 0.7))
    return field / max(float(field.std()), 1e-9)
