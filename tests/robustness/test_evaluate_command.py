"""``gn-kernels evaluate``: attacks, radii, continuing, and a sentence for each mistake."""

import json
import re

import pytest

from gn_kernels.cli import main
from gn_kernels.robustness import evaluation


def _evaluation(*arguments):
    target = arguments[-1]
    assert main(["evaluate", *map(str, arguments[:-1]), "--json", str(target)]) == 0
    return json.loads(target.read_text())


def test_a_sweep_over_attacks(checkpoints, tmp_path, capsys):
    options = ("--attack", "pgd,apgd-ce", "--eps-255", "64,8", "--images", "40", "--seed", "4")
    figures = _evaluation(checkpoints["natural"], *options, tmp_path / "figures.json")
    found = figures["evaluation"]
    assert found["images"] == 40
    assert found["attacks"] == ["pgd", "apgd-ce"]
    assert [radius["eps_255"] for radius in found["sweep"]] == [8, 64]
    assert (found["seed"], found["eps_255"]) == (4, 64)
    assert found["robust_accuracy"] <= found["sweep"][0]["accuracy"] <= found["clean_accuracy"]
    assert figures["settings"]["method"] == "natural"
    assert figures["weights"] == "raw"
    assert len(found["model"]) == 16
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["pyautoattack"])
    captured = capsys.readouterr()
    assert "apgd-ce, eps 64/255" in captured.out
    assert "pgd, eps 8/255: " in captured.err
    assert not (tmp_path / "figures.json.partial").exists()


def test_an_interruption_says_how_to_continue(checkpoints, tmp_path, capsys, monkeypatch):
    original, calls = evaluation.pgd, []

    def pgd(*arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt  # a process that was started in the background ignores SIGINT
        return original(*arguments, **options)

    target = tmp_path / "figures.json"
    options = ("--eps-255", "8", "--images", "50", "--batch-size", "10")
    with monkeypatch.context() as context:
        context.setattr(evaluation, "pgd", pgd)
        command = ["evaluate", str(checkpoints["natural"]), *options, "--json", str(target)]
        assert main(command) == 130
    assert f"{target}.partial, the same command continues" in capsys.readouterr().err
    again = _evaluation(checkpoints["natural"], *options, target)
    whole = _evaluation(checkpoints["natural"], *options, tmp_path / "whole.json")
    del again["evaluation"]["seconds"], whole["evaluation"]["seconds"]
    assert again == whole


def test_averaged_and_raw_weights(checkpoints, tmp_path):
    found = {
        name: _evaluation(checkpoints["gradnorm"], "--images", "20", *options, tmp_path / name)
        for name, options in (
            ("default", ()),
            ("ema", ("--weights", "ema")),
            ("raw", ("--weights", "raw")),
        )
    }
    assert found["default"]["weights"] == "ema"
    assert found["default"]["evaluation"]["pyautoattack"] is None  # only our own PGD
    digests = {name: figures["evaluation"]["model"] for name, figures in found.items()}
    assert digests["default"] == digests["ema"] != digests["raw"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--attack", "magic"), "attacks must be among"),
        (("--eps-255", "four"), "four"),
        (("--eps-255", "-4"), "radii at least 0"),
        (("--weights", "ema"), "no averaged weights"),
        (("--images", "0"), "below 1"),
        (("--preprocessing", "Crop1"), "Res256Crop224"),
    ],
)
def test_mistakes(checkpoints, capsys, arguments, words):
    assert main(["evaluate", str(checkpoints["natural"]), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_missing_pyautoattack_is_told_before_the_work(checkpoints, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    command = ["evaluate", str(checkpoints["natural"]), "--attack", "pgd,autoattack"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "pip install 'gn_kernels[eval]'" in error
    assert "clean" not in error
