"""Runs as processes of one thread each: several at a time, resumable, one JSON for each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import TensorDataset

from gn_kernels.backend import info
from gn_kernels.reproduce import cost
from gn_kernels.reproduce.matrix import MODELS, Budget, Run
from gn_kernels.robustness import Stage, evaluate
from gn_kernels.robustness.analyses import Options, analyse
from gn_kernels.training import Dataset, InputError, Training, checkpoint, load, loop

Observer = Callable[[Stage], None]

# Of each run, besides its accuracy: claim (e), and whether gradients lie on edges (d).
_ANALYSES = ("gradients", "linearity", "edges")
_PGD_STEPS = 20


class Job(NamedTuple):
    """Something to compute in a process of its own.

    Attributes:
        name: of the result's file.
        plan: all that decides the result, plain values.
        work: does it; picklable.
        seconds: about what it takes, for the time left.
    """

    name: str
    plan: dict[str, Any]
    work: Callable[[Path, Observer], dict[str, Any]]
    seconds: float


class Ended(NamedTuple):
    """A job that has ended: its result, or what was wrong. ``left`` jobs are not done yet."""

    name: str
    result: dict[str, Any] | None
    error: str | None
    left: int
    left_s: float


def all_jobs(runs: Sequence[Run], budget: Budget) -> tuple[list[Job], list[Job]]:
    """The costs of a step of each model, to be measured alone; and the runs."""
    trainings = [
        Job(run.name, plan_of(run), functools.partial(execute, run), run.seconds()) for run in runs
    ]
    costs = []
    for model in MODELS:
        run = next(
            run for run in runs if run.settings.model == model and run.settings.activation == "gelu"
        )
        plan = {**plan_of(run), "rounds": budget.cost_rounds}
        work = functools.partial(cost.measure, run, budget.cost_rounds)
        costs.append(Job(f"cost-{model}", plan, work, 1.5 * budget.cost_rounds + 30))
    return costs, trainings


def plan_of(run: Run) -> dict[str, Any]:
    """As it stands in the result. Where the data lies decides nothing."""
    plan = dataclasses.asdict(run)
    del plan["settings"]["data"]
    plain: dict[str, Any] = json.loads(json.dumps(plan))
    return plain


def execute(run: Run, folder: Path, observer: Observer) -> dict[str, Any]:
    """Train and measure, or go on where an earlier call was interrupted.

    Args:
        run: what to do.
        folder: of the run's checkpoint and of the unfinished measurement.
        observer: told of each step.

    Returns:
        Accuracy, analyses and times, plain values.
    """
    settings = run.settings
    data = load(settings)
    training = Training(settings, data)
    path = folder / loop.CHECKPOINT
    if checkpoint.exists(path):
        training.load_state(checkpoint.load(path))

    def observe(progress: loop.Progress) -> None:
        note = f"{progress.step_ms:.0f} ms, loss {progress.loss:.3f}"
        observer(Stage("training", progress.step, progress.total_steps, note))

    training.run(path, observe)
    model = training.trained()
    with loop.reproducible(settings):
        images = test_images(data, run.test_images)
        pgd = evaluate(
            model,
            images,
            eps_255=settings.attack_radius_255,
            attack_steps=_PGD_STEPS,
            restarts=1,
            check_gradients=False,
            progress_file=folder / "pgd",
            observer=observer,
        )
        attacked = evaluate(
            model,
            test_images(data, run.attacked_images),
            eps_255=settings.attack_radius_255,
            attacks=run.attacks,
            progress_file=folder / "autoattack",
            observer=observer,
        )
        analyses = analyse(
            model,
            images,
            _ANALYSES,
            Options(eps_255=settings.attack_radius_255),
            progress_file=folder / "analyses",
            observer=observer,
        )
    return {
        "pgd": pgd._asdict(),
        "autoattack": attacked._asdict(),
        "analyses": {name: found.summary for name, found in analyses.items()},
        "training": {
            "steps": training.step,
            "parameters": sum(p.numel() for p in model.parameters()),
            "step": training.timing()._asdict(),
            "history": training.history(),
            "swapped": str(training.swapped),
        },
        "dataset": data.summary(),
    }


def test_images(data: Dataset, count: int) -> TensorDataset:
    """The first of the test images in an order that is random but always the same."""
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    return TensorDataset(*data.test.batch(order[:count]))


def result_path(folder: Path, name: str) -> Path:
    """Where a job's result stands."""
    return folder / "results" / f"{name}.json"


def finished(job: Job, folder: Path) -> bool:
    """Whether the job's result is there.

    Raises:
        InputError: it is there, but of another plan.
    """
    path = result_path(folder, job.name)
    if not path.exists():
        return False
    try:
        theirs = json.loads(path.read_text())["plan"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged: delete it to compute it anew") from error
    if theirs != job.plan:
        raise InputError(
            f"{path} is the result of another plan ({_difference(theirs, job.plan)}): choose "
            "another --output, or delete the folder"
        )
    return True


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for name in ours:
        if theirs.get(name) != ours[name]:
            if isinstance(ours[name], dict) and isinstance(theirs.get(name), dict):
                return _difference(theirs[name], ours[name])
            return f"{name} was {theirs.get(name)}, now {ours[name]}"
    return "it has more settings"


def run_all(
    jobs: Sequence[Job],
    folder: Path,
    at_once: int,
    on_stage: Callable[[str, Stage], None] = lambda name, stage: None,
    on_end: Callable[[Ended], None] = lambda ended: None,
) -> list[str]:
    """Compute what is not there yet, in the jobs' order, ``at_once`` processes at a time.

    A job that fails does not keep the others from running. At SIGINT or SIGTERM the processes
    write their checkpoints and end; a second call goes on from there, as it does after kill -9.

    Returns:
        A sentence for each job that failed.

    Raises:
        InputError: a result of another plan is there.
        Interrupted: at SIGINT or SIGTERM.
    """
    waiting = [job for job in jobs if not finished(job, folder)]
    (folder / "results").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    working: dict[Connection, tuple[Job, Any, float]] = {}
    done_s, planned_s, errors = 0.0, 0.0, []
    with _signals_raise():
        try:
            while waiting or working:
                while waiting and len(working) < at_once:
                    job = waiting.pop(0)
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_child, args=(job, folder, theirs))
                    process.start()
                    theirs.close()
                    working[ours] = (job, process, time.perf_counter())
                for connection in wait(list(working)):
                    assert isinstance(connection, Connection)
                    job, process, start = working[connection]
                    try:
                        message = connection.recv()
                    except EOFError:
                        process.join()
                        message = f"its process ended with status {process.exitcode}"
                    if isinstance(message, Stage):
                        on_stage(job.name, message)
                        continue
                    process.join()
                    del working[connection]
                    result, error = None, None
                    if isinstance(message, str):
                        error = f"{job.name}: {message}"
                        errors.append(error)
                    else:
                        result = message
                        done_s += time.perf_counter() - start
                        planned_s += job.seconds
                    left = [*waiting, *(each for each, _, _ in working.values())]
                    pace = done_s / planned_s if planned_s else 1.0
                    left_s = pace * sum(each.seconds for each in left) / at_once
                    on_end(Ended(job.name, result, error, len(left), left_s))
        finally:
            for _, process, _ in working.values():
                process.terminate()
            for _, process, _ in working.values():
                process.join()
    return errors


def _child(job: Job, folder: Path, connection: Connection) -> None:
    """In its own process; ends with the parent, since the pipe breaks then."""
    start = time.perf_counter()
    work = folder / "runs" / job.name
    try:
        work.mkdir(parents=True, exist_ok=True)
        result = {
            "name": job.name,
            "plan": job.plan,
            "versions": loop.versions(),
            "machine": info(),
            **job.work(work, connection.send),
        }
        result["seconds"] = time.perf_counter() - start
        _write(result_path(folder, job.name), result)
        connection.send(result)
    except BrokenPipeError:
        return
    except (loop.Interrupted, KeyboardInterrupt):
        # Ctrl-C reaches all processes of a terminal.
        return
    except (InputError, ValueError, OSError) as error:
        with contextlib.suppress(BrokenPipeError):
            connection.send(str(error))


def _write(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM ends the wait for the processes as Ctrl-C does."""

    def stop(signum: int, frame: object) -> None:
        raise loop.Interrupted(signum, 0)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
