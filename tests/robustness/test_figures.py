"""Scaling of gradients, colours that read on light and dark, pictures that can be read back."""

import matplotlib.image
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import nn

from gn_kernels.robustness import figures, gradient_figure
from gn_kernels.robustness.analyses import ANALYSES, Options, Result
from gn_kernels.robustness.figures import COLOURS, INK, analysis_figure, symmetric_scale


def test_scale_is_symmetric_and_saturates_at_the_quantile():
    gradient = torch.arange(-100.0, 101.0).view(1, 1, 1, 201)
    scaled = symmetric_scale(gradient).flatten()
    # 99% of the 201 magnitudes 0, 1, 1, ..., 100, 100 are at most 99.
    torch.testing.assert_close(scaled[100 + 33], torch.tensor(0.5 + 33 / 99 / 2))
    torch.testing.assert_close(scaled + scaled.flip(0), torch.ones(201))
    assert scaled[0] == 0
    assert scaled[-1] == 1
    assert (symmetric_scale(torch.zeros(2, 1, 3, 3)) == 0.5).all()


def _luminance(colour):
    """As WCAG defines it, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a, b):
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_every_colour_stands_out_from_light_and_dark(page):
    # WCAG asks 3 of graphics and of large text; 4.3 is what one grey can have to both.
    assert _contrast(INK, page) > 4.2
    for colour in COLOURS:
        assert _contrast(colour, page) > 3


def _transparent_with_ink(path):
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 300
    assert picture.shape[2] == 4
    assert picture[0, 0, 3] == 0
    assert picture[..., 3].max() == 1
    return picture


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_models_are_drawn_and_the_models_left_alone(tmp_path, channels, count):
    models = {
        name: nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 3))
        for name in ("natural", "gradnorm")[:count]
    }
    path = tmp_path / "gradients.png"
    images, labels = torch.rand(3, channels, 4, 4), torch.tensor([0, 1, 2])
    gradient_figure(path, models, images, labels, ("cat", "dog", "newt"))
    _transparent_with_ink(path)
    for model in models.values():
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    kept = []
    original = Figure.savefig

    def savefig(figure, *arguments, **options):
        kept.append(figure)
        return original(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept


@pytest.mark.parametrize("name", figures.DRAWINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_analysis_has_a_figure_of_several_models(tmp_path, drawn, name, channels):
    options = Options(power_iterations=2, curve_steps=2)
    images, labels = torch.rand(12, channels, 8, 8), torch.arange(12) % 4
    results = {}
    for label in ("natural", "gradnorm", "adversarial"):
        torch.manual_seed(len(label))
        model = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 9), nn.GELU(), nn.Linear(9, 4))
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        columns = ANALYSES[name].measure(model, images, labels, options, generator)
        results[label] = Result(columns, ANALYSES[name].summarise(columns, options))
    path = tmp_path / f"{name}.png"
    analysis_figure(path, name, results, options)
    _transparent_with_ink(path)
    (figure,) = drawn
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == list(results)
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert axes.lines or axes.patches


def test_every_analysis_is_drawn():
    assert set(figures.DRAWINGS) == set(ANALYSES)


def test_the_curve_is_the_summarys(tmp_path, drawn):
    smallest = torch.tensor([0.0, 1.5, 3.2, torch.inf])
    columns = {"smallest_eps_255": smallest}
    summary = ANALYSES["curve"].summarise(columns, Options())
    analysis_figure(tmp_path / "curve.png", "curve", {"one": Result(columns, summary)}, Options())
    line = drawn[0].axes[0].lines[0]
    assert list(line.get_xdata()) == summary["eps_255"]
    assert list(line.get_ydata()) == summary["accuracy"]
    assert drawn[0].get_suptitle() == "one"
