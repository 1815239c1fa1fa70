"""The Triton kernels of the activations, on a GPU where TRITON_INTERPRET is 0.

Otherwise on CPU tensors under Triton's interpreter. It computes with NumPy: it has no fused
multiply-add, its exp2 and rsqrt are as good as correctly rounded, it truncates to bf16, and it
misreads subnormal bf16 numbers. The fixture `hardware` makes it a GPU in all but the first.
"""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from scipy.special import expit, ndtr
from triton.runtime import interpreter

from gn_kernels.activation import ACTIVATIONS, triton_kernels

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    # The overflow of fp16 to infinity, and of exp2, is meant; NumPy warns of it.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
]

KINDS = triton_kernels.KINDS
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
ORDERS = ("value", "first", "second")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# The bars, all for unit cotangents. ULP: of the format, for 16 bits; ABSOLUTE adds to it near a
# derivative's roots, and scales with the cotangents. FP32: for |x| ≤ 10.
ULP = 0.51
ABSOLUTE = 4e-7
FP32 = {
    "gelu": (7e-7, 2e-7, 2e-7),
    "gelu_tanh": (1e-6, 2e-7, 3e-7),
    "silu": (1e-6, 2e-7, 3e-7),
    "quick_gelu": (1e-6, 2e-7, 3e-7),
}

TANH = 2 * math.sqrt(2 / math.pi)
GATES = {
    "gelu_tanh": lambda x: (
        TANH * (x + 0.044715 * x**3),
        TANH * (1 + 3 * 0.044715 * x**2),
        TANH * 6 * 0.044715 * x,
    ),
    "silu": lambda x: (x, 1.0, 0.0),
    "quick_gelu": lambda x: (1.702 * x, 1.702, 0.0),
}
EAGER = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
MPMATH = {
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_tanh": lambda x: (
        x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2
    ),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "quick_gelu": lambda x: x / (1 + mpmath.exp(-mpmath.mpf("1.702") * x)),
}


def oracle(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """f, f′ and f″ in float64, for finite x, by SciPy."""
    x = x.double().numpy()
    if kind == "gelu":
        density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        orders = (x * ndtr(x), ndtr(x) + x * density, (2 - x * x) * density)
    else:
        g, g1, g2 = GATES[kind](x)
        sigma, slope = expit(g), expit(g) * expit(-g)
        orders = (
            x * sigma,
            sigma + x * g1 * slope,
            slope * (2 * g1 + x * g2 - x * g1 * g1 * np.tanh(g / 2)),
        )
    return tuple(map(torch.as_tensor, orders))


def exact(kind: str, order: int, x: torch.Tensor) -> torch.Tensor:
    """The same from the definition of f alone."""
    with mpmath.workdps(200):
        values = [
            float(mpmath.diff(MPMATH[kind], mpmath.mpf(value), order)) for value in x.tolist()
        ]
    return torch.tensor(values, dtype=torch.float64)


def run(kind: str, x: torch.Tensor, grad: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """f, grad·f′, v·f′ and v·grad·f″ by the kernels."""
    x, grad, v = (t.to(DEVICE) for t in (x, grad, v))
    outputs = (
        triton_kernels.forward(x, kind),
        triton_kernels.backward(grad, x, kind),
        *triton_kernels.double_backward(v, grad, x, kind, [True, True]),
    )
    return [y.cpu() for y in outputs]


def expected(kind: str, x: torch.Tensor, grad: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    f, f1, f2 = oracle(kind, x)
    grad, v = grad.double(), v.double()
    return [f, grad * f1, v * f1, v * grad * f2]


def ours(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """f, f′ and f″ by the kernels."""
    one = torch.ones_like(x)
    f, f1, _, f2 = run(kind, x, one, one)
    return f, f1, f2


def eager(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    one = torch.ones_like(x)
    y = EAGER[kind](x)
    (first,) = torch.autograd.grad(y, x, one, create_graph=True)
    (second,) = torch.autograd.grad(first, x, one)
    return y.detach(), first.detach(), second


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 values of a 16-bit format."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def ulp(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(truth.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(truth, info.eps), exponent - 1)


@pytest.fixture
def hardware(monkeypatch):
    """Convert bf16 as a GPU does, and give exp2 and rsqrt the largest errors of the hardware.

    PTX bounds those of ex2.approx and rsqrt.approx by 2⁻²² and 2⁻²²·⁹; AMD's are smaller.
    """
    builder = interpreter.InterpreterBuilder
    cast, exp2, rsqrt = builder.cast_impl, builder.create_exp2, builder.create_rsqrt

    def cast_bf16(self, value, dtype):
        # As PyTorch converts: to nearest even, and subnormal numbers too.
        to = dtype.scalar
        data = torch.from_numpy(np.ascontiguousarray(value.data))
        if (value.dtype.scalar.name, to.name) == ("bf16", "fp32"):
            converted = data.view(torch.bfloat16).float().numpy()
        elif (value.dtype.scalar.name, to.name) == ("fp32", "bf16"):
            converted = data.to(torch.bfloat16).view(torch.uint16).numpy()
        else:
            return cast(self, value, dtype)
        return interpreter.TensorHandle(converted, to)

    def scaled(function, factor):
        def approximate(self, value):
            result = function(self, value)
            if result.data.dtype == np.float32:
                exactly = result.data.astype(np.float64) * factor
                result = interpreter.TensorHandle(exactly.astype(np.float32), result.dtype)
            return result

        return approximate

    def set_errors(of_exp2: float = 0.0, of_rsqrt: float = 0.0) -> None:
        monkeypatch.setattr(builder, "cast_impl", cast_bf16)
        monkeypatch.setattr(builder, "create_exp2", scaled(exp2, 1 + of_exp2))
        monkeypatch.setattr(builder, "create_rsqrt", scaled(rsqrt, 1 + of_rsqrt))

    return set_errors


# Of exp2 and of rsqrt. Those of one sign add up in every form; the others are for completeness.
EXP2, RSQRT = 2.0**-22, 2.0**-22.9
ERRORS = [
    pytest.param(0.0, 0.0, id="none"),
    pytest.param(EXP2, RSQRT, id="++"),
    pytest.param(-EXP2, -RSQRT, id="--"),
    pytest.param(EXP2, -RSQRT, id="+-", marks=pytest.mark.slow),
    pytest.param(-EXP2, RSQRT, id="-+", marks=pytest.mark.slow),
]


def test_the_kinds_are_those_of_the_formula():
    assert set(KINDS) == set(ACTIVATIONS)


@each_kind
@pytest.mark.parametrize("order", range(3), ids=ORDERS)
def test_the_oracle_against_mpmath(kind, order):
    x = torch.linspace(-12, 12, 98, dtype=torch.float64)
    truth = exact(kind, order, x)
    # exp multiplies the rounding of its argument, at most 130 here, by that argument.
    torch.testing.assert_close(oracle(kind, x)[order], truth, rtol=1e-13, atol=1e-15)


@each_kind
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("of_exp2", "of_rsqrt"), ERRORS)
def test_16_bits_are_correctly_rounded_within_a_hundredth_of_an_ulp(
    kind, dtype, of_exp2, of_rsqrt, hardware
):
    hardware(of_exp2, of_rsqrt)
    x = every_value(dtype)
    x = x[x.abs() <= 10]
    v, grad = torch.randn(2, x.numel()).to(dtype)
    actual, truths = run(kind, x, grad, v), expected(kind, x, grad, v)
    v, grad = v.double(), grad.double()
    scales = (torch.zeros_like(v), grad, v, v * grad)
    for name, y, truth, scale in zip(
        ("f", "grad·f′", "v·f′", "v·grad·f″"), actual, truths, scales, strict=True
    ):
        error = (y.double() - truth).abs() - ABSOLUTE * scale.abs()
        worst = (error / ulp(truth, dtype)).argmax()
        assert error[worst] <= ULP * ulp(truth, dtype)[worst], (name, x[worst])


@each_kind
def test_fp32_is_no_worse_than_eager_pytorch(kind):
    # By buckets of x. The largest of a bucket's errors is a matter of chance where both compute the
    # same thing: a quarter more passes, 3 ulp of the bucket's largest value, and 2⁻¹⁰⁰, since the
    # kernels' exponential has no subnormal values.
    width, count = 0.5, 1024
    starts = np.arange(-12, 12, width)
    x = torch.cat([torch.linspace(s, s + width, count) for s in starts])
    per_order = zip(ours(kind, x), eager(kind, x), oracle(kind, x), FP32[kind], strict=True)
    for order, (y, peer, truth, bar) in zip(ORDERS, per_order, strict=True):
        error, allowed, largest = (
            t.reshape(-1, count).amax(1)
            for t in ((y - truth).abs(), (peer - truth).abs(), truth.abs())
        )
        allowed = (1.25 * allowed).clamp(min=2.0**-100).maximum(3 * 2.0**-23 * largest)
        worse = starts[(error > allowed).numpy()]
        assert worse.size == 0, (order, worse)
        assert (y - truth).abs()[x.abs() <= 10].max() <= bar, order


@each_kind
@pytest.mark.parametrize("order", range(3), ids=ORDERS)
def test_fp64_against_mpmath(kind, order):
    x = torch.linspace(-12, 12, 98, dtype=torch.float64)
    truth = exact(kind, order, x)
    # 4 roundings of terms of the size of x.
    tolerance = 4 * 2.0**-53 * (1 + x.abs())
    assert ((ours(kind, x)[order] - truth).abs() <= tolerance).all()


@each_kind
@each_dtype
def test_limits(kind, dtype, hardware):
    hardware()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.inf, largest, 2e4, -2e4, -largest, -math.inf], dtype=dtype)
    small = torch.tensor([0.0, -0.0, 8 * smallest, -8 * smallest], dtype=dtype)

    f, f1, f2 = ours(kind, x)
    assert f.tolist() == [*x[:3].tolist(), 0, 0, 0]
    assert f[-1].signbit()
    assert f1.tolist() == [1, 1, 1, 0, 0, 0]
    assert f2.tolist() == [0, 0, 0, 0, 0, 0]

    f, f1, _ = ours(kind, small)
    assert f.tolist() == (small / 2).tolist()
    assert f.signbit().tolist() == [False, True, False, True]
    assert f1.tolist() == [0.5, 0.5, 0.5, 0.5]


@each_kind
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_nan_comes_from_nan_alone(kind, dtype):
    x = every_value(dtype)
    for y in ours(kind, x):
        assert torch.equal(y.isnan(), x.isnan())


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_large_values_in_wide_types(kind, dtype):
    x = torch.tensor([math.nan, 1e30, -1e30, 1e5, -1e5, 800.0, -800.0, 90.0, -90.0], dtype=dtype)
    for y in ours(kind, x):
        assert y.isnan().tolist() == [True] + [False] * 8


@pytest.fixture
def guarded(monkeypatch):
    """Put NaN into and around every output; its value checks what is left of it."""
    margin, buffers = 2048, []

    def empty_like(x):
        buffer = torch.full((x.numel() + 2 * margin,), math.nan, dtype=x.dtype, device=x.device)
        buffers.append(buffer)
        return buffer.as_strided(x.shape, x.stride(), margin)

    def check(count: int) -> None:
        assert len(buffers) == count, "allocates its outputs and nothing else"
        for buffer in buffers:
            assert not buffer[margin:-margin].isnan().any()
            assert buffer.isnan().sum() == 2 * margin

    monkeypatch.setattr(torch, "empty_like", empty_like)
    return check


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_every_element_and_no_other_is_written(n, dtype, guarded):
    tensors = torch.randn(3, n).to(dtype)
    before = tensors.clone()
    outputs = run("silu", *tensors)
    guarded(4)
    assert torch.equal(tensors, before)
    tolerance = 2 * torch.finfo(dtype).eps
    for y, truth in zip(outputs, expected("silu", *tensors), strict=True):
        torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=2)))
@each_kind
def test_an_output_that_is_not_asked_for_does_not_exist(mask, kind, guarded):
    x, grad, v = torch.randn(3, 1500, device=DEVICE)
    outputs = triton_kernels.double_backward(v, grad, x, kind, mask)
    guarded(sum(mask))
    both = triton_kernels.double_backward(v, grad, x, kind, (True, True))
    for asked, output, reference in zip(mask, outputs, both, strict=True):
        if asked:
            torch.testing.assert_close(output, reference, rtol=0, atol=1e-6)
        else:
            assert output.shape == (0,)
            assert (output.dtype, output.device) == (x.dtype, x.device)


LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 5, 7, 9).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(30, 40).T,
    "0-d": lambda: torch.randn(()),
    "unaligned": lambda: torch.randn(1501)[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_kind
def test_layouts(layout, kind):
    tensors = [LAYOUTS[layout]() for _ in range(3)]
    for y, truth in zip(run(kind, *tensors), expected(kind, *tensors), strict=True):
        assert y.stride() == tensors[0].stride()
        torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-6)
