"""How a model stands up to attacks, and pictures of its input gradients."""

from gn_kernels.robustness.attacks import fgsm, pgd
from gn_kernels.robustness.contour import contour_energy
from gn_kernels.robustness.evaluation import Evaluation, evaluate
from gn_kernels.robustness.figures import gradient_figure

__all__ = ["Evaluation", "contour_energy", "evaluate", "fgsm", "gradient_figure", "pgd"]
