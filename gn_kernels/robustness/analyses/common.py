"""What every analysis takes and gives."""

from __future__ import annotations

import dataclasses

from torch import Tensor

# Figures of each image by their name, the first dimension the images.
Columns = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings that analyses share; an analysis reads those that its docstring names.

    Attributes:
        eps_255: radius of attacks and of random neighbours, in 1/255 (the paper: 4).
        power_iterations: of the curvature.
        curve_steps: of PGD in the robustness curve.
        seed: of everything random.
    """

    eps_255: float = 4.0
    power_iterations: int = 20
    curve_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eps_255 > 0 or min(self.power_iterations, self.curve_steps) < 1:
            raise ValueError(
                "eps_255 must be above 0, power_iterations and curve_steps at least 1, but got "
                f"{self.eps_255}, {self.power_iterations} and {self.curve_steps}"
            )


def mean_of(values: Tensor) -> float | None:
    """The mean in float64; None of nothing."""
    return values.double().mean().item() if len(values) else None


def spread(values: Tensor) -> dict[str, float | None]:
    """Mean, standard deviation, median, and the mean of log₁₀ over what is above 0."""
    values = values.double()
    positive = values[values > 0]
    return {
        "mean": mean_of(values),
        "std": values.std().item() if len(values) > 1 else None,
        "median": values.median().item() if len(values) else None,
        "log10_mean": mean_of(positive.log10()),
    }
