"""Each analysis where its answer is known in closed form."""

import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gn_kernels.robustness import NotDifferentiableError
from gn_kernels.robustness.analyses import (
    Options,
    curvature,
    curve,
    edges,
    frequency,
    gradients,
    interpolation,
    linearity,
)
from gn_kernels.robustness.differentiate import hessian_vector_products, input_gradients, margin


class Quadratic(nn.Module):
    """Its one logit is ½·xᵀAx."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, images):
        x = images.flatten(1)
        return 0.5 * ((x @ self.matrix) * x).sum(1, keepdim=True)


def _first_logit(logits, labels):
    return logits[:, 0]


@pytest.fixture
def quadratic():
    """A with eigenvalues -5, 2, 1.5, …, and random images."""
    size = 12
    eigenvalues = torch.linspace(-1, 2, size, dtype=torch.float64)
    eigenvalues[0] = -5
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return Quadratic(matrix), torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.zeros(6).long()


def test_curvature_of_a_quadratic_is_its_largest_eigenvalue(quadratic):
    model, images, labels = quadratic
    start = torch.randn_like(images)
    found = curvature.curvature(model, images, labels, start, 40, _first_logit)
    gradient = images.flatten(1) @ model.matrix
    expected = torch.full((6,), 5.0, dtype=torch.float64)
    # u is a unit vector short of 1e-6/‖Hu‖, so λ is 4e-7 below.
    torch.testing.assert_close(found["eigenvalue"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["l2"], gradient.norm(dim=1))
    torch.testing.assert_close(found["l1"], gradient.abs().sum(1))
    torch.testing.assert_close(
        found["curvature"], 5 / (gradient.norm(dim=1) + 1e-6), rtol=1e-6, atol=0
    )
    # Along a given direction, without iterations: the Rayleigh quotient.
    direct = curvature.curvature(model, images, labels, start, 0, _first_logit)
    flat = start.flatten(1)
    quotient = ((flat @ model.matrix) * flat).sum(1) / flat.square().sum(1)
    torch.testing.assert_close(direct["eigenvalue"], quotient.abs())


def test_hessian_vector_products_are_the_hessians(quadratic):
    # Of the cross-entropy, whose Hessian is not constant, against PyTorch's own.
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 3)).double()
    _, images, _ = quadratic
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    vectors = torch.randn_like(images)
    product, _ = hessian_vector_products(model, images, labels)
    for index in range(len(labels)):
        hessian = torch.autograd.functional.hessian(
            lambda x, i=index: cross_entropy(model(x.view(1, 3, 2, 2)), labels[i : i + 1]),
            images[index].flatten(),
        )
        expected = (hessian @ vectors[index].flatten()).view(3, 2, 2)
        torch.testing.assert_close(product(vectors)[index], expected, rtol=1e-9, atol=1e-12)


def test_a_linear_model_is_linear_and_a_quadratic_is_off_by_its_square(
    linear, quadratic, options, generator
):
    found = linearity.measure(*linear, options, generator, margin)
    assert found["error"].max() < 1e-28
    # ℓ(c) − (1−t)ℓ(a) − tℓ(b) = −½·t(1−t)·(b−a)ᵀA(b−a); the draws are repeated here.
    model, images, labels = quadratic
    images = 0.2 + 0.6 * images
    found = linearity.measure(model, images, labels, options, generator, _first_logit)
    again = torch.Generator().manual_seed(0)
    linearity.measure(*linear, options, again, margin)
    eps = 4 / 255
    a, b = (
        images + eps * (2 * torch.rand(images.shape, generator=again).double() - 1)
        for _ in range(2)
    )
    t = torch.rand(6, generator=again).double()
    between = (b - a).flatten(1)
    expected = 0.5 * t * (1 - t) * ((between @ model.matrix) * between).sum(1)
    torch.testing.assert_close(found["error"], expected.square(), rtol=1e-6, atol=1e-20)


def test_the_ends_of_a_segment_stay_in_the_box(options, generator):
    class InTheBox(nn.Module):
        def forward(self, images):
            assert images.amin() >= 0
            assert images.amax() <= 1
            return images.flatten(1)[:, :2]

    images = torch.zeros(3, 1, 2, 2)
    images[0] = 1
    linearity.measure(InTheBox(), images, torch.zeros(3).long(), options, generator)


def test_smallest_eps_of_a_linear_classifier(linear, generator):
    model, images, _ = linear
    weight = model.weight.detach()
    # (w·x + b)/‖w‖₁, of either sign. One below the first radius, the others up to one out of
    # reach; the last one is labelled wrongly.
    expected = torch.tensor([0.3, 1, 3, 7.7, 12.5, 20, 31.9, 40, 5], dtype=torch.float64)
    sign = torch.tensor([1, -1, 1, -1, 1, -1, 1, -1, 1], dtype=torch.float64)
    off = 0.05 * (images - 0.5).flatten(1)
    off = off - (off @ weight)[:, None] / weight.square().sum() * weight
    along = (sign * expected / 255)[:, None] * weight.sign()
    images = (0.5 + off + along).view_as(images)
    assert images.min() > 32 / 255  # so that the box does not matter
    assert images.max() < 1 - 32 / 255
    labels = (sign < 0).long()
    labels[8] = 1 - labels[8]
    found = curve.measure(model, images, labels, Options(curve_steps=8), generator)
    found = found["smallest_eps_255"]
    assert found[7] == math.inf
    assert found[8] == 0
    inside = torch.arange(7)
    # Bisection ends above the boundary, by a 1024th of the interval between two doublings.
    interval = 2 ** expected.log2().floor().clamp(min=0)
    assert (found[inside] >= expected[inside]).all()
    assert (found - expected)[inside].le(interval[inside] / 1024 + 1e-6).all()
    summary = curve.summarise({"smallest_eps_255": found}, Options())
    accuracy = dict(zip(summary["eps_255"], summary["accuracy"], strict=True))
    assert accuracy[0] == pytest.approx(8 / 9)
    assert accuracy[0.5] == pytest.approx(7 / 9)
    assert accuracy[12] == pytest.approx(4 / 9)
    assert accuracy[32] == pytest.approx(1 / 9)
    assert summary["unbroken"] == pytest.approx(1 / 9)


def test_low_pass_at_full_radius_is_the_identity_and_at_zero_the_mean():
    for shape in ((2, 3, 8, 8), (1, 1, 7, 9), (1, 2, 12, 5)):
        images = torch.rand(shape, dtype=torch.float64)
        full = math.hypot(*shape[-2:]) / 2
        torch.testing.assert_close(frequency.low_pass(images, full), images, rtol=0, atol=1e-14)
        mean = images.mean((2, 3), keepdim=True).expand(shape)
        torch.testing.assert_close(frequency.low_pass(images, 0), mean, rtol=0, atol=1e-14)


def test_low_pass_is_the_centred_transform_with_a_mask():
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    rows, columns = numpy.mgrid[-8:8, -8:8]
    for radius in (1, 3, 5.5, 8):
        spectrum = numpy.fft.fftshift(numpy.fft.fft2(images.numpy()), axes=(-2, -1))
        spectrum[..., rows**2 + columns**2 > radius**2] = 0
        expected = numpy.fft.ifft2(numpy.fft.ifftshift(spectrum, axes=(-2, -1))).real
        found = frequency.low_pass(images, radius)
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-14)


def test_a_model_that_sees_one_frequency_needs_it(options, generator):
    # Waves of 5 periods along a side of 28, one phase for each class.
    wave = torch.cos(2 * math.pi * 5 * torch.arange(28) / 28)
    images = (0.5 + 0.4 * torch.stack([wave, -wave])).view(2, 1, 1, 28).expand(2, 1, 28, 28)

    class Phase(nn.Module):
        def forward(self, images):
            score = (images * wave).sum((1, 2, 3))
            return torch.stack([score, torch.full_like(score, 1e-3)], 1)

    assert frequency.radii(28) == [*range(2, 14), 14]
    assert frequency.radii(224) == [*range(4, 112, 2), 112]
    columns = frequency.measure(Phase(), images, torch.tensor([0, 1]), options, generator)
    summary = frequency.summarise(columns, options)
    expected = [0.5 if radius < 5 else 1.0 for radius in summary["radii"]]
    assert summary["accuracy"] == expected
    assert columns["correct"][0].tolist() == [radius >= 5 for radius in summary["radii"]]


class Contours(nn.Module):
    """Two classes; the score weighs each pixel with a given map."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, images):
        score = (images * self.weights).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)


def test_edge_correlation_of_gradients_on_and_off_the_contour(options, generator):
    images = torch.zeros(1, 1, 24, 24, dtype=torch.float64)
    images[..., 12:] = 0.8
    energy = edges.contour_energy(images)
    noise = torch.rand(1, 1, 24, 24, dtype=torch.float64)
    for weights, expected in (
        (3 * energy.clamp(min=1e-3), 1.0),  # the gradient is the contour, up to a factor
        (energy.clamp(min=1e-3) ** -2, -1.0),
    ):
        model = Contours(weights / weights.max() / 100)
        found = edges.measure(model, images, torch.tensor([0]), options, generator)
        assert found["correlation"].item() == pytest.approx(expected, abs=1e-9)
    found = edges.measure(Contours(noise / 100), images, torch.tensor([0]), options, generator)
    reference = numpy.corrcoef(
        energy.clamp(min=1e-3).log().flatten().numpy(), noise.log().flatten().numpy()
    )[0, 1]
    assert found["correlation"].item() == pytest.approx(reference, abs=1e-12)


def test_flat_images_have_no_edge_correlation_and_are_left_out(options, generator):
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    images[1] = 0.5
    model = Contours(torch.rand(1, 1, 8, 8, dtype=torch.float64))
    columns = edges.measure(model, images, torch.zeros(3).long(), options, generator)
    assert columns["correlation"].isnan().tolist() == [False, True, False]
    summary = edges.summarise(columns, options)
    assert summary["left_out"] == 1
    assert summary["mean"] == pytest.approx(columns["correlation"][[0, 2]].mean().item())


def test_gradient_statistics_of_a_linear_model(linear, options, generator):
    model, images, labels = linear
    labels = labels.clone()
    labels[0] = 1 - labels[0]
    columns = gradients.measure(model, images, labels, options, generator)
    # ∇CE = −(1 − p_y)·∇(z_y − z_other), whose L1 norm is ‖w‖₁.
    with torch.no_grad():
        doubt = 1 - model(images).softmax(1).gather(1, labels[:, None]).squeeze(1)
    weight = model.weight.detach()
    torch.testing.assert_close(columns["l1"], doubt * weight.abs().sum())
    torch.testing.assert_close(columns["l2"], doubt * weight.norm())
    by_channel = weight.view(3, 16).abs().sum(1)
    torch.testing.assert_close(columns["channel_l1"], doubt[:, None] * by_channel)
    own = (labels == 0).double()
    torch.testing.assert_close(columns["logit_l1"], own * weight.abs().sum())
    distance = 255 * model(images)[:, 0].detach().abs() / weight.abs().sum()
    right = torch.arange(9) > 0
    assert torch.equal(columns["correct"], right)
    assert torch.equal(columns["robust"], right & (distance > 4))
    assert (columns["pixels"].sum(2) == 16).all()
    edges = gradients.PIXEL_BINS.double()
    expected = numpy.histogram((doubt[3] * weight[:16]).abs().log10().numpy(), edges.numpy())[0]
    assert columns["pixels"][3, 0].tolist() == expected.tolist()

    summary = gradients.summarise(columns, options)
    shares = (by_channel / by_channel.sum()).tolist()
    assert summary["channel_shares"] == pytest.approx(shares)
    assert summary["channel_asymmetry"] == pytest.approx((max(shares) - 1 / 3) * 1.5)
    assert summary["mean_l1"] == pytest.approx(columns["l1"].mean().item())
    assert summary["mean_l1_wrong"] == pytest.approx(columns["l1"][0].item())


def test_gini_coefficient():
    assert gradients.gini(torch.ones(50)) == pytest.approx(0)
    assert gradients.gini(torch.tensor([0.0] * 99 + [1.0])) == pytest.approx(0.99)
    assert gradients.gini(torch.zeros(3)) == 0
    values = torch.rand(40, dtype=torch.float64)
    pairs = (values[:, None] - values[None, :]).abs().mean() / values.mean() / 2
    assert gradients.gini(values) == pytest.approx(pairs.item())


def test_interpolation_through_the_worst_point_of_a_linear_model(linear, options, generator):
    model, images, labels = linear
    columns = interpolation.measure(model, images, labels, options, generator)
    # The worst point is x ∓ ε·sign(w), where the margin has fallen by ε·‖w‖₁; twice at t = 2.
    weight = model.weight.detach()
    total = weight.abs().sum()
    start = margin(model(images), labels).detach()
    for index, t in enumerate(torch.linspace(0, 2, 16).tolist()):
        margins = start - t * 4 / 255 * total
        doubt = torch.sigmoid(-margins)
        torch.testing.assert_close(
            columns["loss"][:, index], nn.functional.softplus(-margins), rtol=1e-5, atol=1e-7
        )
        torch.testing.assert_close(columns["l1"][:, index], doubt * total, rtol=1e-5, atol=1e-7)
        # H = p(1 − p)·wwᵀ, and the gradient lies along w already.
        expected = doubt * (1 - doubt) * weight.square().sum() / (doubt * weight.norm() + 1e-6)
        torch.testing.assert_close(columns["curvature"][:, index], expected, rtol=1e-3, atol=1e-6)
        assert torch.equal(columns["correct"][:, index], margins > 0)
    summary = interpolation.summarise(columns, options)
    assert summary["eps_255"][-1] == pytest.approx(8)
    assert summary["mean_loss"][0] == pytest.approx(columns["loss"][:, 0].mean().item())


class FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@pytest.mark.parametrize("needs", ["curvature", "interpolation"])
def test_a_model_without_second_derivative_is_told(needs, options, generator):
    class Attention(nn.Module):
        def forward(self, images):
            mixed = nn.functional.scaled_dot_product_attention(images, images, images)
            return mixed.mean((2, 3))

    class Custom(nn.Module):
        def forward(self, images):
            return FirstOrderOnly.apply(images.flatten(1))

    images, labels = torch.rand(2, 4, 4, 4), torch.tensor([0, 1])
    measure = {"curvature": curvature, "interpolation": interpolation}[needs].measure
    for model in (Attention(), Custom()):
        with pytest.raises(NotDifferentiableError, match="not twice differentiable"):
            measure(model, images, labels, options, generator)


def test_a_model_without_any_derivative_is_told():
    class Rounded(nn.Module):
        def forward(self, images):
            return (255 * images.flatten(1)).byte().float()

    with pytest.raises(NotDifferentiableError, match="no gradient of its logits"):
        input_gradients(Rounded(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
