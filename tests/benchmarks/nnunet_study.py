"""Which 2D network segments the hippocampus better, nnU-Net's or a small soft-label U-Net of the same folds?"""

from softseg_dist import (
    BCE,
    Affine,
    Bids,
    Contrast,
    Dice,
    Gamma,
    KFold,
    Noise,
    Optim,
    Preprocess,
    Recipe,
    Softmax,
    Study,
    Sum,
    UNet,
)

OURS = Recipe(
    network=UNet(filters=(16, 32, 64)),
    activation=Softmax(),
    loss=Sum(terms=(Dice(), BCE()), weights=(1, 1)),
    augment=(Affine(degrees=15, scale=0.15, shift=0.05), Noise(), Contrast(), Gamma()),
    optim=Optim(lr=2e-3, epochs=12, batch_size=32),
)
STUDY = Study(
    name="nnunet_beside_ours",
    question="Which 2D network segments the hippocampus better, nnU-Net's or a small soft-label U-Net of the same folds?",
    data=Bids(
        "hippocampus_msd", image="T1w", labels={"anterior": "label-hippocampus_dseg:1", "posterior": "label-hippocampus_dseg:2"}
    ),
    preprocess=Preprocess(dim=2, spacing_mm=(1, 1), crop=(48, 64)),
    splits=KFold(folds=2),
    candidates={"ours": OURS},
    control="ours",
)
