"""The paper's Swin recipe, from its preset to a benchmark's evaluation, on a folder of images."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from gn_kernels import training
from gn_kernels.cli import main
from gn_kernels.cli.evaluate import PREPROCESSING
from gn_kernels.training import Settings, load

# Swin-B's blocks, windows and heads, at a sixteenth of its width.
NARROW = "embed_dim=8,depths=(2,2,18,2),num_heads=(1,2,4,8)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of each of two classes, of many sizes, to train on, and three to test."""
    path = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("n01440764", "n01443537")):
            (path / part / name).mkdir(parents=True)
            for index in range(count):
                coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                size = (300 + 40 * index, 280 + 30 * label)
                image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
                image.save(path / part / name / f"{index}.JPEG")
    (path / "val.txt").write_text("n01443537/2.JPEG 1\nn01440764/0.JPEG 0\n")
    return path


@pytest.mark.slow
def test_the_preset_of_swin_b_trains_and_is_evaluated(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "compare_steps", partial(training.compare_steps, steps=1))
    run, figures = tmp_path / "run", tmp_path / "figures.json"
    command = ["train", "--preset", "gradnorm-swin-b", "--data", str(folder), "--output", str(run)]
    command += ["--test-list", str(folder / "val.txt"), "--model-options", NARROW]
    command += ["--no-pretrained", "--device", "cpu", "--workers", "0", "--epochs", "1"]
    command += ["--batch-size", "12", "--warmup-epochs", "0"]
    command += ["--attack-steps", "1"]
    assert main(command) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["settings"]["accumulate_steps"] == 2
    assert report["settings"]["mixup"] == 0.8
    (epoch,) = report["training"]["history"]
    assert epoch["penalty"] > 0
    for part in ("norm1", "norm2", "attn", "mlp.act"):
        assert f"blocks.*.{part} (24)" in report["swapped"]
    assert main(["evaluate", str(run), "--attack-steps", "1", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["evaluation"]["images"] == 2


@pytest.mark.parametrize(
    ("name", "resampling"),
    [
        ("Res256Crop224", Image.Resampling.BILINEAR),
        ("BicubicRes256Crop224", Image.Resampling.BICUBIC),
    ],
)
def test_images_are_cut_as_robustbench_does(folder, name, resampling):
    options = {"dataset": "folder", "data": str(folder), "test_list": str(folder / "val.txt")}
    options["batch_size"] = 4
    data = load(Settings(**options, **PREPROCESSING[name]))
    found = data.test.batch(torch.tensor([0]))[0][0]
    image = Image.open(folder / "val" / "n01443537" / "2.JPEG")
    wide, high = image.size
    image = image.resize((256 * wide // high, 256), resampling)
    left, top = round((image.width - 224) / 2), (256 - 224) // 2
    expected = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)
