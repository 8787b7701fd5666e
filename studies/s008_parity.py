"""Does SoftSeg beat conventional training on spinal cord gray matter, both as their authors' code trained them?

Run:    softseg run studies/s008_parity.py --data-root DATA
Debug:  softseg run studies/s008_parity.py --data-root DATA --debug
Cost:   2 candidates x 6 splits = 12 fits of 200 epochs, about 1,400 steps of 11 s on one core: for a GPU; --debug takes minutes
Result: Not run yet.

DATA holds gm_challenge: T2*-weighted spinal cord, 8 sessions of 6 people at 6 sites, one rater. The paper had four raters, of whom
its code drew one per item; here there is nothing to draw, so labels are soft where resampling and augmentation make them so. All
else is `softseg_parity`, whose docstring names what is not known about the authors' code. s002 asks the same of our own defaults.
"""

from softseg_dist import Bids, MonteCarlo, Preprocess, Study, softseg_parity

STUDY = Study(
    name="s008_parity",
    question="Does SoftSeg beat conventional training on spinal cord gray matter, both as their authors' code trained them?",
    data=Bids("gm_challenge", image="T2starw", labels={"GM": "gmseg-manual"}, person=r"sub-(\d+)"),
    preprocess=Preprocess(dim=2, spacing_mm=(0.5, 0.5), crop=(128, 128), center="seg-manual"),
    splits=MonteCarlo(count=6),
    candidates=softseg_parity(fusion="mean"),
    control="conventional",
)
