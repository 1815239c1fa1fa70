"""How a model stands up to attacks, and what its input gradients look like."""

from gn_kernels.robustness.attacks import fgsm, pgd
from gn_kernels.robustness.contour import contour_energy
from gn_kernels.robustness.differentiate import NotDifferentiableError
from gn_kernels.robustness.evaluation import ATTACKS, SUITES, Evaluation, evaluate
from gn_kernels.robustness.figures import gradient_figure
from gn_kernels.robustness.resume import Stage

__all__ = [
    "ATTACKS",
    "SUITES",
    "Evaluation",
    "NotDifferentiableError",
    "Stage",
    "contour_energy",
    "evaluate",
    "fgsm",
    "gradient_figure",
    "pgd",
]
