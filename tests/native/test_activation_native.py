"""The native CPU kernels: accuracy against scipy in float64, beside eager PyTorch's own error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special

from gn_kernels import backend
from gn_kernels.activation import ACTIVATIONS
from gn_kernels.activation.op import _Native as native

pytestmark = pytest.mark.skipif(
    backend.installed().native is not None, reason=f"native: {backend.installed().native}"
)

KINDS = ("gelu", "gelu_tanh", "silu", "quick_gelu")
EAGER = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def exact(kind, x):
    """f, f′, f″ in float64, through scipy's functions that keep relative accuracy in the tails."""
    x = x.double().numpy()
    with np.errstate(all="ignore"):
        if kind == "gelu":
            cdf, pdf = special.ndtr(x), np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
            return x * cdf, cdf + x * pdf, (2 - x * x) * pdf
        if kind == "gelu_tanh":
            a = 2 * np.sqrt(2 / np.pi)
            b = 0.044715 * a
            g, dg, ddg = a * x + b * x**3, a + 3 * b * x * x, 6 * b * x
        else:
            a = 1.702 if kind == "quick_gelu" else 1.0
            g, dg, ddg = a * x, a, 0.0
        s, rest = special.expit(g), special.expit(-g)
        return (
            x * s,
            s + x * dg * s * rest,
            s * rest * (2 * dg + x * ddg + x * dg * dg * (rest - s)),
        )


def ours(kind, x):
    """f, f′, f″ as the kernels give them with cotangents of one."""
    one = torch.ones_like(x)
    return (
        native.forward(x, kind),
        native.backward(one, x, kind),
        native.double_backward(one, one, x, kind, [True, True])[1],
    )


def eager(kind, x):
    x = x.clone().requires_grad_()
    y = EAGER[kind](x)
    (d1,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (d2,) = torch.autograd.grad(d1.sum(), x)
    return y.detach(), d1.detach(), d2


def error(results, truths):
    with np.errstate(invalid="ignore"):  # inf − inf, where both are at the limit
        return [np.abs(r.double().numpy() - t) for r, t in zip(results, truths, strict=True)]


def ulp(x, dtype):
    digits, smallest = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}[dtype]
    return np.exp2(np.maximum(np.frexp(x)[1] - digits, smallest).astype(float))


def test_the_lists_of_kinds_agree():
    from gn_kernels import _build_info

    assert set(_build_info.kinds) == set(KINDS) <= set(ACTIVATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_against_mpmath(kind):
    import mpmath as mp

    f = {
        "gelu": lambda x: x * mp.ncdf(x),
        "gelu_tanh": lambda x: x / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + 0.044715 * x**3))),
        "silu": lambda x: x / (1 + mp.exp(-x)),
        "quick_gelu": lambda x: x / (1 + mp.exp(-1.702 * x)),
    }[kind]
    points = torch.tensor([-9.5, -3.25, -0.75, -0.01, 0.5, 1.4, 6.0], dtype=torch.float64)
    with mp.workdps(60):
        for order, values in enumerate(exact(kind, points)):
            truth = [float(mp.diff(f, mp.mpf(p), order)) for p in points.tolist()]
            # Roundings of the argument of exp, at most 90, and of terms that cancel near zeros.
            np.testing.assert_allclose(values, truth, rtol=1e-13, atol=1e-15 * abs(order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_every_number(kind, dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    assert all(torch.equal(y.isnan(), x.isnan()) for y in ours(kind, x))
    x = x[x.abs() <= 10]
    truths = exact(kind, x)
    for order, mine in enumerate(error(ours(kind, x), truths)):
        mine = mine - (4e-7 if order else 0)  # f′ and f″ have zeros
        assert (mine / ulp(truths[order], dtype)).max() <= 0.51


# The largest error allowed to fp32, in units of 2⁻²⁴, the rounding of numbers next to 1. For f the
# number is scaled by | x | beyond 1.
FP32 = {"f": 2.0, "d1": 2.5, "d2": 4.5}


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_bucket_by_bucket_beside_eager(kind):
    edges = np.arange(-14, 14, 0.5)
    x = torch.cat([torch.linspace(low, low + 0.5, 3001)[:-1] for low in edges]).float()
    truths = exact(kind, x)
    errors = zip(error(ours(kind, x), truths), error(eager(kind, x), truths), FP32, strict=True)
    for mine, theirs, order in errors:
        mine, theirs = (e.reshape(len(edges), -1).max(axis=1) for e in (mine, theirs))
        for low, a, b in zip(edges, mine, theirs, strict=True):
            print(f"{kind:10} {order:2} [{low:5.1f}, {low + 0.5:5.1f})  {a:.1e}  eager {b:.1e}")
        unit = 2.0**-24
        scale = np.maximum(np.abs(edges), 1) if order == "f" else 1
        assert (mine <= FP32[order] * unit * scale).all()
        # Next to 0 eager's roundings happen to cancel: there ours may be one unit worse.
        assert (mine <= theirs + unit).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fp64(kind):
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    truths = exact(kind, x)
    assert all((e <= 5e-15).all() for e in error(ours(kind, x), truths))
    # f falls to 1e-89(gelu)with an exponential's argument of 200, itself rounded.
    tail = (x.numpy() < -1) & (truths[0] != 0)
    f = ours(kind, x)[0].numpy()
    assert (np.abs(f / truths[0] - 1)[tail]).max() <= (3e-13 if kind == "gelu_tanh" else 1e-13)


@pytest.mark.parametrize("dtype", backend.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_limits(kind, dtype):
    inf = float("inf")
    huge = 65504.0 if dtype == torch.float16 else 1e30
    x = torch.tensor([inf, huge, -inf, -huge, -0.0, 0.0, float("nan")], dtype=dtype)
    f, d1, d2 = ours(kind, x)
    assert torch.equal(f[:6], x[:6].clamp(min=0))
    assert torch.equal(f[:6].signbit(), x[:6].signbit())
    assert d1[:6].tolist() == [1, 1, 0, 0, 0.5, 0.5]
    assert d2[:4].tolist() == [0, 0, 0, 0]
    assert all(y[6].isnan() for y in (f, d1, d2))
    tiny = torch.finfo(dtype).smallest_normal / 8  # a subnormal, and so is its half
    assert native.forward(torch.tensor([tiny], dtype=dtype), kind).item() == tiny / 2


@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_cotangents_and_masks(dtype):
    x, grad, v = torch.randn(3, 1000).to(dtype)
    both = native.double_backward(v, grad, x, "gelu", [True, True])
    _, d1, d2 = exact("gelu", x)
    truths = v.double().numpy() * d1, (v.double() * grad.double()).numpy() * d2
    epsilon = 4 * torch.finfo(dtype).eps
    for result, truth in zip(both, truths, strict=True):
        np.testing.assert_allclose(result.double(), truth, rtol=epsilon, atol=epsilon)
    for mask in ([True, False], [False, True], [False, False]):
        for asked, result, full in zip(
            mask, native.double_backward(v, grad, x, "gelu", mask), both, strict=True
        ):
            assert torch.equal(result, full) if asked else result.shape == (0,)
    assert torch.equal(native.backward(v, x, "gelu"), both[0])


@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_threads_and_sizes_give_equal_bits(dtype):
    x = torch.randn(40_003).to(dtype)
    one_thread = native.double_backward(x, x, x, "silu", [True, True])
    torch.set_num_threads(2)
    two_threads = native.double_backward(x, x, x, "silu", [True, True])
    assert all(torch.equal(a, b) for a, b in zip(one_thread, two_threads, strict=True))
    for n in (0, 1, 63, 64, 65, 255, 256, 257, 16383, 16384, 16385, 32769):
        part = native.double_backward(x[:n], x[:n], x[:n], "silu", [True, True])
        assert all(torch.equal(a, b[:n]) for a, b in zip(part, one_thread, strict=True))


def test_outputs_have_the_strides_of_x():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    y = native.forward(x, "silu")
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, F.silu(x))


def test_errors():
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="no activation is named 'relu'"):
        native.forward(x, "relu")
    with pytest.raises(RuntimeError, match="float16, bfloat16, float32 or float64"):
        native.forward(x.to(torch.int32), "silu")
    with pytest.raises(RuntimeError, match="x must be dense"):
        native.forward(x[:, ::2], "silu")
    with pytest.raises(RuntimeError, match="x must be dense"):
        native.forward(x[:, :1].expand(4, 6), "silu")
    for other in (x.double(), x[:2], x.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="dtype, shape and strides"):
            native.backward(other, x, "silu")


@pytest.mark.slow
def test_coefficients_are_what_their_script_writes():
    pytest.importorskip("mpmath")
    source = Path(backend.__file__).parents[1] / "csrc"
    written = subprocess.run(
        [sys.executable, source / "coefficients.py"], check=True, capture_output=True, text=True
    ).stdout
    assert written == (source / "coefficients.h").read_text()


def test_library_may_be_loaded_before_the_schemas():
    library = Path(backend.__file__).with_name("_native.so")
    script = f"""
import torch
torch.ops.load_library({str(library)!r})
import gn_kernels.activation.op
x = torch.randn(5)
torch.testing.assert_close(
    torch.ops.gn_kernels.activation_forward.native(x, "silu"), torch.nn.functional.silu(x)
)
"""
    root = Path(backend.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
