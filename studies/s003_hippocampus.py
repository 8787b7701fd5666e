"""Do true partial volumes, instead of rounded ones, make a better 3D segmentation of the hippocampus at 2 mm?

Run:    softseg run studies/s003_hippocampus.py --data-root DATA
Debug:  softseg run studies/s003_hippocampus.py --data-root DATA --debug
Cost:   2 candidates x 10 splits x 3 repeats = 60 fits of 45 s in bfloat16; 25 min on 2 idle cores, two fits at a time
Result: Not where the raters drew. At 1 mm the Brier skill is .746 with hard labels, the control, .738 with soft ones: -.008 (95 %
        interval -.012 to -.004, p < .001, crossed test; Wilcoxon over splits p = .002, corrected resampled t p = .03, bootstrap
        interval -.013 to -.004). On the grid of training, at 2 mm, soft labels seem better by .063: there the soft target is the
        yardstick. Part of the loss is scale: recalibrated on validation, soft has .756 and hard .743 (not tested). ECE .027 soft,
        .016 hard; Dice at the threshold from the grid .829 and .825; volume +3.3 % and -3.7 %. n = 106 tested subjects, 10 splits,
        240 pairs, each the mean of 3 repeats; one fixed learning rate for both; 6 and 2 of 30 fits not converged.

DATA holds hippocampus_msd: 120 T1-weighted crops at 1 mm with anterior and posterior masks. Averaging the masks over 2 mm voxels
gives each voxel its true share of tissue; the hard arm rounds that share, the soft arm keeps it. A map of shares that is brought
back to 1 mm by interpolation is flatter than the masks that were drawn there.
"""

from softseg_dist import Affine, Bids, DiceSemimetric, MonteCarlo, Optim, Preprocess, Recipe, Sigmoid, Study, UNet, factorial

BASE = Recipe(
    network=UNet(filters=(8, 16, 32), norm="instance"),
    activation=Sigmoid(),
    loss=DiceSemimetric(),
    augment=(Affine(degrees=10, scale=0.1, shift=0.03),),
    optim=Optim(lr=3e-3, epochs=40, batch_size=4),
)

STUDY = Study(
    name="s003_hippocampus",
    question="Do true partial volumes, instead of rounded ones, make a better 3D segmentation of the hippocampus at 2 mm?",
    data=Bids(
        "hippocampus_msd", image="T1w", labels={"anterior": "label-hippocampus_dseg:1", "posterior": "label-hippocampus_dseg:2"}
    ),
    preprocess=Preprocess(dim=3, spacing_mm=(2, 2, 2), crop=(24, 32, 24)),
    splits=MonteCarlo(count=10),
    repeats=3,
    candidates=factorial(BASE, label=("hard", "soft")),
    control="hard",
)
