"""Which of SoftSeg's three changes (soft labels, NormReLU, Adaptive Wing loss) matters on a phantom with known truth?

Run:    softseg run studies/s001_quickstart.py          (or: make demo)
Debug:  softseg run studies/s001_quickstart.py --debug
Cost:   8 candidates x 6 splits = 48 fits
Result: (filled in after the run)
"""

from softseg_dist import (
    AdaptiveWing,
    Affine,
    Dice,
    MonteCarlo,
    NormReLU,
    Optim,
    Phantom,
    Preprocess,
    Recipe,
    Sigmoid,
    Study,
    UNet,
    factorial,
)

BASE = Recipe(
    network=UNet(filters=(8, 16, 32)),
    label="hard",
    fusion="mean",
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),),
    optim=Optim(lr=1e-2, epochs=12, batch_size=16),
)

STUDY = Study(
    name="s001_quickstart",
    question="Which of SoftSeg's three changes (soft labels, NormReLU, Adaptive Wing loss) matters on a phantom with known truth?",
    data=Phantom(subjects=30),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=6),
    objective="dice_dml",
    candidates=factorial(
        BASE, label=("hard", "soft"), activation=(Sigmoid(), NormReLU()), loss=(Dice(), AdaptiveWing())
    ),
    control="hard-sigmoid-dice",
)
