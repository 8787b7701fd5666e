"""Does soft training beat binary training on spinal cord gray matter?

Run:    softseg run studies/s002_gray_matter.py --data-root DATA
Debug:  softseg run studies/s002_gray_matter.py --data-root DATA --debug
Cost:   8 candidates x 6 splits = 48 fits of 1 min; 30 min on 2 cores, two fits at a time
Result: No arm was shown to differ from the control hard-sigmoid-dice, Brier skill .539 (a map that is 0 everywhere has .028). Main
        effects, 95 % intervals of the crossed test, Holm-corrected p: NormReLU less sigmoid -.121 (-.244 to .002), p = .16; soft
        less hard labels -.040 (-.115 to .035), p = .42; Adaptive Wing less Dice -.034 (-.140 to .071), p = .42. Highest ranked on
        validation: soft-sigmoid-wing, .578 on test, +.039 over the control (-.024 to .102), p = .81; it draws 64 % too much volume.
        n = 5 tested people in 6 splits: far too few to settle the question; sub-9669, unlike the others in contrast and slice
        thickness, is missed by both (-.16 and -.22). With NormReLU and Adaptive Wing 14 to 15 % of the training samples gave an
        output of 0 everywhere at this learning rate.

DATA holds gm_challenge: T2*-weighted spinal cord, 8 sessions of 6 people at 6 sites, one rater. Sessions of one person stay
together. The masks are binary; resampling them to 0.5 mm in plane makes them soft at their borders, which is where SoftSeg's
soft labels come from when there is one rater.
"""

from softseg_dist import (
    AdaptiveWing,
    Affine,
    Bids,
    Dice,
    MonteCarlo,
    NormReLU,
    Optim,
    Preprocess,
    Recipe,
    Sigmoid,
    Study,
    UNet,
    factorial,
)

BASE = Recipe(
    network=UNet(filters=(8, 16, 32, 64)),
    label="hard",
    fusion="mean",
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),),
    optim=Optim(lr=1e-3, epochs=40, batch_size=8),
)

STUDY = Study(
    name="s002_gray_matter",
    question="Does soft training beat binary training on spinal cord gray matter?",
    data=Bids("gm_challenge", image="T2starw", labels={"GM": "gmseg-manual"}, person=r"sub-(\d+)"),
    preprocess=Preprocess(dim=2, spacing_mm=(0.5, 0.5), crop=(96, 96), center="seg-manual"),
    splits=MonteCarlo(count=6),
    candidates=factorial(BASE, label=("hard", "soft"), activation=(Sigmoid(), NormReLU()), loss=(Dice(), AdaptiveWing())),
    control="hard-sigmoid-dice",
)
