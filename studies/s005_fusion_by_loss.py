"""Which fusion of raters goes with which loss, if calibration counts beside accuracy?

Run:    softseg run studies/s005_fusion_by_loss.py
Debug:  softseg run studies/s005_fusion_by_loss.py --debug
Cost:   20 candidates x 6 splits = 120 fits of 6 s; 7 min on 2 cores, two fits at a time
Result (old yardstick: prepared grid, soft Dice by DML, Henderson's test; not run again since):
        The mean of the raters with the soft Dice loss (DML), the control, has the best soft Dice (.832) and all but the best
        calibration (ECE .029); only the mean with BCE is better calibrated (.026), at .805: these two are not dominated. With DML
        no other fusion was shown to differ in Dice (-.003 to -.005), but all nearly double the ECE (.053 to .056). Fusion depends
        on the loss: majority and both STAPLEs gain .014 to .015 over the mean with BCE where they lose .003 to .005 with DML
        (interactions .018 to .020, Holm-corrected p < .01), and draw 8 to 11 % more volume. Main effects on soft Dice, 95 %
        intervals: Adaptive Wing less DML -.041 (-.057 to -.026), Brier less DML -.058 (-.083 to -.033), BCE less DML -.016 (-.042
        to .009), soft_staple less mean +.007 (.002 to .013, p = .048). Dice of the mask cut at the grid's threshold is .878 to
        .884 for all twenty: the losses differ in how soft and how large their maps are, not in where they draw the object. n = 22
        tested subjects, 6 splits; 15 epochs at one fixed learning rate, many fits not converged.

Gray matter of known partial volume, drawn by four raters who disagree by half a voxel and more. All raters are kept apart until
the recipe fuses them; every candidate is measured against their mean, against each of them, and against the known truth.
"""

from softseg_dist import (
    BCE,
    AdaptiveWing,
    Affine,
    Brier,
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
    optim=Optim(lr=1e-2, epochs=15, batch_size=16),
)

STUDY = Study(
    name="s005_fusion_by_loss",
    question="Which fusion of raters goes with which loss, if calibration counts beside accuracy?",
    data=Phantom(subjects=30, disagreement_mm=0.5),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=6),
    objective="dice_dml",
    second_objective="ece",
    candidates=factorial(
        BASE,
        fusion=("mean", "majority", "staple", "soft_staple", "random_rater"),
        loss=(DiceSemimetric(smooth=1), AdaptiveWing(), BCE(), Brier()),
    ),
    control="mean-dml",
)
