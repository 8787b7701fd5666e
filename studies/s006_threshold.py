"""Where should a soft prediction be cut: at 0.5, at the best of a grid on validation, or at D*/2, and what does that do to volume?

Run:    softseg run studies/s006_threshold.py
Debug:  softseg run studies/s006_threshold.py --debug
Cost:   3 candidates x 10 splits = 30 fits; 35 min on 2 cores busy with much else
Result (old yardstick: prepared grid, soft Dice by DML, Henderson's test; not run again since):
        It depends on the loss. At 0.5 the maps of BCE and Adaptive Wing are cut far too small: Dice .580 and .606, volume -42 %
        and -39 %. The grid (mean threshold .30 and .31) gains .073 (95 % interval .032 to .115, Holm-corrected p = .012) and .060
        (.030 to .090, p = .005), volume -3 % and -1 %; D*/2, which needs no labels (.28 and .27), gains as much: .072 and .053
        over 0.5, and was not shown to differ from the grid (-.001 and -.007). With DML, whose maps are nearly binary, nothing is
        gained (+.005 and -.001), and D*/2 (.35) is where calibration fails: volume +32 %. Best Dice at the grid: wing .666, bce
        .653, dml .635, though dml leads in soft Dice (.589, .534 and .520). n = 24 tested subjects, 10 splits, 60 pairs; Holm
        over 9 tests for these differences.
"""

from softseg_dist import (
    BCE,
    AdaptiveWing,
    Affine,
    DiceSemimetric,
    MonteCarlo,
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
    activation=Sigmoid(),
    label="soft",
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),),
    optim=Optim(lr=1e-2, epochs=20, batch_size=16),
)

STUDY = Study(
    name="s006_threshold",
    question="Where should a soft prediction be cut: at 0.5, at the best of a grid on validation, or at D*/2, "
    "and what does that do to volume?",
    data=Phantom(shape="lesions", subjects=30, disagreement_mm=0.75),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=10),
    objective="dice_dml",
    candidates=factorial(BASE, loss=(BCE(), DiceSemimetric(smooth=1), AdaptiveWing())),
    control="bce",
)
