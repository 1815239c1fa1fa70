from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gn_kernels.penalty import finite_difference_norm, gradient_norm

NORMS = {"l1": 1, "l2": 2, "linf": math.inf}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_a_loop_over_samples(norm, reduction):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3)).double()
    images = torch.rand(5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1])
    actual = gradient_norm(
        F.cross_entropy(model(images), labels, reduction=reduction), images, norm
    )
    norms = []
    for image, label in zip(images.detach(), labels, strict=True):
        image = image[None].requires_grad_()
        loss = F.cross_entropy(model(image), label[None])
        norms.append(torch.autograd.grad(loss, image)[0].flatten().norm(p=NORMS[norm]))
    torch.testing.assert_close(actual.detach(), torch.stack(norms).mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_linear_model_has_a_closed_form(norm):
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    penalty = gradient_norm((x @ weight).mean(), x, norm)
    torch.testing.assert_close(penalty, weight.norm(p=NORMS[norm]))
    (gradient,) = torch.autograd.grad(penalty, weight)
    expected = {
        "l1": weight.sign(),
        "l2": weight / weight.norm(),
        "linf": weight.sign() * (weight.abs() == weight.abs().max()),
    }[norm]
    torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize("norm", NORMS)
def test_derivative_against_finite_differences(norm):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(weight, x):
        return gradient_norm(F.gelu(x @ weight).pow(2).sum(1), x, norm)

    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (weight, x))


@pytest.mark.parametrize("norm", NORMS)
def test_weights_threshold_and_scale_have_closed_forms(norm):
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-0.25, 4.0]], dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([0.5, 2.0, 4.0, 8.0], dtype=torch.float64)  # of the samples
    losses = factors * (x * weight).sum((1, 2))
    options = {"channel_weights": (1, 2, 3), "threshold": 20.0, "scale": 3.0}
    weighted = weight * torch.tensor([[1.0], [2.0], [3.0]])
    norms = factors * weighted.flatten().norm(p=NORMS[norm])
    assert (norms < 20).any()
    assert (norms > 20).any()
    expected = (norms - 20).clamp_min(0).mean()
    actual = gradient_norm(losses, x, norm, create_graph=False, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)
    # The losses are linear: differences are exact at any step.
    differences, at_x = finite_difference_norm(
        lambda points: factors * (points * weight).sum((1, 2)), x, norm, step=0.5, **options
    )
    torch.testing.assert_close(differences.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(at_x, losses)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_accuracy_of_finite_differences_as_the_docstring_states_it(norm):
    images, labels = torch.rand(32, 192), torch.arange(32) % 10

    def weight_gradient(dtype, step_255=None):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(192, 64), nn.GELU()),
            *(nn.Linear(64, 64), nn.GELU()),
            nn.Linear(64, 10),
        ).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = images.to(dtype).requires_grad_()

        def losses(points):
            return F.cross_entropy(model(points).to(wide), labels, reduction="none")

        if step_255 is None:
            penalty = gradient_norm(losses(x), x, norm)
        else:
            penalty, _ = finite_difference_norm(losses, x, norm, step=step_255 / 255)
        gradients = torch.autograd.grad(
            penalty, list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten().double() for gradient in gradients])

    exact = weight_gradient(torch.float64)

    def error(*arguments):
        return ((weight_gradient(*arguments) - exact).norm() / exact.norm()).item()

    assert error(torch.float32) < 1e-6
    assert 2e-6 < error(torch.float32, 1.0) < 5e-5
    assert error(torch.bfloat16) < 0.05
    assert 0.05 < error(torch.bfloat16, 1.0) < 0.5
    assert error(torch.bfloat16, 16.0) < 0.05


def test_half_precision_is_summed_in_float32():
    x = torch.randn(2, 100_000, dtype=torch.bfloat16, requires_grad=True)
    penalty = gradient_norm(x.sum(1), x, create_graph=False)
    assert penalty.dtype == torch.float32
    assert penalty.item() == 100_000


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].sigmoid()


def test_a_dropped_second_order_is_an_error():
    # Such kernels train on without a penalty and without a word. once_differentiable says
    # nothing either unless somebody differentiates through it.
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient_norm(_FirstOrderOnly.apply(x).detach_().requires_grad_().sum() + 0 * x.sum(), x)


X = torch.ones(2, 3, requires_grad=True)


def test_bad_weights_and_steps():
    x = torch.rand(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="one number for each channel"):
        gradient_norm(x.square().sum(), x, channel_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="step must be above 0"):
        finite_difference_norm(lambda points: points.sum((1, 2)), x, step=0.0)


@pytest.mark.parametrize(
    ("loss", "x", "norm", "error", "match"),
    [
        (X.sum(), X, "l3", ValueError, "norm must be one of"),
        (X.sum(), torch.ones(2, 3), "l1", RuntimeError, "x must require grad"),
        (X.detach().sum(), X, "l1", RuntimeError, "loss must have a graph"),
        (X.sum(), torch.ones(2, 3, requires_grad=True), "l1", RuntimeError, "depend on x"),
        (X.sum(0), X, "l1", ValueError, r"a scalar or of shape \(2,\)"),
        (X.sum(), torch.ones((), requires_grad=True), "l1", ValueError, "x must have shape"),
        (X.sum(), torch.ones(0, 3, requires_grad=True), "l1", ValueError, "x must have shape"),
    ],
)
def test_bad_input(loss, x, norm, error, match):
    with pytest.raises(error, match=match):
        gradient_norm(loss, x, norm)
