"""Does soft training beat binary training on spinal cord gray matter?

Run:    softseg run studies/s002_gray_matter.py --data-root DATA
Debug:  softseg run studies/s002_gray_matter.py --data-root DATA --debug
Cost:   8 candidates x 6 splits = 48 fits of 1.4 min; 35 min on 2 cores, two fits at a time
Result (old yardstick: prepared grid, soft Dice by DML, Henderson's test; not run again since):
        No arm was shown to differ from the control hard-sigmoid-dice (soft Dice .565). Main effects on test soft Dice (DML form),
        95 % intervals of the crossed test, Holm-corrected p: soft instead of hard labels +.030 (-.095 to .154), p = .83; NormReLU
        instead of sigmoid -.047 (-.171 to .078), p = .83; Adaptive Wing instead of Dice -.140 (-.313 to .033), p = .27. Highest
        ranked: soft-normrelu-dice, .595, +.030 over the control (-.060 to .121), p = 1.0. n = 5 tested people in 6 splits: far too
        few to settle the question; sub-9669, unlike the others in contrast and slice thickness, is nearly missed by every arm.
        NormReLU with Adaptive Wing died (output 0 everywhere) in 3 of 12 fits at this learning rate.

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
