"""All analyses together: swapped models, batches, continuing, and what is refused."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gn_kernels
from gn_kernels.robustness.analyses import ANALYSES, Options, analyse
from gn_kernels.robustness.analyses.curvature import curvature
from gn_kernels.robustness.differentiate import hessian_vector_products
from tests.robustness.analyses.conftest import small_vit


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(8)
    pixels = torch.rand(6, 3, 16, 16, dtype=torch.float64)
    labels = torch.arange(6) % 5
    with torch.no_grad():  # most of them right, or the robustness curve has nothing to do
        labels[:4] = small_vit()(pixels[:4]).argmax(1)
    return TensorDataset(pixels, labels)


OPTIONS = Options(eps_255=8, power_iterations=6, curve_steps=4)


def test_swapped_models_give_the_same_numbers(images):
    plain = small_vit()
    swapped = small_vit()
    report = gn_kernels.swap(swapped)
    assert "Attention" in str(report)
    before = analyse(plain, images, list(ANALYSES), OPTIONS, batch_size=4)
    after = analyse(swapped, images, list(ANALYSES), OPTIONS, batch_size=4)
    for name in ANALYSES:
        for column, expected in before[name].columns.items():
            actual = after[name].columns[column]
            assert expected.dtype == actual.dtype
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-12, equal_nan=True)
    assert before["curvature"].columns["eigenvalue"].min() > 1e-3
    assert 0 < before["curve"].summary["median_eps_255"] < 32


def test_third_derivatives_of_a_swapped_model_are_differences_of_second_ones(images):
    # ∇(uᵀHu), against differences of uᵀHu in PyTorch's own model. PyTorch's third derivative is
    # no oracle: that of F.layer_norm is wrong in 2.14.
    pixels, labels = (tensor[:2] for tensor in images.tensors)
    direction = torch.linspace(-1, 1, pixels.numel(), dtype=torch.float64).view_as(pixels)

    def bend(model, pixels):
        loss = nn.functional.cross_entropy(model(pixels), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction).sum(), pixels, create_graph=True)
        return (product * direction).sum()

    swapped, plain = small_vit(), small_vit()
    gn_kernels.swap(swapped)
    inputs = pixels.clone().requires_grad_()
    (third,) = torch.autograd.grad(bend(swapped, inputs), inputs)
    assert third.abs().max() > 1e-3
    for seed in range(3):
        move = torch.randn(
            pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        ahead, behind = (
            bend(plain, (pixels + step * move).requires_grad_()).item() for step in (1e-5, -1e-5)
        )
        expected = (ahead - behind) / 2e-5
        assert abs(expected) > 1e-3
        assert (third * move).sum().item() == pytest.approx(expected, rel=1e-5)


def test_hessian_vector_products_of_a_swapped_model_are_differences_of_gradients(images):
    pixels, labels = images.tensors
    model = small_vit()
    gn_kernels.swap(model)
    vectors = torch.randn_like(pixels)
    product, _ = hessian_vector_products(model, pixels, labels)
    ahead, behind = (
        hessian_vector_products(model, pixels + step * vectors, labels)[1] for step in (1e-5, -1e-5)
    )
    torch.testing.assert_close(product(vectors), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-7)


def test_figures_of_an_image_do_not_depend_on_its_neighbours(images):
    model = small_vit()
    pixels, labels = images.tensors
    start = torch.randn_like(pixels)
    together = curvature(model, pixels, labels, start, 3)
    alone = curvature(model, pixels[2:3], labels[2:3], start[2:3], 3)
    for name in together:
        torch.testing.assert_close(together[name][2:3], alone[name])


class _PulledThePlugError(Exception):
    pass


def test_an_interrupted_analysis_goes_on_where_it_was(images, tmp_path):
    model, file = small_vit(), tmp_path / "progress"
    what = ("linearity", "curvature", "edges")

    def run(observer=lambda stage: None):
        return analyse(
            model, images, what, OPTIONS, batch_size=2, progress_file=file, observer=observer
        )

    whole = analyse(model, images, what, OPTIONS, batch_size=2)
    stages = []
    for last in (2, 5):

        def stop(stage, last=last):
            stages.append((stage.name, stage.done))
            if len(stages) == last:
                raise _PulledThePlugError

        with pytest.raises(_PulledThePlugError):
            run(stop)
    run(lambda stage: stages.append((stage.name, stage.done)))
    again = run(lambda stage: stages.append((stage.name, stage.done)))  # complete already
    assert stages == [(name, done) for name in what for done in (2, 4, 6)]
    for name in what:
        assert again[name].summary == whole[name].summary
        for column, expected in whole[name].columns.items():
            assert torch.equal(again[name].columns[column], expected)


def test_leaves_the_model_as_it_was_and_summaries_are_plain(images):
    model = small_vit().train()
    state = torch.get_rng_state()
    results = analyse(model, images, list(ANALYSES), OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for result in results.values():
        json.dumps(result.summary, allow_nan=False)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"what": ("magic",)}, "analyses must be among .*, but got magic"),
        ({"what": ()}, "got none"),
        ({"images": TensorDataset(torch.rand(0, 3, 16, 16), torch.zeros(0).long())}, "an image"),
        (
            {"images": TensorDataset(2 + torch.rand(3, 3, 16, 16), torch.zeros(3).long())},
            r"\[0, 1\]",
        ),
        ({"images": TensorDataset(torch.rand(3, 3, 16, 16), torch.full((3,), 9))}, "5 classes"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(wrong, words):
    pixels = TensorDataset(torch.rand(3, 3, 16, 16), torch.zeros(3).long())
    options = {"images": pixels, "what": ("linearity",), "batch_size": 2, **wrong}
    with pytest.raises(ValueError, match=words):
        analyse(small_vit().float(), options.pop("images"), options.pop("what"), OPTIONS, **options)


@pytest.mark.parametrize("wrong", [{"eps_255": 0.0}, {"power_iterations": 0}, {"curve_steps": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="eps_255 must be above 0"):
        Options(**wrong)
