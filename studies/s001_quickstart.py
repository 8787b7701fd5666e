"""Which of SoftSeg's three changes (soft labels, NormReLU, Adaptive Wing loss) matters on a phantom with known truth?

Run:    softseg demo      (the same study: softseg run studies/s001_quickstart.py, make demo)
Debug:  softseg demo --debug
Cost:   8 candidates x 6 splits = 48 fits of 4 s; 2 min on 2 cores, two fits at a time
Result (old yardstick: prepared grid, soft Dice by DML, Henderson's test; not run again since):
        No arm was shown to beat the control hard-sigmoid-dice on soft Dice (DML form), .849. Main effects, with 95 % intervals of
        the crossed test and Holm-corrected p: NormReLU +.030 (.010 to .049), p = .010; soft labels -.013 (-.015 to -.010),
        p < .001; Adaptive Wing -.030 (-.037 to -.024), p < .001. Calibration goes the other way: the lowest Brier score is that of
        soft-sigmoid-wing, .0049 against the control's .0058. n = 22 tested subjects, 6 splits, in bfloat16. After 12 epochs at one
        learning rate many fits have not converged, and sigmoid arms with Adaptive Wing still draw 20 % too much volume: a
        demonstration, not a verdict.
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
    candidates=factorial(BASE, label=("hard", "soft"), activation=(Sigmoid(), NormReLU()), loss=(Dice(), AdaptiveWing())),
    control="hard-sigmoid-dice",
)
