"""The report says what the results say: ratios, verdicts, and what is missing."""

import copy
import json
import xml.etree.ElementTree as ElementTree

import pytest

from gn_kernels.reproduce import matrix, write_report
from gn_kernels.reproduce.cost import REFERENCE
from gn_kernels.reproduce.runner import plan_of
from gn_kernels.training import InputError

# Accuracy under attack, of seeds 0, 1, 2, where it matters; 0.7 elsewhere.
ACCURACY = {
    "fashion-mnist-vit-gelu-gradnorm": (0.66, 0.69, 0.72),
    "fashion-mnist-vit-gelu-pgd-3": (0.72, 0.75, 0.74),
    "fashion-mnist-vit-gelu-edge": (0.5, 0.5, 0.5),
    "fashion-mnist-vit-gelu-natural": (0.1, 0.2, 0.1),
    "patches-vit-gelu-gradnorm": (0.30, 0.32, 0.31),
    "patches-vit-gelu-pgd-3": (0.5, 0.5, 0.5),
    "fashion-mnist-resnet-relu-gradnorm": (0.4, 0.4, 0.4),
    "patches-resnet-relu-gradnorm": (0.66, 0.69, 0.72),
    "patches-resnet-relu-gradnorm-1.6": (0.65, 0.65, 0.65),
    "patches-vit-gelu-gradnorm-0.8": (0.30, 0.30, 0.30),
    "patches-vit-gelu-gradnorm-1.6": (0.35, 0.35, 0.35),
    "patches-vit-gelu-gradnorm-1.8": (0.20, 0.20, 0.20),
}
# Likewise, the clean accuracy; 0.8 elsewhere.
CLEAN = {"patches-vit-gelu-gradnorm-1.6": (0.7, 0.6, 0.5)}


def _result(run):
    name, _, seed = run.name.rpartition("-")
    accuracy = ACCURACY.get(name, (0.7, 0.7, 0.7))[int(seed)]
    gradients = {
        "mean_l1": 10.0,
        "mean_l1_robust": 5.0,
        "mean_l1_vulnerable": 20.0,
        "sample_asymmetry": 0.5,
        "channel_shares": [0.3, 0.4, 0.3] if run.settings.dataset == "patches" else [1.0],
    }
    attacks = ["apgd-ce", "apgd-t"] + ["fab-t", "square"] * (run.attacks == ("autoattack",))
    return {
        "name": run.name,
        "plan": plan_of(run),
        "seconds": 100.0,
        "versions": {"torch": "2"},
        "machine": {"cpu": "one"},
        "pgd": {
            "images": 1000,
            "attack_steps": 20,
            "eps_255": run.settings.eps_255,
            "clean_accuracy": CLEAN.get(name, (0.8, 0.8, 0.8))[int(seed)],
            "robust_accuracy": accuracy + 0.01,
        },
        "autoattack": {
            "images": 250,
            "attacks": attacks,
            "robust_accuracy": accuracy,
            "sweep": [{"after": {"apgd-ce": accuracy, "apgd-t": accuracy}}],
            "warnings": [],
        },
        "analyses": {"gradients": gradients, "linearity": {"mean": 1e-6}, "edges": {"mean": 0.5}},
        "training": {"steps": 936, "parameters": 300_000},
        "dataset": {"train_images": 30_000},
    }


def _cost(run, gradnorm_ms):
    times = {"natural": 50, "fgsm": 100, "pgd-3": 180, REFERENCE: 250, "edge": 120}
    return {
        "plan": plan_of(run),
        "seconds": 50.0,
        "versions": {"torch": "2"},
        "machine": {"cpu": "one"},
        "batch_size": 64,
        "rounds": 15,
        "steps": [
            {
                "method": method,
                "kernels": kernels,
                "median_ms": ms,
                "least_ms": ms,
                "most_ms": ms,
                "flop": 1e9 * ms,
                "saved_bytes": 2**20,
                "peak_bytes": 2**21,
            }
            for kernels in ("gn_kernels", "PyTorch")
            for method, ms in {
                **times,
                "gradnorm": gradnorm_ms * (1 if kernels == "gn_kernels" else 1.4),
            }.items()
        ],
    }


@pytest.fixture(scope="module")
def results():
    runs = matrix()
    return {run.name: _result(run) for run in runs} | {"cost-vit": _cost(runs[0], 125.0)}


def _written(folder, results, planned=None):
    (folder / "results").mkdir()
    for name, result in results.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(result))
    return write_report(folder, planned or list(results), "gn-kernels reproduce")


def _claims(text):
    section = text.split("## Claims")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def test_claims(results, tmp_path):
    markdown, _ = _written(tmp_path, results)
    text = markdown.read_text()
    claims = _claims(text)
    ratio = "(a) gradnorm's accuracy over PGD-3's"
    # 0.66/0.72, 0.69/0.75, 0.72/0.74
    assert claims[ratio, "Fashion-MNIST, ViT, GELU"] == [
        *("0.92", "0.94 (0.92 to 0.97)", "reproduced")
    ]
    assert claims[ratio, "Colour patches, ViT, GELU"][1:] == [
        *("0.62 (0.60 to 0.64)", "not reproduced")
    ]
    cost = "(b) gradnorm's time over that of PGD-3: the reference's; lean"
    for kernels, measured, verdict in (
        ("gn_kernels", "0.50; 0.69", "reproduced for the reference's only"),
        ("PyTorch", "0.70; 0.97", "not reproduced"),
        ("the faster kernels of each", "0.50; 0.69", "reproduced for the reference's only"),
    ):
        assert claims[cost, f"ViT, {kernels}"] == ["0.60", measured, verdict]
    smooth = "(c) GELU's accuracy minus ReLU's, points: gradnorm; PGD-3"
    assert claims[smooth, "Fashion-MNIST, ResNet"][1:] == [
        *("+30.0 (+30.0 to +30.0); +0.0 (+0.0 to +0.0)", "reproduced")
    ]
    assert claims[smooth, "Colour patches, ResNet"][2] == "not reproduced"
    smooth = "(c) GELU's accuracy minus ReLU's, points: gradnorm at (0.4, 1.6); PGD-3"
    assert claims[smooth, "Colour patches, ResNet"][1:] == [
        *("+5.0 (+5.0 to +5.0); +0.0 (+0.0 to +0.0)", "in direction")
    ]
    assert (smooth, "Fashion-MNIST, ResNet") not in claims
    edge = "(d) edge's accuracy over PGD-3's; natural's over PGD-3's"
    assert claims[edge, "Fashion-MNIST, ViT, GELU"][2] == "reproduced"
    assert claims[edge, "Colour patches, ViT, GELU"][2].startswith("not reproduced: natural")
    clean, attacked = (row for name, row in claims.items() if name[0].startswith("(f)"))
    assert clean == ["79.9, 77.9, 70.6, 40.0", "80.0, 80.0, 60.0, 80.0", "not reproduced"]
    assert attacked == ["46.2, 51.5, 51.2, 29.0", "30.0, 31.0, 35.0, 20.0", "in direction"]
    missed = text.split("**Not reproduced here:**")[1].splitlines()[0]
    assert "Colour patches, ViT, GELU): 0.62 (0.60 to 0.64), paper 0.92" in missed
    assert "Fashion-MNIST, ViT, GELU): 0.94" not in missed


def test_missing_results_are_counted_and_missing_claims_left_out(results, tmp_path):
    few = {name: results[name] for name in results if name.startswith("fashion-mnist-vit-gelu-gr")}
    markdown, _ = _written(tmp_path, few, list(results))
    text = markdown.read_text()
    assert "from 3 of 115 results; **112 are missing**" in text
    assert not any(name.startswith(("(a)", "(c)", "(d)")) for name, _ in _claims(text))


def test_each_machine_is_named_with_what_was_computed_there(results, tmp_path):
    (tmp_path / "one").mkdir()
    markdown, _ = _written(tmp_path / "one", results)
    assert "\nVersions: torch 2. cpu: one.\n" in markdown.read_text()
    results = copy.deepcopy(results)
    for name in ("fashion-mnist-vit-gelu-gradnorm-0", "fashion-mnist-vit-gelu-gradnorm-1"):
        results[name]["machine"]["cpu"] = "another"
    (tmp_path / "two").mkdir()
    markdown, _ = _written(tmp_path / "two", results)
    assert "\n2 results. Versions: torch 2. cpu: another.\n" in markdown.read_text()
    rest = "\n113 results, the costs among them. Versions: torch 2. cpu: one.\n"
    assert rest in markdown.read_text()


def test_a_run_whose_robust_images_have_larger_gradients_counts_against_e(results, tmp_path):
    results = copy.deepcopy(results)
    gradients = results["patches-vit-gelu-edge-0"]["analyses"]["gradients"]
    gradients["mean_l1_robust"] = 30.0
    markdown, _ = _written(tmp_path, results)
    claim = "(e) gradients are smaller where images are robust, runs"
    claims = _claims(markdown.read_text())
    assert claims[claim, "Colour patches, ViT, GELU"][1:] == ["14 of 15", "not reproduced"]
    assert claims[claim, "Fashion-MNIST, ViT, GELU"][1:] == ["15 of 15", "reproduced"]


def test_the_weights_stand_beside_natural_and_adversarial_training(results, tmp_path):
    markdown, _ = _written(tmp_path, results)
    section = markdown.read_text().split("## Weights of the two terms")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    assert [row[0] for row in rows[2:]] == [
        *("natural", "(1.2, 0.8)", "(0.8, 1.2)", "(0.4, 1.6)", "(0.2, 1.8)", "PGD-3")
    ]
    assert rows[5][1:] == [
        *("60.0 % (50.0 % to 70.0 %)", "36.0 % (36.0 % to 36.0 %)"),
        *("35.0 % (35.0 % to 35.0 %)", "10 (10 to 10)", "3"),
    ]
    labels = ElementTree.parse(tmp_path / "figures" / "weights.svg").iter()
    texts = [label.text for label in labels if label.tag.endswith("}text")]
    assert {row[0] for row in rows[2:]} <= set(texts)


def test_the_page_has_the_tables_and_figures_that_take_the_page_s_colours(results, tmp_path):
    markdown, page = _written(tmp_path, results)
    text = page.read_text()
    tables = sum(line.startswith("| --- ") for line in markdown.read_text().splitlines())
    assert text.count("<table class=") == tables >= 6
    pieces = text.split("<svg")[1:]
    assert len(pieces) == 4
    for piece in pieces:
        picture = "<svg" + piece.split("</svg>")[0] + "</svg>"
        ElementTree.fromstring(picture)
        assert "currentColor" in picture
        assert "#010203" not in picture
        assert "<text" in picture
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.stem for file in files] == ["cost-vit", "fashion-mnist", "patches", "weights"]
    for file in files:
        assert f"](figures/{file.name})" in markdown.read_text()
        style = next(ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}style"))
        assert "prefers-color-scheme: dark" in style.text


def test_results_that_are_damaged_or_not_there(tmp_path):
    with pytest.raises(InputError, match="holds no result yet"):
        write_report(tmp_path, ["a"], "")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        write_report(tmp_path, ["a"], "")
