"""The raw ops: what they move, what they accept, and that every backend serves every layout."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gn_kernels
from gn_kernels.activation import ACTIVATIONS, formula

KINDS = tuple(ACTIVATIONS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ops = torch.ops.gn_kernels


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that go into and come out of each op; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.bytes[func._schema.name] = self.bytes.get(func._schema.name, 0) + size
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved_through_autograd_on_meta(kind, dtype):
    x, grad = (
        torch.empty(64, 100, device="meta", dtype=dtype, requires_grad=True) for _ in range(2)
    )
    with Traffic() as traffic:
        y = gn_kernels.activation(x, kind)
        (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
        torch.autograd.grad(dx, (x, grad), torch.empty_like(dx))
    tensor = x.numel() * x.element_size()
    del traffic.bytes["aten::empty_like"]  # the cotangent that this test made
    assert traffic.bytes == {
        "gn_kernels::activation_forward": 2 * tensor,
        "gn_kernels::activation_backward": 3 * tensor,
        "gn_kernels::activation_double_backward": 5 * tensor,
    }


def layouts():
    base = torch.randn(2, 6, 4, 10, dtype=torch.float64)
    return {
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3),
        "chunk half": base.chunk(2, dim=-1)[1],
        "strided": base[:, ::2],
        "expanded": base[:, :1].expand(2, 6, 4, 10),
        "negative offset": base.flip(0)[1:],
        "0-d": base[0, 0, 0, 0],
        "empty": base[:0],
        "size 1 dims": base[:1, :, :1].as_strided((1, 6, 1, 10), (7, 40, 3, 1)),
    }


def strides(x):
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout, backend):
    x = layouts()[layout]
    # Cotangents of another layout: reversed strides, and an expanded scalar.
    grad = torch.randn(x.shape[::-1]).double().permute(list(reversed(range(x.dim()))))
    v = torch.randn(()).double().expand(x.shape)
    before = x.clone()
    with gn_kernels.use_backend(backend):
        for kind in KINDS:
            y = ops.activation_forward(x, kind)
            dx = ops.activation_backward(grad, x, kind)
            pair = ops.activation_double_backward(v, grad, x, kind, [True, True])
            torch.testing.assert_close(y, formula.forward(x, kind))
            torch.testing.assert_close(dx, formula.backward(grad, x, kind))
            for a, b in zip(
                pair, formula.double_backward(v, grad, x, kind, (True, True)), strict=True
            ):
                torch.testing.assert_close(a, b)
            for out in (y, dx, *pair):
                assert strides(out) == strides(torch.empty_like(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dense_layouts_are_not_copied(memory_format):
    x, grad, v = (torch.randn(2, 3, 4, 5).to(memory_format=memory_format) for _ in range(3))
    with Traffic() as traffic:
        ops.activation_double_backward(v, grad, x, "gelu", [True, True])
    assert set(traffic.bytes) == {"gn_kernels::activation_double_backward"}


@pytest.mark.parametrize("mask", [[True, True], [True, False], [False, True], [False, False]])
def test_output_mask(mask, backend):
    x, grad, v = (torch.randn(33) for _ in range(3))
    with gn_kernels.use_backend(backend):
        outputs = ops.activation_double_backward(v, grad, x, "silu", mask)
    expected = formula.double_backward(v, grad, x, "silu", (True, True))
    for asked, out, want in zip(mask, outputs, expected, strict=True):
        if asked:
            torch.testing.assert_close(out, want)
        else:
            assert out.shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    x, grad, v = (torch.randn(3, 5) for _ in range(3))
    for op, arguments in (
        (ops.activation_forward.default, (x, kind)),
        (ops.activation_backward.default, (grad, x.t().contiguous().t(), kind)),
        (ops.activation_double_backward.default, (v, grad, x, kind, [True, False])),
    ):
        torch.library.opcheck(op, arguments)


OPINFO_FUNCTIONS = {
    "nn.functional.gelu": gn_kernels.gelu,
    "nn.functional.silu": gn_kernels.silu,
}


@pytest.mark.parametrize("name", OPINFO_FUNCTIONS)
def test_pytorch_samples_pass_gradcheck_and_gradgradcheck(name, backend):
    info = next(op for op in op_db if op.name == name)
    function = OPINFO_FUNCTIONS[name]
    samples = list(info.sample_inputs("cpu", torch.float64, requires_grad=True))
    assert samples
    with gn_kernels.use_backend(backend):
        for sample in samples:
            arguments = {k: v for k, v in sample.kwargs.items() if k != "inplace"}
            torch.testing.assert_close(
                function(sample.input, **arguments), info.op(sample.input, **arguments)
            )
            if sample.input.numel():

                def call(x, arguments=arguments):
                    return function(x, **arguments)

                # The interpreter takes a call for each element: along one direction only.
                fast = backend == "triton"
                assert torch.autograd.gradcheck(call, sample.input, fast_mode=fast)
                assert torch.autograd.gradgradcheck(call, sample.input, fast_mode=fast)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: gn_kernels.gelu(x.int()), NotImplementedError, "x must be float16.*int32"),
        (lambda x: gn_kernels.silu(x + 0j), NotImplementedError, "x must be .*complex64"),
        (lambda x: gn_kernels.silu(x.to_sparse()), NotImplementedError, "x must be a strided"),
        (lambda x: gn_kernels.silu([1.0]), TypeError, "x must be a Tensor, but got list"),
        (lambda x: gn_kernels.activation(x, "relu"), ValueError, "kind must be one of .*'relu'"),
        (lambda x: gn_kernels.gelu(x, "fast"), RuntimeError, "approximate must be 'none' or"),
        (
            lambda x: ops.activation_backward(x.double(), x, "gelu"),
            RuntimeError,
            "grad must be of dtype of x, torch.float32, but got torch.float64",
        ),
        (
            lambda x: ops.activation_double_backward(x[:2], x, x, "gelu", [True, True]),
            RuntimeError,
            r"v must be of shape of x, \(3,\), but got \(2,\)",
        ),
        (
            lambda x: ops.activation_backward(x.to("meta"), x, "gelu"),
            RuntimeError,
            "grad must be on the device of x, cpu, but got meta",
        ),
        (lambda x: ops.activation_forward(x.int(), "gelu"), NotImplementedError, "x must be"),
        (lambda x: ops.activation_forward(x, "mish"), ValueError, "kind must be one of"),
        (
            lambda x: gn_kernels.ActivationFunction.apply(x, "mish"),
            ValueError,
            "kind must be one of",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(3))


def test_the_lists_of_kinds_agree():
    from gn_kernels.activation import triton_kernels

    assert tuple(triton_kernels.KINDS) == KINDS
    build = pytest.importorskip("gn_kernels._build_info", reason="the C++ kernels are not built")
    assert tuple(build.kinds) == KINDS
