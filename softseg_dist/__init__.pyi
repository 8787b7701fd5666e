"""The public names, for type checkers. Written from the table in `__init__.py`: do not edit."""

from softseg_dist.errors import UserError as UserError
from softseg_dist.frozen import Frozen as Frozen
from softseg_dist.data.cases import Case as Case
from softseg_dist.data.cases import CaseData as CaseData
from softseg_dist.data.cases import DataSet as DataSet
from softseg_dist.data.cases import ImageCase as ImageCase
from softseg_dist.data.cases import LabelledCase as LabelledCase
from softseg_dist.data.cases import MaskFile as MaskFile
from softseg_dist.data.layouts import Bids as Bids
from softseg_dist.data.phantom import Phantom as Phantom
from softseg_dist.data.preprocess import Preprocess as Preprocess
from softseg_dist.data.splits import KFold as KFold
from softseg_dist.data.splits import MonteCarlo as MonteCarlo
from softseg_dist.numerics.activations import Activation as Activation
from softseg_dist.numerics.activations import NormReLU as NormReLU
from softseg_dist.numerics.activations import Sigmoid as Sigmoid
from softseg_dist.numerics.activations import Softmax as Softmax
from softseg_dist.numerics.augmentation import Affine as Affine
from softseg_dist.numerics.augmentation import BiasField as BiasField
from softseg_dist.numerics.augmentation import Blur as Blur
from softseg_dist.numerics.augmentation import Contrast as Contrast
from softseg_dist.numerics.augmentation import Elastic as Elastic
from softseg_dist.numerics.augmentation import Flip as Flip
from softseg_dist.numerics.augmentation import Gamma as Gamma
from softseg_dist.numerics.augmentation import LowResolution as LowResolution
from softseg_dist.numerics.augmentation import Mixup as Mixup
from softseg_dist.numerics.augmentation import Noise as Noise
from softseg_dist.numerics.losses import BCE as BCE
from softseg_dist.numerics.losses import L1 as L1
from softseg_dist.numerics.losses import AdaptiveWing as AdaptiveWing
from softseg_dist.numerics.losses import BatchDice as BatchDice
from softseg_dist.numerics.losses import Brier as Brier
from softseg_dist.numerics.losses import Dice as Dice
from softseg_dist.numerics.losses import DiceSemimetric as DiceSemimetric
from softseg_dist.numerics.losses import Focal as Focal
from softseg_dist.numerics.losses import FocalTversky as FocalTversky
from softseg_dist.numerics.losses import GeneralizedDice as GeneralizedDice
from softseg_dist.numerics.losses import Huber as Huber
from softseg_dist.numerics.losses import JaccardMetric as JaccardMetric
from softseg_dist.numerics.losses import Loss as Loss
from softseg_dist.numerics.losses import Sum as Sum
from softseg_dist.numerics.losses import Tversky as Tversky
from softseg_dist.numerics.losses import TverskySemimetric as TverskySemimetric
from softseg_dist.numerics.networks import Network as Network
from softseg_dist.numerics.networks import UNet as UNet
from softseg_dist.numerics.patches import Patch as Patch
from softseg_dist.numerics.sampling import TTA as TTA
from softseg_dist.numerics.sampling import MCDropout as MCDropout
from softseg_dist.numerics.sampling import Uncertainty as Uncertainty
from softseg_dist.numerics.smoothing import SVLS as SVLS
from softseg_dist.numerics.smoothing import GeoLS as GeoLS
from softseg_dist.numerics.smoothing import Smoothing as Smoothing
from softseg_dist.numerics.smoothing import UniformSmoothing as UniformSmoothing
from softseg_dist.numerics.transforms import Augmentation as Augmentation
from softseg_dist.numerics.transforms import Intensity as Intensity
from softseg_dist.numerics.transforms import Invertible as Invertible
from softseg_dist.numerics.transforms import Pairing as Pairing
from softseg_dist.numerics.transforms import Spatial as Spatial
from softseg_dist.numerics.transforms import Straight as Straight
from softseg_dist.study import Optim as Optim
from softseg_dist.study import Race as Race
from softseg_dist.study import Recipe as Recipe
from softseg_dist.study import Resources as Resources
from softseg_dist.study import Search as Search
from softseg_dist.study import Study as Study
from softseg_dist.study import TuneEach as TuneEach
from softseg_dist.study import factorial as factorial

PUBLIC: dict[str, tuple[str, ...]]
__version__: str
NUMERICS: int
__all__: list[str]
