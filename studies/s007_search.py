"""What does a search over loss, activation and augmentation find, if most candidates are dropped after a few splits?

Run:    softseg run studies/s007_search.py
Debug:  softseg run studies/s007_search.py --debug
Cost:   2 candidates and 20 trials x 10 splits, 151 of 220 fits of 4 s; on 2 busy cores 37 min
Result (old yardstick: prepared grid, soft Dice by DML, Henderson's test; not run again since):
        NormReLU with the soft Dice loss (DML, smooth .83), hard labels, an elastic augmentation and lr .009 (trial-014): test
        soft Dice .866 against .846 of the control hard-sigmoid-dice, difference +.020 (95 % interval of the crossed test -.001 to
        .041, p = .06, Holm-corrected over 21 comparisons .84), not shown. On the 6 held-out subjects, opened once for these two,
        .856 against .838: +.018 (-.000 to .037), p = .051. Five of the six highest ranked have a DML loss; 12 of 20 trials were
        given up after 3 to 9 of 10 splits, which saved 69 of 220 fits. The five worst predict 36 to 62 % too much volume.
        Parameters by their share of the variance of ranks: augmentation .31, lr .26, activation .25. The SoftSeg cell
        (soft-normrelu-wing) scores .748, with dead outputs in 10 % of the training samples at lr .01. n = 25 tested subjects, 10
        splits; 12 epochs, many fits not converged.
"""

from softseg_dist import (
    BCE,
    AdaptiveWing,
    Affine,
    BiasField,
    Brier,
    Dice,
    DiceSemimetric,
    Elastic,
    MonteCarlo,
    Noise,
    NormReLU,
    Optim,
    Phantom,
    Preprocess,
    Recipe,
    Search,
    Sigmoid,
    Study,
    UNet,
)

BASE = Recipe(
    network=UNet(filters=(8, 16, 32)),
    activation=Sigmoid(),
    loss=Dice(),
    label="hard",
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),),
    optim=Optim(lr=1e-2, epochs=12, batch_size=16),
)


def propose(trial):
    """Activation, then the losses that go with it and what belongs to each; one augmentation beside the affine one."""
    activation = {"sigmoid": Sigmoid(), "normrelu": NormReLU()}[trial.suggest_categorical("activation", ["sigmoid", "normrelu"])]
    kind = trial.suggest_categorical("loss", ["wing", "dml", "bce", "brier"])
    if kind == "wing":
        loss = AdaptiveWing(omega=trial.suggest_float("omega", 4, 20))
    elif kind == "dml":
        loss = DiceSemimetric(smooth=trial.suggest_float("smooth", 0.1, 10, log=True))
    else:
        loss = {"bce": BCE(), "brier": Brier()}[kind]
    more = {"none": (), "elastic": (Elastic(spacing_mm=6, std_mm=0.5),), "noise": (Noise(),), "bias": (BiasField(),)}
    return BASE.replace(
        activation=activation,
        loss=loss,
        label=trial.suggest_categorical("label", ["hard", "soft"]),
        augment=BASE.augment + more[trial.suggest_categorical("augment", list(more))],
        optim=BASE.optim.replace(lr=trial.suggest_float("lr", 1e-3, 3e-2, log=True)),
    )


STUDY = Study(
    name="s007_search",
    question="What does a search over loss, activation and augmentation find, if most candidates are dropped after a few splits?",
    data=Phantom(subjects=36),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=10),
    holdout=0.17,
    objective="dice_dml",
    candidates={
        "hard-sigmoid-dice": BASE,
        "soft-normrelu-wing": BASE.replace(label="soft", activation=NormReLU(), loss=AdaptiveWing()),
    },
    control="hard-sigmoid-dice",
    search=Search(propose, trials=20),
)
