"""``gn-kernels reproduce``."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gn_kernels.cli.common import positive
from gn_kernels.training.settings import InputError

if TYPE_CHECKING:
    from gn_kernels.cli import Commands
    from gn_kernels.reproduce.runner import Ended, Job
    from gn_kernels.robustness import Stage

_NEEDED = ("matplotlib", "pyautoattack", "rich", "sklearn", "timm", "torchvision")


def add_to(commands: Commands) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="train, attack and measure what the paper claims, and write a report",
        description="Train a ViT and a ResNet on Fashion-MNIST and on colour patches, naturally, "
        "adversarially (FGSM, PGD-3), with the gradient norm and with edge regularisation, measure "
        "them with AutoAttack, and put each claim of the paper beside what was measured. Runs are "
        "processes of one thread; the same command goes on after an interruption. Writes "
        "results/*.json, report.md and report.html.",
    )
    reproduce.set_defaults(command=_reproduce)
    reproduce.add_argument(
        "--quick",
        action="store_true",
        help="one seed, a twentieth of the steps, few images: shows that everything works, no "
        "figures to quote",
    )
    reproduce.add_argument(
        "--only",
        metavar="PATTERNS",
        help="of the runs' names, separated by commas, as 'fashion-mnist-vit-*,cost-*'; 'report' "
        "for none, only the report; --list shows the names",
    )
    reproduce.add_argument("--list", action="store_true", help="show the runs' names and stop")
    reproduce.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help="repetitions with seeds 0 to N - 1 (3; quick: 1)",
    )
    reproduce.add_argument(
        "--output", metavar="DIR", help="where to write (runs/reproduce, runs/reproduce-quick)"
    )
    reproduce.add_argument(
        "--jobs", type=positive, default=2, metavar="N", help="processes at a time (2)"
    )
    reproduce.add_argument(
        "--fashion-mnist", metavar="DIR", help="folder of its four files (Debian's package's)"
    )
    reproduce.add_argument(
        "--photographs",
        metavar="DIR",
        help="folder of the photographs that patches are cut from (Debian's mate-backgrounds)",
    )
    reproduce.add_argument(
        "--validate",
        action="store_true",
        help="seeds from 1000, measured on images held out of the training images: how the "
        "settings were chosen",
    )


def _reproduce(options: dict[str, Any]) -> int:
    for name in _NEEDED:
        __import__(name)  # what is missing is told before the training, not after it
    from gn_kernels.reproduce import FULL, QUICK, all_jobs, matrix, run_all, write_report

    quick = options["quick"]
    suffix = ("-quick" if quick else "") + ("-validate" if options["validate"] else "")
    folder = Path(options["output"] or f"runs/reproduce{suffix}")
    runs = matrix(
        QUICK if quick else FULL,
        options["seeds"] or (1 if quick else 3),
        {"fashion-mnist": options["fashion_mnist"], "patches": options["photographs"]},
        options["validate"],
    )
    costs, trainings = all_jobs(runs, QUICK if quick else FULL)
    chosen = _chosen([*costs, *trainings], options["only"])
    if options["list"]:
        print("\n".join(job.name for job in chosen))
        return 0
    errors = []
    # Times are measured while nothing else of this command runs.
    for jobs, at_once in ((costs, 1), (trainings, options["jobs"])):
        jobs = [job for job in jobs if job in chosen]
        if jobs:
            try:
                with _progress(len(jobs)) as (on_stage, on_end):
                    errors += run_all(jobs, folder, at_once, on_stage, on_end)
            except KeyboardInterrupt as error:
                error.args = (f"a signal; what is done is in {folder}, the same command goes on",)
                raise
    command = "gn-kernels reproduce" + " --quick" * quick + " --validate" * options["validate"]
    for path in write_report(folder, [job.name for job in (*costs, *trainings)], command):
        print(f"Written: {path}")
    if errors:
        raise InputError(
            f"{len(errors)} of {len(chosen)} runs failed, the report is without them: {errors[0]}"
        )
    return 0


def _chosen(jobs: Sequence[Job], only: str | None) -> list[Job]:
    if only is None:
        return list(jobs)
    if only == "report":
        return []
    chosen = set()
    names = [job.name for job in jobs]
    for pattern in only.split(","):
        matching = fnmatch.filter(names, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, names, 1, 0)
            raise InputError(f"no run is named {pattern!r}; the nearest is {near[0]}")
        chosen.update(matching)
    return [job for job in jobs if job.name in chosen]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar for all runs and one for each process in a terminal; else a line for each run."""

    def line(ended: Ended) -> str:
        if ended.error is not None:
            return f"failed: {ended.error}"
        return f"{ended.name}: {_figures(ended.result or {})}{_left(ended)}"

    if not sys.stdout.isatty():
        yield lambda name, stage: None, lambda ended: print(line(ended), flush=True)
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    with rich.Progress(*columns) as bars:
        runs = bars.add_task("runs", total=total, note="")
        tasks: dict[str, Any] = {}

        def on_stage(name: str, stage: Stage) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, note="")
            bars.update(
                tasks[name],
                total=stage.total,
                completed=stage.done,
                note=f"{stage.name} {stage.note}",
            )

        def on_end(ended: Ended) -> None:
            if ended.name in tasks:
                bars.remove_task(tasks.pop(ended.name))
            bars.console.print(line(ended), highlight=False)
            bars.update(runs, completed=total - ended.left)

        yield on_stage, on_end


def _figures(result: dict[str, Any]) -> str:
    seconds = f"{result['seconds']:.0f} s"
    if "pgd" not in result:
        return seconds
    clean, attacked = result["pgd"]["clean_accuracy"], result["autoattack"]["robust_accuracy"]
    return f"clean {clean:.1%}, {'+'.join(result['plan']['attacks'])} {attacked:.1%}, {seconds}"


def _left(ended: Ended) -> str:
    if not ended.left:
        return ""
    minutes = round(ended.left_s / 60)
    return f"; {ended.left} left, about {minutes // 60} h {minutes % 60:02d} min"
