"""``gn-kernels analyse``: one model and several, continuing, and a sentence for each mistake."""

import json
import math

import pytest

from gn_kernels.cli import main
from gn_kernels.robustness import analyses
from gn_kernels.training import Settings, Training, checkpoint, load
from tests.training.conftest import TINY

SHORT = ("--images", "24", "--batch-size", "10", "--power-iterations", "3", "--curve-steps", "3")


def test_two_models_in_one_report_with_all_figures(checkpoints, tmp_path, capsys):
    output = tmp_path / "analysis"
    paths = [str(path) for path in checkpoints.values()]
    command = ["analyse", paths[0], "--compare", paths[1], "--output", str(output), *SHORT]
    assert main(command) == 0
    names = [*analyses.ANALYSES, "images"]
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["analysis.json", *(f"{name}.png" for name in names)]
    )
    report = json.loads((output / "analysis.json").read_text())
    assert report["what"] == names
    assert report["options"]["eps_255"] == 16  # the training's
    assert [model["label"] for model in report["models"]] == ["natural", "gradnorm"]
    assert [model["weights"] for model in report["models"]] == ["raw", "ema"]
    for model in report["models"]:
        assert set(model["summaries"]) == set(analyses.ANALYSES)
        errors = model["per_image"]["linearity"]["error"]
        assert len(errors) == 24
        mean = model["summaries"]["linearity"]["mean"]
        assert math.isclose(sum(errors) / 24, mean, rel_tol=1e-5)
    captured = capsys.readouterr()
    assert "mean curvature" in captured.out
    assert "curve: 24 images" in captured.err


def test_an_interrupted_comparison_goes_on_with_the_second_model(
    checkpoints, tmp_path, monkeypatch, capsys
):
    output, calls = tmp_path / "analysis", []
    original = analyses.ANALYSES["linearity"]

    def measure(*arguments):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original.measure(*arguments)

    monkeypatch.setitem(analyses.ANALYSES, "linearity", original._replace(measure=measure))
    paths = [str(path) for path in checkpoints.values()]
    command = ["analyse", paths[0], "--compare", paths[1], "--what", "linearity", *SHORT]
    command += ["--output", str(output)]
    assert main(command) == 130
    assert "1.partial, the same command continues" in capsys.readouterr().err
    assert main(command) == 0
    assert len(calls) == 7  # three batches of each model, the fifth one twice
    assert sorted(path.name for path in output.iterdir()) == ["analysis.json", "linearity.png"]


def test_mistakes(checkpoints, tmp_path, capsys):
    def sentence(*arguments):
        assert main(["analyse", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    natural = checkpoints["natural"]
    assert "curvature" in sentence(natural, "--what", "magic")
    assert "no checkpoint" in sentence(natural, "--compare", tmp_path / "none.pt")
    assert "named twice" in sentence(natural, "--compare", natural)
    assert "eps_255 must be above 0" in sentence(natural, "--eps-255", "0")
    assert "ema_decay 0" in sentence(natural, "--weights", "ema")


def test_a_model_that_is_not_twice_differentiable_is_told(tmp_path, capsys, monkeypatch):
    from gn_kernels.training import model as models

    # As it is without gn_kernels and without math attention: timm's fused attention.
    monkeypatch.setattr(models, "prepare", lambda model, settings: None)
    settings = Settings(**TINY, method="natural", swap=False)
    training = Training(settings, load(settings))
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, training.state())
    command = ["analyse", str(path), "--what", "curvature", *SHORT]
    assert main(command) == 2
    assert "not twice differentiable" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["images", "edges,images"])
def test_some_of_the_analyses(checkpoints, tmp_path, what):
    command = ["analyse", str(checkpoints["natural"]), "--what", what, "--output", str(tmp_path)]
    assert main([*command, *SHORT]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"analysis.json", *(f"{name}.png" for name in what.split(","))}
