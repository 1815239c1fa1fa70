"""Runs as processes: results, resumption, failures; and one real run on the digits."""

import json
import os
import signal
import time

import pytest
import torch

from gn_kernels.reproduce import runner
from gn_kernels.reproduce.matrix import Run
from gn_kernels.reproduce.runner import Job, execute, finished, result_path, run_all
from gn_kernels.robustness import Stage
from gn_kernels.training import InputError, Settings, loop
from tests.training.conftest import TINY


def _count(folder, observer):
    """Works in two stages; is told by a file to be interrupted between them."""
    done = folder / "first"
    if not done.exists():
        done.write_text("")
        if (folder.parent / "interrupt").exists():
            os.kill(os.getpid(), signal.SIGKILL)
    observer(Stage("second", 1, 1))
    return {"calls": 1}


def _fail(folder, observer):
    raise InputError("the disk is on fire")


def _wait(folder, observer):
    observer(Stage("waiting", 0, 1))
    time.sleep(600)


def _job(name, work, **plan):
    return Job(name, plan, work, 1.0)


@pytest.mark.slow
def test_a_failure_is_told_and_the_others_run(tmp_path):
    ended, stages = [], []
    jobs = [_job("bad", _fail), _job("good", _count)]
    errors = run_all(jobs, tmp_path, 2, lambda name, stage: stages.append(name), ended.append)
    assert errors == ["bad: the disk is on fire"]
    assert {one.name for one in ended} == {"bad", "good"}
    assert stages == ["good"]
    result = json.loads(result_path(tmp_path, "good").read_text())
    assert result["calls"] == 1
    assert not result_path(tmp_path, "bad").exists()
    # What is done is not done again.
    assert run_all(jobs[1:], tmp_path, 2, on_end=pytest.fail) == []


def test_a_result_of_another_plan_is_refused(tmp_path):
    result_path(tmp_path, "a").parent.mkdir()
    result_path(tmp_path, "a").write_text(json.dumps({"plan": {"settings": {"lr": 1.0}}}))
    assert finished(_job("a", _count, settings={"lr": 1.0}), tmp_path)
    assert not finished(_job("b", _count), tmp_path)
    with pytest.raises(InputError, match=r"another plan \(lr was 1.0, now 2.0\)"):
        finished(_job("a", _count, settings={"lr": 2.0}), tmp_path)
    result_path(tmp_path, "a").write_text('{"plan"')
    with pytest.raises(InputError, match="damaged"):
        finished(_job("a", _count), tmp_path)


@pytest.mark.slow
def test_a_killed_process_is_told_and_resumed(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "interrupt").write_text("")
    jobs = [_job("one", _count)]
    assert run_all(jobs, tmp_path, 1) == ["one: its process ended with status -9"]
    assert run_all(jobs, tmp_path, 1) == []


@pytest.mark.slow
def test_sigterm_ends_the_processes(tmp_path):
    pids = []

    def stop(name, stage):
        pids.extend(child.pid for child in runner.multiprocessing.active_children())
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted):
        run_all([_job("slow", _wait)], tmp_path, 1, stop)
    (pid,) = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture(scope="module")
def run():
    settings = Settings(**TINY, activation="gelu")
    return Run("gradnorm", settings, ("apgd-ce",), test_images=20, attacked_images=6)


def test_a_run_measures_its_model_and_goes_on_after_an_interruption(run, tmp_path):
    pytest.importorskip("pyautoattack")
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = execute(run, tmp_path / "whole", lambda stage: None)

    class StopError(Exception):
        pass

    def stop_at(stage_name):
        def observe(stage):
            if stage.name.startswith(stage_name):
                raise StopError

        return observe

    for stage_name in ("pgd", "apgd-ce", "linearity"):
        with pytest.raises(StopError):
            execute(run, tmp_path / "broken", stop_at(stage_name))
    stages = []
    broken = execute(run, tmp_path / "broken", lambda stage: stages.append(stage.name))
    assert "training" not in stages
    assert broken["training"]["steps"] == 21
    for result in (whole, broken):
        for part in ("pgd", "autoattack"):
            del result[part]["seconds"]
        del result["training"]
    assert broken == whole
    assert whole["pgd"]["images"] == 20
    assert whole["autoattack"]["images"] == 6
    assert whole["autoattack"]["robust_accuracy"] <= whole["autoattack"]["clean_accuracy"]
    assert whole["analyses"].keys() == {"gradients", "linearity", "edges"}
    json.dumps(whole, allow_nan=False)


def test_the_attacked_images_are_the_first_of_the_test_images():
    data = runner.load(Settings(**TINY))
    many, few = runner.test_images(data, 20), runner.test_images(data, 6)
    torch.testing.assert_close(many[:6][0], few[:][0], rtol=0, atol=0)
    assert len(set(few[:][1].tolist())) > 2
