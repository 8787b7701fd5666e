"""Where does the gain of soft labels come from: from soft values, from not rounding again and again, or from which raters count?

Run:    softseg run studies/s004_where_the_gain_comes_from.py
Debug:  softseg run studies/s004_where_the_gain_comes_from.py --debug
Cost:   6 candidates x 10 splits = 60 fits of 6 s on an idle core
Result: From soft values, and from which raters count; rounding again and again was not shown to cost anything. Main effects on
        Brier skill, 95 % intervals of the crossed test, Holm-corrected p: soft less hard +.036 (.007 to .065), p = .040; hard_each
        less hard +.002 (-.025 to .030), p = .86; intersection of the raters less their mean -.044 (-.072 to -.015), p = .017.
        Brier skill is .762 mean-soft, .731 mean-hard (the control), .704 intersection-soft, .701 mean-hard_each, .689
        intersection-hard_each, .655 intersection-hard. No candidate alone was shown to beat the control (mean-soft +.030, -.005 to
        .066, p = .25). The intersection loses 6 to 22 % of the soft volume; of the lesions that it predicts 35 to 39 % meet no true
        one, with the mean 24 to 27 %. Recalibrated, mean-soft has .752 and mean-hard .743: most of that difference was a matter of
        scale. On the grid of training intersection-soft is better than mean-hard, on the files' own it is worse. n = 24 tested
        subjects, 10 splits, 60 pairs; one fixed learning rate.

Lesions of known partial volume, drawn by four raters, resampled to another grid and turned by augmentation, as in practice. "hard"
rounds once, at the end; "hard_each" rounds after every step; "soft" never rounds. The authors' code floored the mean of the raters,
so that a voxel counted only where all agree: that is the fusion "intersection". An earlier form of this study took both together
and blamed rounding for what the intersection does.
"""

from softseg_dist import Affine, DiceSemimetric, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Sigmoid, Study, UNet, factorial

BASE = Recipe(
    network=UNet(filters=(8, 16, 32)),
    activation=Sigmoid(),
    loss=DiceSemimetric(smooth=1),
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),),
    optim=Optim(lr=1e-2, epochs=20, batch_size=16),
)

STUDY = Study(
    name="s004_where_the_gain_comes_from",
    question="Where does the gain of soft labels come from: soft values, not rounding again and again, or which raters count?",
    data=Phantom(shape="lesions", subjects=30, disagreement_mm=0.4),
    preprocess=Preprocess(dim=2, spacing_mm=(0.75, 0.75), crop=(32, 32)),
    splits=MonteCarlo(count=10),
    candidates=factorial(BASE, fusion=("mean", "intersection"), label=("hard", "hard_each", "soft")),
    control="mean-hard",
)
