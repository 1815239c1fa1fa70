"""The raw ops and the function: what they move and keep, accept and refuse; the module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gn_kernels
from tests.layer_norm import plain
from tests.layer_norm.plain import OPS, make

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)

# One of PyTorch's samples has a negative eps.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


class Calls(TorchDispatchMode):
    """Numbers in the tensors that go into and come out of each op, and its output mask."""

    def __init__(self):
        super().__init__()
        self.numbers, self.masks = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("gn_kernels::layer_norm_")
        if "::" not in name:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            self.numbers[name] = sum(t.numel() for t in tensors)
            self.masks[name] = args[-1]
        return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_moved_through_autograd_on_meta(dtype):
    rows, n = 640, 100
    x, grad = (
        torch.empty(rows, n, device="meta", dtype=dtype, requires_grad=True) for _ in range(2)
    )
    weight, bias = (torch.empty(n, device="meta", dtype=dtype, requires_grad=True) for _ in "wb")
    with Calls() as calls:
        y = gn_kernels.layer_norm(x, (n,), weight, bias)
        (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
        torch.autograd.grad(dx, (grad, x, weight), torch.empty_like(dx))
    assert calls.numbers == {
        "forward": 2 * rows * n + 2 * n + 2 * rows,
        # dx alone was asked for: neither dweight nor dbias is computed.
        "backward": 3 * rows * n + 2 * n + 2 * rows,
        "double_backward": 5 * rows * n + 2 * n + 2 * rows,
    }


def test_what_is_saved():
    case = make((6, 7), dtype=torch.float32)
    leaves = [one.clone().requires_grad_() for one in (case.x, case.weight, case.bias, case.grad)]
    x, weight, bias, grad = leaves
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gn_kernels.layer_norm(x, (7,), weight, bias)
        torch.autograd.grad(y, x, grad, create_graph=True)
    for leaf in leaves:
        del saved[leaf.untyped_storage().data_ptr()]
    assert [(t.shape, t.dtype) for t in saved.values()] == [((6,), torch.float32)] * 2


@pytest.mark.parametrize("constant", ["grad", "x", "weight"])
def test_only_what_is_asked_for_is_computed(constant):
    case = make((4, 5))
    inputs = {"grad": case.grad.clone(), "x": case.x.clone(), "weight": case.weight.clone()}
    for name, value in inputs.items():
        value.requires_grad_(name != constant)
    wanted = [value for name, value in inputs.items() if name != constant]
    with Calls() as calls:
        y = gn_kernels.layer_norm(inputs["x"], (5,), inputs["weight"])
        source = inputs["weight" if constant == "x" else "x"]
        (first,) = torch.autograd.grad(y, source, inputs["grad"], create_graph=True)
        first.backward(torch.ones_like(first), inputs=wanted)
    assert tuple(calls.masks["double_backward"]) == tuple(name != constant for name in inputs)
    assert calls.masks["backward"][2] is False  # there is no bias


def sample_inputs():
    (info,) = (info for info in op_db if info.name == "nn.functional.layer_norm")
    return list(info.sample_inputs("cpu", torch.float64, requires_grad=True))


def test_samples_of_pytorch(backend):
    for sample in sample_inputs():
        arguments, keywords = (sample.input, *sample.args), sample.kwargs
        expected = F.layer_norm(*arguments, **keywords)
        with gn_kernels.use_backend(backend):
            actual = gn_kernels.layer_norm(*arguments, **keywords)
            torch.testing.assert_close(actual, expected)
            leaves = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
            for a, e in zip(
                torch.autograd.grad(actual.sin().sum(), leaves),
                torch.autograd.grad(expected.sin().sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("with_parameters", [True, False])
def test_opcheck(with_parameters):
    x, shape, weight, bias, grad, v, u, t, eps = make(
        (4, 3, 5), dtype=torch.float32, weight=with_parameters, bias=with_parameters
    )
    _, mean, rstd = OPS.layer_norm_forward(x, shape, weight, bias, eps)
    mask = [True, with_parameters, with_parameters]
    torch.library.opcheck(OPS.layer_norm_forward.default, (x, shape, weight, bias, eps))
    torch.library.opcheck(
        OPS.layer_norm_backward.default, (grad, x, shape, weight, bias, mean, rstd, mask)
    )
    mask = [True, True, with_parameters]
    torch.library.opcheck(
        OPS.layer_norm_double_backward.default,
        (v, u, t, grad, x, shape, weight, mean, rstd, mask),
    )


def test_raw_ops_refuse_to_be_differentiated():
    case = make((2, 3))
    x = case.x.requires_grad_()
    y, mean, rstd = OPS.layer_norm_forward(x, (3,), None, None, 1e-5)
    mask = [True, False, False]
    saved = (case.grad, x, (3,), None)
    statistics = (mean.detach(), rstd.detach(), mask)
    for result in (
        y,
        OPS.layer_norm_backward(*saved, None, *statistics)[0],
        OPS.layer_norm_double_backward(case.v, None, None, *saved, *statistics)[0],
    ):
        with pytest.raises(NotImplementedError, match="raw kernel"):
            result.sum().backward()


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((X, (3,)), RuntimeError, "x must end in the dimensions of normalized_shape"),
        ((X, (2, 3, 4, 1)), RuntimeError, "x must end in the dimensions of normalized_shape"),
        ((X, ()), RuntimeError, "normalized_shape must name at least one"),
        ((X[..., :0], (0,)), RuntimeError, "a row of length 0 has no mean"),
        ((X, (4,), torch.ones(3)), RuntimeError, "weight must be of normalized_shape"),
        ((X, (3, 4), torch.ones(12)), RuntimeError, "weight must be of normalized_shape"),
        ((X, (4,), None, torch.ones(5)), RuntimeError, "bias must be of normalized_shape"),
        ((X, (4,), torch.ones(4).bfloat16()), RuntimeError, "weight must be float32 beside"),
        ((X.double(), (4,), torch.ones(4)), RuntimeError, "weight must be float64 beside"),
        (
            (X.half(), (4,), torch.ones(4), torch.ones(4).half()),
            RuntimeError,
            "bias must be of weight's dtype",
        ),
        ((X, (4,), torch.ones(4, device="meta")), RuntimeError, "weight must be on the device"),
        ((X.int(), (4,)), NotImplementedError, "x must be float16, bfloat16"),
        ((X.to_sparse(), (4,)), NotImplementedError, "x must be a strided tensor"),
        (([1.0], (1,)), TypeError, "x must be a Tensor"),
        ((X, (4,), [1.0]), TypeError, "weight must be a Tensor"),
    ],
)
def test_refusals(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        gn_kernels.layer_norm(*arguments)


def test_refusals_of_the_raw_ops():
    x, shape, weight, bias, grad, v, u, t, eps = make((2, 3))
    _, mean, rstd = OPS.layer_norm_forward(x, shape, weight, bias, eps)
    mask = [True] * 3
    for sentence, arguments in (
        ("grad must be of shape", (grad[:1], x, shape, weight, bias, mean, rstd, mask)),
        ("mean must be", (grad, x, shape, weight, bias, mean.float(), rstd, mask)),
        ("rstd must be", (grad, x, shape, weight, bias, mean, rstd[:, None], mask)),
        ("gradient of bias, which is absent", (grad, x, shape, weight, None, mean, rstd, mask)),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            OPS.layer_norm_backward(*arguments)
    for sentence, cotangents in (
        ("v must be of dtype", (v.float(), u, t)),
        ("u must be of normalized_shape", (v, u[:2], t)),
        ("t must be of normalized_shape", (v, u, t[:2])),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            OPS.layer_norm_double_backward(*cotangents, grad, x, shape, weight, mean, rstd, mask)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("parameter_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_gives_the_dtype_of_pytorch(dtype, parameter_dtype, device):
    def cast(dtype):
        return torch.float32 if device == "cuda" and dtype in HALF else dtype

    accepted = (None, cast(dtype), *((torch.float32,) if dtype in HALF else ()))
    enabled = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        with FakeTensorMode():  # casts need no GPU
            x = torch.empty(2, 3, dtype=dtype, device=device)
            weight = parameter_dtype and torch.empty(3, dtype=parameter_dtype, device=device)
            if parameter_dtype and cast(parameter_dtype) not in accepted:
                with pytest.raises(RuntimeError, match="weight must be"):
                    gn_kernels.layer_norm(x, (3,), weight)
            else:
                expected = F.layer_norm(x, (3,), weight)
                assert gn_kernels.layer_norm(x, (3,), weight).dtype == expected.dtype
    finally:
        torch.set_autocast_enabled(device, enabled)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_native_bits_do_not_depend_on_the_number_of_threads(threads):
    case = make((700, 65), dtype=torch.float32)
    expected = plain.raw(case)
    torch.set_num_threads(threads)
    for name, value in plain.raw(case).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 1e-3},
        {"bias": False},
        {"elementwise_affine": False},
        {"dtype": torch.float64},
        {"device": "meta"},
    ],
)
@pytest.mark.parametrize("normalized_shape", [6, (6,), [5, 6]])
def test_module(normalized_shape, options):
    theirs = torch.nn.LayerNorm(normalized_shape, **options)
    ours = gn_kernels.nn.LayerNorm(normalized_shape, **options)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.LayerNorm)
    for parameter in theirs.parameters():
        if not parameter.is_meta:
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 6, dtype=options.get("dtype"), device=options.get("device"))
    expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype
    if not x.is_meta:
        torch.testing.assert_close(actual, expected)
