from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gn_kernels.penalty import gradient_norm

NORMS = {"l1": 1, "l2": 2}


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
    expected = weight.sign() if norm == "l1" else weight / weight.norm()
    torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize("norm", NORMS)
def test_derivative_against_finite_differences(norm):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(weight, x):
        return gradient_norm(F.gelu(x @ weight).pow(2).sum(1), x, norm)

    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (weight, x))


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
