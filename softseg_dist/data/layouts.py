"""Every data set that a study file can name: importing this module is enough to read any of them back from JSON."""

from __future__ import annotations

from softseg_dist.data.bids import Bids
from softseg_dist.data.dataset import Case, CaseData, DataSet
from softseg_dist.data.file_cases import ImageCase
from softseg_dist.data.phantom import Phantom

__all__ = ["Bids", "Case", "CaseData", "DataSet", "ImageCase", "Phantom"]
