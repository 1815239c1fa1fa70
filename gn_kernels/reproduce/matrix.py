"""What is trained and measured: each run as the settings of a training, in order of importance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from gn_kernels.training.settings import Settings

# All runs share one recipe, so that methods, activations and models differ in nothing else.
_RECIPE: dict[str, Any] = {
    "batch_size": 64,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "clip_norm": 1.0,
    "label_smoothing": 0.0,
    "weight_ce": 0.8,
    "weight_gradnorm": 1.2,
    "edge_weight": 1.0,
    "edge_weight_per_epoch": 0.0,
    "threads": 1,
}
# The share of the training in which the learning rate and the penalty rise to their full height.
_WARMUP, _RAMP = 0.1, 0.2

METHODS: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "fgsm": {"method": "adversarial", "pgd_steps": 1},
    "pgd-3": {"method": "adversarial", "pgd_steps": 3},
    "gradnorm": {"method": "gradnorm"},
    "edge": {"method": "edge"},
}
# The same with other weights of the two terms, which add up to 2 as in the authors' own sweep.
SWEEP: dict[str, dict[str, Any]] = {
    f"gradnorm-{penalty:g}": {**METHODS["gradnorm"], "weight_ce": ce, "weight_gradnorm": penalty}
    for ce, penalty in ((1.2, 0.8), (0.4, 1.6), (0.2, 1.8))
}
# eps is the field's custom: 8/255 for small grey images, 4/255 for photographs, as in the paper.
DATASETS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {"image_size": 28, "patch_size": 7, "eps_255": 8.0},
    "patches": {"image_size": 32, "patch_size": 8, "eps_255": 4.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"model": "vit", "embed_dim": 64, "depth": 6, "num_heads": 2},
    "resnet": {"model": "resnet", "embed_dim": 32, "depth": 2},
}

_ALL = tuple(METHODS)
_SMOOTHNESS = ("natural", "pgd-3", "gradnorm")
# (data set, model, activation, methods): the first for all seeds, then seed by seed.
_Row = tuple[str, str, str, tuple[str, ...]]
_HEADLINE: _Row = ("fashion-mnist", "vit", "gelu", ("gradnorm", "pgd-3"))
_ROWS: tuple[_Row, ...] = (
    ("fashion-mnist", "vit", "gelu", ("natural", "edge", "fgsm")),
    ("fashion-mnist", "resnet", "gelu", ("gradnorm", "pgd-3")),
    ("fashion-mnist", "resnet", "relu", ("gradnorm", "pgd-3")),
    ("fashion-mnist", "resnet", "silu", ("gradnorm", "pgd-3")),
    ("patches", "vit", "gelu", ("gradnorm", "pgd-3", "natural", "edge", "fgsm")),
    ("patches", "resnet", "gelu", ("gradnorm", "pgd-3")),
    ("patches", "resnet", "relu", ("gradnorm", "pgd-3")),
    ("patches", "resnet", "silu", ("gradnorm", "pgd-3")),
    ("fashion-mnist", "resnet", "gelu", ("natural", "edge", "fgsm")),
    ("patches", "resnet", "gelu", ("natural", "edge", "fgsm")),
    *((data, "resnet", act, ("natural",)) for data in DATASETS for act in ("relu", "silu")),
    ("patches", "vit", "gelu", tuple(SWEEP)),
    # On patches (0.8, 1.2) leaves the activations level: does a heavier penalty, too?
    *(("patches", "resnet", act, ("gradnorm-1.6",)) for act in ("gelu", "relu", "silu")),
)


class Budget(NamedTuple):
    """How much a run may spend.

    Attributes:
        train_images, epochs: for each data set; None for all images.
        test_images: for clean accuracy, accuracy under PGD and the analyses, the same for all.
        attacked_images: the first of these, for AutoAttack.
        standard: whether the headline's runs are measured with all four of AutoAttack's attacks
            instead of the first two.
        cost_rounds: repetitions of each step that is timed.
    """

    train_images: Mapping[str, int | None]
    epochs: Mapping[str, int]
    test_images: int
    attacked_images: int
    standard: bool
    cost_rounds: int


FULL = Budget(
    train_images={"fashion-mnist": 30_000, "patches": None},
    epochs={"fashion-mnist": 2, "patches": 12},
    test_images=1000,
    attacked_images=200,
    standard=True,
    cost_rounds=15,
)
QUICK = Budget(
    train_images={"fashion-mnist": 1_280, "patches": 1_280},
    epochs={"fashion-mnist": 2, "patches": 2},
    test_images=100,
    attacked_images=16,
    standard=False,
    cost_rounds=3,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and what is measured of it.

    Attributes:
        method: of ``METHODS`` or ``SWEEP``, the report's name of it.
        settings: of the training.
        attacks: of AutoAttack, on ``attacked_images``.
        test_images, attacked_images: as in :class:`Budget`.
    """

    method: str
    settings: Settings
    attacks: tuple[str, ...]
    test_images: int
    attacked_images: int

    @property
    def name(self) -> str:
        settings = self.settings
        return (
            "-".join((settings.dataset, settings.model, str(settings.activation), self.method))
            + f"-{settings.seed}"
        )

    def seconds(self) -> float:
        """About what it takes on one core: only the proportions matter, for the time left."""
        settings = self.settings
        images = settings.train_images or _PATCHES
        steps = settings.epochs * images / settings.batch_size
        standing = _STANDING.get(self.method, 0.75) * self.attacked_images
        attack = 10 + standing * (2.0 if self.attacks == ("autoattack",) else 0.5)
        model = 1.0 if settings.model == "vit" else 0.85
        return 10 + model * (steps * _STEP_S[self.method] + attack + 0.03 * self.test_images)


# Of a step of the ViT on one core, measured once on an AVX-512 machine; the share of images that
# stand most of an attack; the number of patches of twelve photographs.
_STEP_S = {"natural": 0.05, "fgsm": 0.1, "pgd-3": 0.18, "gradnorm": 0.11, "edge": 0.12}
_STEP_S |= dict.fromkeys(SWEEP, _STEP_S["gradnorm"])
_STANDING = {"natural": 0.3, "edge": 0.5}
_PATCHES = 4_800


def matrix(
    budget: Budget = FULL,
    seeds: int = 3,
    data: Mapping[str, str | None] | None = None,
    validate: bool = False,
) -> list[Run]:
    """All runs, the most important first.

    Args:
        budget: of each run.
        seeds: how many, from 0; 1000 and on with ``validate``.
        data: the folder of each data set; None for the usual place.
        validate: measure on images that are held out of the training images, as the settings above
            were chosen, instead of the test images.
    """
    numbers = range(1000, 1000 + seeds) if validate else range(seeds)
    cells = [(_HEADLINE, seed) for seed in numbers]
    cells += [(row, seed) for seed in numbers for row in _ROWS]
    return [
        _run(dataset, model, activation, method, seed, budget, data or {}, validate)
        for (dataset, model, activation, methods), seed in cells
        for method in methods
    ]


def _run(
    dataset: str,
    model: str,
    activation: str,
    method: str,
    seed: int,
    budget: Budget,
    data: Mapping[str, str | None],
    validate: bool,
) -> Run:
    epochs = budget.epochs[dataset]
    settings = Settings(
        dataset=dataset,
        data=data.get(dataset),
        activation=activation,
        seed=seed,
        epochs=epochs,
        warmup_epochs=_WARMUP * epochs,
        ramp_per_epoch=1 / (_RAMP * epochs),
        train_images=budget.train_images[dataset],
        validate=validate,
        **(_RECIPE | DATASETS[dataset] | MODELS[model] | {**METHODS, **SWEEP}[method]),
    )
    headline = (dataset, model, activation) == _HEADLINE[:3] and method in _HEADLINE[3]
    attacks = ("autoattack",) if headline and budget.standard else ("autoattack-quick",)
    return Run(method, settings, attacks, budget.test_images, budget.attacked_images)
