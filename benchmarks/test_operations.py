"""The operations under pytest-benchmark: ``pytest benchmarks``; every shape and type: ``-m ''``.

Groups hold the providers of one order. ``--benchmark-autosave`` and ``--benchmark-compare-fail``
keep and compare runs; ``python -m benchmarks.operations`` interleaves the providers instead.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import common, operations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = (
    operations.OURS,
    operations.KERNELS_ALONE,
    operations.EAGER,
    operations.INDUCTOR,
    operations.INDUCTOR_AUTOGRAD,
    operations.COPY,
    "F.scaled_dot_product_attention",
    "liger",
    "apex",
    "flash_attn",
)


def _cases() -> list[object]:
    defaults = operations.cases(None, None, None)
    types = [torch.float32, torch.bfloat16, torch.float16]
    every = dict.fromkeys([*defaults, *operations.cases(None, list(operations.SHAPES), types)])
    return [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-{operations.dtype_name(case[2])}",
            marks=() if case in defaults else pytest.mark.slow,
        )
        for case in every
    ]


@functools.lru_cache(maxsize=1)
def _case(name, shape, dtype):
    operation = operations.make_operation(name, operations.SHAPES[shape], dtype, DEVICE)
    cotangents = operations.make_cotangents(operation)
    return operation, cotangents, operations.expected_results(operation, cotangents)


@functools.lru_cache(maxsize=1)
def _runs(name, shape, dtype, provider):
    operation, cotangents, _ = _case(name, shape, dtype)
    return operations.make_providers(operation, cotangents, (provider,))


@pytest.mark.filterwarnings("default")  # a compiler's own warnings are not what is measured
@pytest.mark.parametrize("order", operations.ORDERS)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("name", "shape", "dtype"), _cases())
def test_operation(benchmark, name, shape, dtype, provider, order):
    providers, absent = _runs(name, shape, dtype, provider)
    if provider in absent and provider != operations.OURS:
        pytest.skip(absent[provider])
    assert provider not in absent, absent[provider]
    if order not in providers.get(provider, {}):
        pytest.skip(f"{provider} has no {order} of {name}")
    run = providers[provider][order]
    if provider != operations.COPY:
        expected = _case(name, shape, dtype)[2]
        assert not operations.mistake(run(), expected[order], operations.TOLERANCE[dtype])

    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {shape} {operations.dtype_name(dtype)} {order}"
    benchmark.extra_info |= common.environment("pytest benchmarks")
    benchmark(timed)
