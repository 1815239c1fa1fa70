"""The operations as functions: right in every mode of PyTorch, to any order of derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gn_kernels import activation as _activation
from gn_kernels import attention as _attention
from gn_kernels import layer_norm as _layer_norm

_GELU_KINDS = {"none": "gelu", "tanh": "gelu_tanh"}
_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HALF_DTYPES = (torch.float16, torch.bfloat16)


def activation(x: Tensor, kind: str) -> Tensor:
    r"""Apply an activation whose second derivative is one fused kernel.

    ============== ==========================================================
    ``kind``       f(x)
    ============== ==========================================================
    ``gelu``       x·Φ(x), Φ the standard normal distribution function
    ``gelu_tanh``  ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
    ``silu``       x·σ(x), σ(x) = 1/(1 + e⁻ˣ)
    ``quick_gelu`` x·σ(1.702·x)
    ============== ==========================================================

    The derivative grad·f′(x) and its derivative (v·f′(x), v·grad·f″(x)) are one kernel each, which
    move 3 and 5 tensors; the third and higher derivatives are autograd's, of the formula. Saved
    for backward: x; for the double backward: grad as well.

    Args:
        x: any shape and layout; float16, bfloat16, float32 or float64. Computed in float32
            (float64 for float64) and rounded once.
        kind: a name from the table.

    Returns:
        A tensor of x's shape and dtype; contiguous and channels_last stay so. At ±inf the limit.

    Raises:
        ValueError: ``kind`` is unknown.
        NotImplementedError: x is of another dtype, or sparse.
        TypeError: x is no tensor.

    Sources: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415 (gelu and its two
    approximations); Elfwing et al., https://arxiv.org/abs/1702.03118 (silu).
    """
    _activation.check_kind(kind)
    _activation.check_dtype("x", x)
    return _activation.apply(x, kind)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """:func:`torch.nn.functional.gelu`, twice differentiable by fused kernels.

    x·Φ(x) for ``approximate="none"``, its tanh form for ``"tanh"``; see :func:`activation`.

    Raises:
        RuntimeError: ``approximate`` is neither.
    """
    if approximate not in _GELU_KINDS:
        raise RuntimeError(f"approximate must be 'none' or 'tanh', but got {approximate!r}")
    return activation(x, _GELU_KINDS[approximate])


def silu(x: Tensor) -> Tensor:
    """:func:`torch.nn.functional.silu`, x·σ(x), twice differentiable by fused kernels.

    See :func:`activation`.
    """
    return activation(x, "silu")


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU, x·σ(1.702·x), twice differentiable by fused kernels.

    See :func:`activation`.
    """
    return activation(x, "quick_gelu")


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r""":func:`torch.nn.functional.layer_norm`, whose second derivative is one fused kernel.

    y = (x − μ)·r·weight + bias with r = 1/√(σ² + eps), where μ and σ² are mean and variance of a
    row: the numbers in the last dimensions of x, those that ``normalized_shape`` names.

    Each of the three orders is one pass over the rows, which moves 2, 3 and 5 tensors of x's
    size; the third and higher derivatives are autograd's, of the formula. Saved for backward: x,
    weight, bias and two numbers a row (μ and r in float32, float64 for float64); for the double
    backward: grad as well. The gradients of weight and bias are summed in a fixed order: the same
    call gives the same bits again.

    Args:
        x: any strides; float16, bfloat16, float32 or float64. Computed in float32 (float64 for
            float64) and rounded once.
        normalized_shape: the last dimensions of x, at least one, none of size 0.
        weight: of ``normalized_shape``, and of x's dtype or, beside half precision, float32.
        bias: likewise, and of weight's dtype.
        eps: added to the variance.

    Returns:
        A contiguous tensor of x's shape and dtype. Under autocast what PyTorch does: on CPU
        nothing, elsewhere half-precision arguments are cast and the result is float32.

    Raises:
        RuntimeError: shapes, dtypes or devices don't fit, or a row has length 0.
        NotImplementedError: an argument is of another dtype, or sparse.
        TypeError: an argument is no tensor.

    Sources: Ba, Kiros, Hinton, https://arxiv.org/abs/1607.06450; its second derivative: the
    formulas in ``gn_kernels/layer_norm/formula.py``.
    """
    shape = tuple(normalized_shape)
    _layer_norm.check_tensor("x", x)
    device = x.device.type
    if device != "cpu" and _autocasts(device):
        x = _at_least_float32(x)
        weight = None if weight is None else _at_least_float32(weight)
        bias = None if bias is None else _at_least_float32(bias)
    _layer_norm.check(x, shape, weight, bias)
    return _layer_norm.apply(x, weight, bias, shape, eps)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""softmax(scale·QKᵀ + bias)·V, twice differentiable by kernels that store nothing N×M.

    :func:`torch.nn.functional.scaled_dot_product_attention` without dropout, for q of shape
    (…, heads, N, d) and k, v of shape (…, heads, M, d). Each of the three orders goes block by
    block over the scores and computes them anew from q, k and the log-sum-exp of each row. The
    third and higher derivatives are autograd's, of the formula, and do store N×M tensors.

    Saved for backward: q, k, v, bias, the result, and a float32 number a row; for the double
    backward: grad as well.

    Args:
        q: any strides, such as a view of a packed qkv tensor; float16, bfloat16, float32 or
            float64. Computed in float32 (float64 for float64); the GPU kernels round the factors
            of each matrix product to q's dtype, and follow
            ``torch.backends.cuda.matmul.allow_tf32`` for float32.
        k: q's dtype, device, leading dimensions and head size.
        v: k's shape, q's dtype and device.
        bias: added to the scores; q's dtype and device, broadcastable to (…, heads, N, M), -inf
            where a key is masked. Its gradient and second gradient are computed as well. A row
            that is masked entirely gives 0.
        scale: 1/√d by default.

    Returns:
        A tensor of q's shape and dtype that lies in memory as (…, N, heads, d). Under autocast
        the arguments are cast first, as PyTorch's own function casts them.

    Raises:
        RuntimeError: shapes, dtypes or devices don't fit, M or d is 0, or the mask is boolean.
        NotImplementedError: q is of another dtype, or sparse.
        TypeError: an argument is no tensor.

    Sources: Vaswani et al., https://arxiv.org/abs/1706.03762; block by block: Dao et al.,
    https://arxiv.org/abs/2205.14135; its second derivative: the formulas in
    ``gn_kernels/attention/formula.py``.
    """
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    bias = None if bias is None else _autocast(bias)
    _attention.check(q, k, v, bias)
    shape, scale = q.shape, q.shape[-1] ** -0.5 if scale is None else scale
    bias = _attention.as_raw(q, bias, k.shape[-2])
    if q.ndim == 4:
        return _attention.apply(q, k, v, bias, scale)
    q, k, v = (x.unsqueeze(0) if x.ndim == 3 else x.flatten(0, -4) for x in (q, k, v))
    return _attention.apply(q, k, v, bias, scale).reshape(shape)


def attention_qkv(qkv: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    r""":func:`attention` of one tensor that holds q, k and v, whose gradient is one tensor too.

    The same kernels, reading the thirds of qkv where they are and writing their gradients side by
    side, in both derivatives: no copy splits qkv or joins a gradient. Where qkv is
    ``linear(x).reshape(batch, N, 3, heads, d).permute(2, 0, 3, 1, 4)``, its gradient has the same
    layout and goes on as it is.

    Args:
        qkv: (3, …, heads, N, d): q, k and v of :func:`attention`.
        bias: as for :func:`attention`.
        scale: 1/√d by default.

    Returns:
        As :func:`attention`, which also tells what is saved, the errors and the sources.
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a Tensor, but got {type(qkv).__name__}")
    if qkv.ndim < 4 or qkv.shape[0] != 3:
        raise RuntimeError(f"qkv must be (3, …, heads, N, d), but got shape {tuple(qkv.shape)}")
    qkv = _autocast(qkv)
    bias = None if bias is None else _autocast(bias)
    q, k, v = qkv.unbind(0)
    if q.ndim != 4:
        return attention(q, k, v, bias, scale)
    _attention.check(q, k, v, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attention.apply_packed(qkv, _attention.as_raw(q, bias, q.shape[-2]), scale)


def _autocast(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _AUTOCAST_DTYPES:
        return tensor
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if _autocasts(device) else tensor


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF_DTYPES else tensor
