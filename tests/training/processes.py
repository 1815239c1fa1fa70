"""What the processes of a test do: jobs from a JSON file, one after the other.

A job has the settings of a run, and may have: ``resume``, a checkpoint to continue from;
``checkpoint``, where to write; ``stop``, a step after which process 1 alone gets SIGTERM;
``seeds``, one for each process; ``weights``, a file for the trained weights; ``errors``, a file for
the sentence that each process ends with.
"""

import json
import signal
import sys
from pathlib import Path

import torch

from gn_kernels.training import InputError, Settings, Training, checkpoint, distribution, load
from gn_kernels.training.loop import Interrupted


def _run(job):
    settings = dict(job["settings"])
    if "seeds" in job:
        settings["seed"] = job["seeds"][distribution.rank()]
    settings = Settings(**settings)
    distribution.check(settings)
    training = Training(settings, load(settings))
    if "resume" in job:
        training.load_state(checkpoint.load(Path(job["resume"])))

    def observer(progress):
        if progress.step == job.get("stop") and distribution.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    path = Path(job["checkpoint"]) if "checkpoint" in job else None
    training.run(path, observer, save_every_steps=1000)
    weights = training.trained().state_dict()
    if distribution.rank() == 0:
        torch.save({"weights": weights, "record": training.record}, job["weights"])


def _main(path):
    with distribution.processes():
        for job in json.loads(Path(path).read_text()):
            try:
                _run(job)
                assert "errors" not in job
            except (InputError, Interrupted) as error:
                file = Path(f"{job['errors']}.{distribution.rank()}")
                file.write_text(str(error))


if __name__ == "__main__":
    _main(sys.argv[1])
