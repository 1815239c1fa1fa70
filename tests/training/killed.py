"""A run that is killed at one place after another, each time continued, and compared.

Each of them is a fork of this process, which has imported everything already.
"""

import os
import random
import signal
import sys
from pathlib import Path

import torch

from gn_kernels.training import Settings, Training, checkpoint, load
from tests.training.conftest import TINY

# All that a checkpoint has to hold or that has to follow from the step: random starts, mixing,
# flips, the averaged weights, float16's scaler, accumulated parts, the ramp.
SETTINGS = {
    **TINY,
    "train_images": 280,
    "batch_size": 40,
    "epochs": 3,
    "random_start_255": 8.0,
    "mixup": 0.8,
    "flip": 0.5,
    "ema_decay": 0.9,
    "precision": "float16",
    "accumulate_steps": 2,
}
_EVERY = 2


def _training():
    settings = Settings(**SETTINGS)
    return Training(settings, load(settings))


def _bits(training):
    tensors = training.state()["tensors"]
    record = tensors.pop("record:")[:, :2]
    return {**tensors, "record": record}, training._scaler.state_dict()


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die(path, step, where):
    training = _training()
    replace = os.replace

    def dying_replace(source, target):
        # "before": the new checkpoint is written; "between": the last one has another name.
        name = Path(source).name
        if training.step >= step and name.endswith("partial" if where == "between" else "pt"):
            _die()
        replace(source, target)

    def observer(progress):
        if progress.step == step and where == "step":
            _die()

    if where != "step":
        os.replace = dying_replace
    training.run(path, observer, save_every_steps=_EVERY)


def _main(folder, seed):
    whole = _training()
    whole.run()
    expected, scaler = _bits(whole)
    assert scaler["_growth_tracker"] > 0
    choose = random.Random(seed)
    for number in range(20):
        # The first checkpoint is of step 2, the first that replaces another of step 4.
        step, where = choose.randrange(4, 21), choose.choice(["step", "before", "between"])
        path = folder / f"{number}.pt"
        child = os.fork()
        if child == 0:
            try:
                _run_and_die(path, step, where)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        continued = _training()
        continued.load_state(checkpoint.load(path))
        # Neither a step that was not saved yet nor a checkpoint that was not named yet is there.
        assert continued.step == (step - 1) // _EVERY * _EVERY, (step, where, continued.step)
        continued.run()
        found, found_scaler = _bits(continued)
        assert found_scaler == scaler
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (number, step, where, name)
        print(step, where)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(Path(sys.argv[1]), int(sys.argv[2]))
