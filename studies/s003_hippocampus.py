"""Do true partial volumes, instead of rounded ones, make a better 3D segmentation of the hippocampus at 2 mm?

Run:    softseg run studies/s003_hippocampus.py --data-root DATA
Debug:  softseg run studies/s003_hippocampus.py --data-root DATA --debug
Cost:   2 candidates x 10 splits = 20 fits
Result: (filled in after the run)

DATA holds hippocampus_msd: 120 T1-weighted crops at 1 mm with anterior and posterior masks. Averaging the masks over 2 mm voxels
gives each voxel its true share of tissue; the hard arm rounds that share, the soft arm keeps it.
"""

from softseg_dist import (
    Affine,
    Bids,
    DiceSemimetric,
    MonteCarlo,
    Optim,
    Preprocess,
    Recipe,
    Sigmoid,
    Study,
    UNet,
    factorial,
)

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
        "hippocampus_msd",
        image="T1w",
        labels={"anterior": "label-hippocampus_dseg:1", "posterior": "label-hippocampus_dseg:2"},
    ),
    preprocess=Preprocess(dim=3, spacing_mm=(2, 2, 2), crop=(24, 32, 24), label_resampling="area"),
    splits=MonteCarlo(count=10),
    objective="dice_dml",
    candidates=factorial(BASE, label=("hard", "soft")),
    control="hard",
)
