"""The paper's claims, measured anew: a matrix of runs, their figures, one report."""

from gn_kernels.reproduce.matrix import FULL, QUICK, Budget, Run, matrix
from gn_kernels.reproduce.report import write_report
from gn_kernels.reproduce.runner import Ended, Job, all_jobs, execute, run_all

__all__ = [
    "FULL",
    "QUICK",
    "Budget",
    "Ended",
    "Job",
    "Run",
    "all_jobs",
    "execute",
    "matrix",
    "run_all",
    "write_report",
]
