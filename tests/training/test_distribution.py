"""Two processes on gloo: the same weights as one, checkpoints across, and what goes wrong."""

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from gn_kernels.training import InputError, Settings, Training, checkpoint, distribution, load
from gn_kernels.training.loop import Interrupted, load_weights, settings_of
from tests.training.conftest import TINY, environment

# 21 steps of two blocks. SGD: AdamW divides by the root of a gradient's square, and makes a step of
# the same length of a gradient that is nothing but rounding.
COMMON = {**TINY, "depth": 2, "optimizer": "sgd", "lr": 0.2, "edge_weight": 5.0}
METHODS = ("gradnorm", "adversarial", "edge")
# Everything that draws, and everything that a checkpoint must hold.
RICH = {
    **COMMON,
    "optimizer": "adamw",
    "lr": 6e-3,
    "accumulate_steps": 2,
    "ema_decay": 0.9,
    "mixup": 0.8,
    "cutmix": 1.0,
    "flip": 0.5,
    "random_start_255": 8.0,
}


def _torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*command, "--master-port", "0", "--standalone", *map(str, arguments)]


def _trained(settings, state=None):
    training = Training(Settings(**settings), load(Settings(**settings)))
    start = {name: x.clone() for name, x in training.model.state_dict().items()}
    if state is not None:
        training.load_state(state)
    training.run()
    return training, start


def _stopped(settings, path, step):
    """A checkpoint of one process after ``step`` steps."""
    training = Training(Settings(**settings), load(Settings(**settings)))

    def observer(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        training.run(path, observer)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder with what the jobs of two processes left."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("processes")
    jobs = [
        {
            "settings": {**COMMON, "method": method, "distributed": engine},
            "weights": f"{method}-{engine}",
        }
        for method in METHODS
        for engine in ("ddp", "fsdp2")
    ]
    for engine in ("ddp", "fsdp2"):
        rich = {**RICH, "distributed": engine}
        jobs += [
            {"settings": rich, "weights": f"rich-{engine}"},
            {
                "settings": rich,
                "checkpoint": f"stopped-{engine}.pt",
                "stop": 10,
                "errors": f"stopped-{engine}",
            },
            {
                "settings": rich,
                "resume": f"stopped-{engine}.pt",
                "weights": f"continued-{engine}",
            },
            {"settings": rich, "resume": "one.pt", "weights": f"one-{engine}"},
        ]
    ddp = {**COMMON, "distributed": "ddp"}
    jobs += [
        {"settings": ddp, "resume": "old.pt", "errors": "old"},
        {"settings": COMMON, "errors": "none"},
        {"settings": {**ddp, "batch_size": 201}, "errors": "odd"},
        {"settings": ddp, "seeds": [0, 1], "errors": "seeds"},
        {"settings": {**ddp, "distributed": "fsdp2", "precision": "float16"}, "errors": "float16"},
    ]
    for job in jobs:
        for name in ("weights", "checkpoint", "resume", "errors"):
            if name in job:
                job[name] = str(folder / job[name])
    _stopped(RICH, folder / "one.pt", 10)
    _stopped(COMMON, folder / "old.pt", 10)
    state = torch.load(folder / "old.pt")
    tensors = state.pop("tensors")
    model = {
        name.removeprefix("model:"): x for name, x in tensors.items() if name.startswith("model:")
    }
    state |= {"format": checkpoint.FORMAT_1, "model": model, "record": tensors["record:"]}
    torch.save({**state, "optimizer": {"state": {}, "param_groups": []}}, folder / "old.pt")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = _torchrun(Path(__file__).with_name("processes.py"), folder / "jobs.json")
    subprocess.run(command, env=environment(), check=True, timeout=300)
    torch.set_num_threads(threads)
    return folder


def _distance(weights, expected, start):
    """‖w − w′‖ in units of the way that training went."""
    difference = sum((weights[n] - expected[n]).double().square().sum() for n in expected)
    way = sum((start[n] - expected[n]).double().square().sum() for n in expected)
    return float((difference / way).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_learns(ended, method, engine):
    one, start = _trained({**COMMON, "method": method})
    two = torch.load(ended / f"{method}-{engine}")
    distance = _distance(two["weights"], one.model.state_dict(), start)
    # Sums of 200 images in another order: 2e-7 here, where float32 has 6e-8.
    assert distance < 2e-6
    torch.testing.assert_close(two["record"][:, :2], one.record[:, :2], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_that_draws_is_the_same_in_two_processes(ended, engine):
    # AdamW, averaged weights, mixed and flipped images, random starts, accumulated parts.
    one, start = _trained(RICH)
    two = torch.load(ended / f"rich-{engine}")
    torch.testing.assert_close(two["record"][0, :2], one.record[0, :2], rtol=1e-6, atol=0)
    # Rounding, which AdamW makes a step of where a gradient is nearly 0.
    assert _distance(two["weights"], one.trained().state_dict(), start) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_signal_to_one_process_stops_both_and_they_continue_bit_for_bit(ended, engine):
    for rank in (0, 1):
        assert (ended / f"stopped-{engine}.{rank}").read_text() == "SIGTERM after step 10"
    whole, continued = (torch.load(ended / f"{name}-{engine}") for name in ("rich", "continued"))
    assert torch.equal(continued["record"][:, :2], whole["record"][:, :2])
    for name, weight in whole["weights"].items():
        assert torch.equal(continued["weights"][name], weight)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_process_continues_what_two_began_and_the_reverse(ended, engine):
    one, start = _trained(RICH)
    state = checkpoint.load(ended / f"stopped-{engine}.pt")
    assert state["step"] == 10
    settings = settings_of(state, distributed="none")
    continued, _ = _trained(dataclasses.asdict(settings), state)
    assert torch.equal(continued.record[10:, :2] > 0, one.record[10:, :2] > 0)
    expected = one.trained().state_dict()
    assert _distance(continued.trained().state_dict(), expected, start) < 2e-2
    two = torch.load(ended / f"one-{engine}")
    assert _distance(two["weights"], expected, start) < 2e-2
    # The first step after the checkpoint shows what was restored before rounding grows.
    for record in (continued.record, two["record"]):
        torch.testing.assert_close(record[10, :2], one.record[10, :2], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_folder_of_two_processes_is_evaluated_by_one(ended):
    settings = Settings(**RICH)
    training = Training(settings, load(settings))
    state = checkpoint.load(ended / "stopped-fsdp2.pt")
    averaged, last = ({n: x.clone() for n, x in training.model.state_dict().items()} for _ in "12")
    checkpoint.fill(state, "average", averaged)
    load_weights(training.model, training.data, state)
    assert all(torch.equal(x, averaged[n]) for n, x in training.model.state_dict().items())
    checkpoint.fill(state, "model", last)
    load_weights(training.model, training.data, state, averaged=False)
    assert all(torch.equal(x, last[n]) for n, x in training.model.state_dict().items())
    assert any(not torch.equal(last[n], averaged[n]) for n in last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("old", "in the format of one process, which several can't continue"),
        ("none", "torchrun started 2 processes, each of which would train a model of its own"),
        ("odd", "batch_size 201 must be a multiple of the 2 parts"),
        ("seeds", "the processes disagree on seed: 0 in process 0, 1 in process 1"),
        ("float16", "fsdp2 does not go with --precision float16"),
    ],
)
def test_mistakes_end_all_processes_with_a_sentence(ended, name, words):
    for rank in (0, 1):
        assert words in (ended / f"{name}.{rank}").read_text()


class _Code:
    def __reduce__(self):
        return os.putenv, ("gn_kernels_ran", "1")


def _pickled_code(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(_Code()))
    values = json.loads((folder / "run.json").read_text())
    values["files"][".metadata"] = checkpoint._fingerprint(folder / ".metadata")
    (folder / "run.json").write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: os.truncate(folder / "__1_0.distcp", 1000), "damaged or cut short"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "damaged or cut short"),
        (lambda folder: os.truncate(folder / "run.json", 100), "damaged or cut short"),
        (lambda folder: (folder / "run.json").unlink(), "damaged or cut short"),
        (lambda folder: (folder / "run.json").write_text("{}"), "is not a gn_kernels"),
        (_pickled_code, "it could run code"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(ended, tmp_path, damage, words):
    folder = tmp_path / "checkpoint.pt"
    shutil.copytree(ended / "stopped-ddp.pt", folder)
    assert checkpoint.load(folder)["step"] == 10
    damage(folder)
    with pytest.raises(InputError, match=words) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def _alone(monkeypatch):
    """torchrun with a single process, this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (
        *(("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")),
        *(("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))),
    ):
        monkeypatch.setenv(name, value)


def test_fewer_gpus_than_processes(monkeypatch):
    _alone(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with distribution.processes():
        with pytest.raises(InputError, match=r"4 processes on this machine, which has 1 GPU:"):
            distribution.check(Settings(distributed="ddp", device="cuda"))
        distribution.check(Settings(distributed="ddp"))
    assert not torch.distributed.is_initialized()


def test_several_processes_need_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with distribution.processes(), pytest.raises(InputError, match=r"needs processes: .*torchrun"):
        distribution.check(Settings(distributed="ddp"))


@pytest.mark.parametrize("each", [6, 7])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_divide_the_batch_and_keep_mixups_pairs(monkeypatch, processes, each):
    count = processes * each
    monkeypatch.setattr(distribution, "size", lambda: processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(distribution, "rank", lambda rank=rank: rank)
        shares.append(torch.arange(count)[distribution.share(count)])
    assert sorted(torch.cat(shares).tolist()) == list(range(count))
    if each % 2 == 0 or processes == 1:
        for share in shares:
            assert torch.equal(share.flip(0), count - 1 - share)


def test_the_blocks_of_a_model_are_its_innermost_rows():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stages = nn.Sequential(*(nn.Sequential(block, copy.deepcopy(block)) for _ in range(2)))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), stages, nn.GELU(), nn.GELU())
    expected = [layer for stage in stages for layer in stage]
    found = distribution._blocks(model)
    assert len(found) == 4
    assert all(any(a is b for b in expected) for a in found)


def _children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _run_until_a_checkpoint(folder, log):
    options = {**TINY, "epochs": 2000, "depth": 1}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = _torchrun("-m", "gn_kernels.cli", "train", *arguments, "--distributed", "ddp")
    command += ["--output", str(folder), "--save-every-steps", "5"]
    process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.previous.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def _continued_for_a_step(folder):
    state = checkpoint.load(folder / "checkpoint.pt")
    settings = settings_of(state, distributed="none")
    training = Training(settings, load(settings))
    training.load_state(state)
    step = training.step
    assert math.isfinite(training._advance().loss)
    return step


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_sentence_and_a_checkpoint(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as file:
        process = _run_until_a_checkpoint(folder, file)
        start = time.monotonic()
        os.kill(_children(process.pid)[1], signal.SIGKILL)
        assert process.wait(60) != 0
    assert time.monotonic() - start < 60
    text = log.read_text()
    assert "gn-kernels: process 0 of 2 stops at step" in text
    assert "another process has ended or can't be reached" in text
    assert "Traceback" not in text.split("gn-kernels: process 0")[0]
    assert _continued_for_a_step(folder) % 5 == 0


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint_of_the_last_step(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as file:
        process = _run_until_a_checkpoint(folder, file)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    stopped = re.search(r"interrupted by SIGTERM after step (\d+); it is saved", log.read_text())
    assert stopped
    assert _continued_for_a_step(folder) == int(stopped[1])
