"""A data set is a number of cases; a case is one image with its raters' masks.

Legend: C image channels, R raters, K classes, X Y Z canonical (RAS+) voxel axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softseg_dist.data.file_digests import Digest, sha256_of
from softseg_dist.data.geometry import Affine4, Geometry
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen

Float32 = NDArray[np.float32]

SINGLE_RATER = "rater"  # the name of the only rater where the data name none


@dataclass(frozen=True, eq=False)
class CaseData:
    """The voxels of a case, as on disk apart from the axis order.

    `image` [C X Y Z]; `raters` [R K X Y Z] in [0, 1]; `truth` [K X Y Z] in [0, 1] where it is known (phantoms), else
    None; `affine` [4 4] canonical index -> mm; `geometry` of the image file as stored.
    """

    image: Float32
    raters: Float32
    truth: Float32 | None
    affine: Affine4
    geometry: Geometry


class Case(ABC):
    """One image with its raters' masks; nothing is read before `load`.

    `name` is unique in the data set, `subject` is the person (several cases may share it), `site` may be "".
    """

    name: str
    subject: str
    site: str
    rater_names: tuple[str, ...]

    @abstractmethod
    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        """One line per source that determines the content, such as "name sha256"; equal lines mean equal voxels.

        `parts` names further masks that are used, `sha256` gives the digest of a file. Raises UserError if a source cannot be
        read.
        """

    @abstractmethod
    def load(self) -> CaseData:
        """The voxels. Raises UserError naming the file that is missing, broken or does not fit the others."""

    @abstractmethod
    def mask(self, part: str) -> Float32:
        """The mask [X Y Z] named `part`, on the grid of the image: it centres the crop. Raises UserError if none is."""

    def missing(self) -> tuple[str, ...]:
        """What this case lacks, one sentence each; () if it is complete. Nothing is read."""
        return ()


class DataSet(Frozen, ABC):
    """Where cases come from, and what is labelled in them."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The K labelled classes, in the order of the label axis."""

    @property
    @abstractmethod
    def rater_names(self) -> tuple[str, ...] | None:
        """The raters, or None if they are known only when the files are seen."""

    @abstractmethod
    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        """All cases, incomplete ones too, sorted by name.

        Raises UserError if the folder is missing, empty, or has nothing of what is asked for.
        """

    def cases(self, data_root: Path | None) -> tuple[Case, ...]:
        """All cases, sorted by name. Raises UserError as `scan` does, and at the first case that lacks something."""
        cases = self.scan(data_root)
        for case in cases:
            if lacks := case.missing():
                raise UserError(lacks[0])
        return cases
