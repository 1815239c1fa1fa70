"""gn-kernels from end to end, and one sentence for each mistake."""

import builtins
import json
import os
import signal
import subprocess
import sys
from functools import partial

import matplotlib.image
import pytest
import torch

from gn_kernels import training
from gn_kernels.cli import main
from gn_kernels.training import recipe

TINY = [
    *("--patch-size=4", "--embed-dim=8", "--depth=1", "--num-heads=2", "--epochs=2"),
    *("--warmup-epochs=0.5", "--batch-size=200", "--attack-steps=2", "--restarts=1"),
]


@pytest.fixture(scope="module", autouse=True)
def _few_timed_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compare_steps", partial(training.compare_steps, steps=2))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, "--output", str(folder)]) == 0
    return folder


def _report(folder):
    return json.loads((folder / "report.json").read_text())


def test_train_writes_checkpoint_report_and_picture(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint.previous.pt",
        "checkpoint.pt",
        "config.yaml",
        "gradients.png",
        "report.json",
    ]
    report = _report(run)
    assert report["settings"]["eps_255"] == 16
    assert report["settings"]["seed"] == 0
    assert report["dataset"]["train_images"] == 1437
    assert report["dataset"]["test_images"] == 360
    assert report["versions"]["torch"] == torch.__version__
    assert report["backend"] in ("native", "reference")
    assert "gn_kernels" in report["swapped"]
    assert len(report["training"]["history"]) == 2
    assert report["training"]["step"]["steps"] == 14
    assert len(report["step_comparison"]["variants"]) == 3
    assert 0 <= report["evaluation"]["robust_accuracy"] <= report["evaluation"]["clean_accuracy"]
    assert matplotlib.image.imread(run / "gradients.png").std() > 0.1


def test_evaluate_repeats_the_figures_of_the_report(run, tmp_path, capsys):
    target = tmp_path / "figures.json"
    assert main(["evaluate", str(run), "--json", str(target)]) == 0
    assert "clean accuracy" in capsys.readouterr().out
    again, before = json.loads(target.read_text())["evaluation"], _report(run)["evaluation"]
    del again["seconds"], before["seconds"]
    assert again == before


def test_evaluate_takes_another_attack_and_prints_json_alone(run, capsys):
    command = ["evaluate", str(run / "checkpoint.pt"), "--eps-255", "200", "--attack-steps", "3"]
    assert main([*command, "--restarts", "2", "--seed", "5", "--json", "-"]) == 0
    evaluation = json.loads(capsys.readouterr().out)["evaluation"]
    assert evaluation["eps_255"] == 200
    assert (evaluation["attack_steps"], evaluation["restarts"], evaluation["seed"]) == (3, 2, 5)
    assert evaluation["robust_accuracy"] <= evaluation["clean_accuracy"]


def test_natural_without_swap_into_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", *TINY, "--method", "natural", "--no-swap", "--activation", "silu"]
    assert main([*command, "--seed", "3"]) == 0
    folder = tmp_path / "runs" / "digits-natural-silu-no-swap-3"
    report = _report(folder)
    assert (report["swapped"], report["backend"]) == (None, "PyTorch")
    out = capsys.readouterr().out
    # Not a terminal: a line for each epoch, no control characters.
    assert "\x1b" not in out
    assert out.count("images/s") == 2
    assert "PyTorch's operations, math attention" in out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_says_how_to_continue_and_does(
    run, tmp_path, monkeypatch, capsys, signum
):
    original, calls = recipe.METHODS["gradnorm"], []

    def method(*arguments):
        calls.append(0)
        if len(calls) == 5:
            signal.raise_signal(signum)
        return original(*arguments)

    folder = tmp_path / "interrupted"
    with monkeypatch.context() as context:
        context.setitem(recipe.METHODS, "gradnorm", method)
        assert main(["train", *TINY, "--output", str(folder)]) == 128 + signum
    error = capsys.readouterr().err
    assert "after step 5" in error
    assert f"--resume --output {folder}" in error
    assert main(["train", "--resume", "--output", str(folder)]) == 0
    resumed, whole = _report(folder), _report(run)
    for figure in ("clean_accuracy", "robust_accuracy", "gradient_norm_l1"):
        assert resumed["evaluation"][figure] == whole["evaluation"][figure]
    losses = [
        [epoch["cross_entropy"] for epoch in r["training"]["history"]] for r in (resumed, whole)
    ]
    assert losses[0] == losses[1]


def _sentence(capsys, *arguments):
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("gn-kernels: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("dance",), "dance"),
        (("train", "--method", "magic"), "magic"),
        (("train", "--epochs", "many"), "many"),
        (("train", "--epochs", "0"), "epochs must be at least 1"),
        (("train", "--eps-255", "-4"), "eps_255 must be finite"),
        (("train", "--save-every-steps", "0"), "below 1"),
        (("train", "--resume", "--overwrite"), "not allowed with"),
        (("train", "--resume", "--output", "/no/such/run"), "no checkpoint"),
        (("train", "--dataset", "folder", "--data", "/no/such/folder"), "does not exist"),
        (("evaluate", "/no/such/checkpoint.pt"), "no checkpoint"),
    ],
)
def test_mistakes(capsys, arguments, words):
    assert words in _sentence(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told(capsys, tmp_path):
    arguments = ("train", "--device", "cuda", "--output", str(tmp_path / "run"))
    assert "finds none" in _sentence(capsys, *arguments)


def test_mistakes_with_a_run(run, capsys, tmp_path):
    folder = str(run)
    assert "--resume" in _sentence(capsys, "train", *TINY, "--output", folder)
    resume = ("train", "--resume", "--output", folder)
    assert "lr 0.006, not 0.5" in _sentence(capsys, *resume, "--lr", "0.5")
    assert "attack_steps" in _sentence(capsys, "evaluate", folder, "--attack-steps", "0")
    damaged = tmp_path / "checkpoint.pt"
    damaged.write_bytes((run / "checkpoint.pt").read_bytes()[:-1000])
    assert "damaged" in _sentence(capsys, "evaluate", str(damaged))
    assert "/no/such" in _sentence(capsys, "evaluate", folder, "--json", "/no/such/figures.json")


@pytest.mark.parametrize("package", ["timm", "sklearn", "matplotlib", "rich"])
def test_a_missing_extra_is_named(package, capsys, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    error = _sentence(capsys, "train", *TINY, "--output", str(tmp_path / "run"))
    assert package in error
    assert "pip install 'gn_kernels[train]'" in error
    # Told before the training, not after it.
    assert not (tmp_path / "run").exists()


def test_info_and_help_need_no_extra():
    script = (
        "import sys\n"
        "for name in ('timm', 'sklearn', 'matplotlib', 'rich', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "from gn_kernels.cli import main\n"
        "assert main(['info']) == 0\n"
        "main(['train', '--help'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "cpu tensors run on" in ended.stdout
    assert "--eps-255" in ended.stdout


def test_a_configuration_lies_between_the_preset_and_the_command_line(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 7\ndepth: 2\n")
    command = ["train", "--config", str(config), "--depth", "1", "--dry-run", "--gpus", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "epochs: 7\n" in out
    assert "depth: 1\n" in out
    assert "32 of 64" in out
    assert "hours on 2 H100" in out
    config.write_text("epoch: 3\n")
    assert "did you mean epochs" in _sentence(capsys, "train", "--config", str(config))
    error = _sentence(capsys, "train", "--preset", "gradnorm-swin")
    assert "did you mean gradnorm-swin-" in error


def test_a_runs_configuration_repeats_it(run, tmp_path, capsys):
    saved = str(run / "config.yaml")
    assert main(["train", "--config", saved, "--output", str(tmp_path / "again")]) == 0
    again, before = (_report(folder) for folder in (tmp_path / "again", run))
    assert again["settings"] == before["settings"]
    losses = [
        [epoch["cross_entropy"] for epoch in r["training"]["history"]] for r in (again, before)
    ]
    assert losses[0] == losses[1]
