"""Compile what the public functions of the attention kernels launch, and say what it takes.

    TRITON_INTERPRET=0 python -m tests.attention.compiled TARGET DTYPE SIZE [bias]

No GPU is needed. Prints one line of JSON for each kernel. Only a compiler sees some mistakes in a
kernel: Triton's interpreter accepts more.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gn_kernels.attention import triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def call_everything(dtype: torch.dtype, size: int, biased: bool) -> None:
    """All three orders with everything wanted, on views of a packed tensor as a ViT has them."""
    q, k, v = torch.empty(2, 197, 3, 12, size, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    bias = torch.empty(2, 12, 197, 197, dtype=dtype) if biased else None
    lse = torch.empty(2, 12, 197)
    triton_kernels.forward(q, k, v, bias, 0.125, q, lse)
    triton_kernels.backward(q, q, k, v, bias, q, lse, 0.125, q, k, v, bias)
    triton_kernels.double_backward(q, k, v, bias, q, q, k, v, bias, q, lse, 0.125, q, q, k, v, bias)


def compile_launches(target_name: str, dtype: torch.dtype, size: int, biased: bool):
    """For each kernel that is launched: its name, its tiling's warps, the compiled code."""
    launches = []

    def catch(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    target = TARGETS[target_name]
    hip = "7.0" if target.backend == "hip" else None
    with mock.patch.object(JITFunction, "run", catch), mock.patch.object(torch.version, "hip", hip):
        call_everything(dtype, size, biased)
    backend = make_backend(target)
    for kernel, args, kwargs in launches:
        # As the launcher does.
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        arguments, specialisation, _ = bind(*args, **kwargs)
        options, signature, constexprs, attributes = kernel._pack_args(
            backend, kwargs, arguments, specialisation, None
        )
        source = ASTSource(kernel, signature, constexprs, attributes)
        yield kernel.__name__, triton.compile(source, target=target, options=options.__dict__)


def resources(target_name: str, compiled) -> dict[str, int]:
    if target_name == "gfx942":
        text = compiled.asm["amdgcn"]
        found = {
            name: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
            for name, key in (("registers", "vgpr_count"), ("spilled", "vgpr_spill_count"))
        }
    else:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        # A kernel has no stack of its own but for what is spilled.
        found = {
            "registers": int(re.search(r"REG:(\d+)", text).group(1)),
            "spilled": int(re.search(r"STACK:(\d+)", text).group(1)),
        }
    products = len(re.findall(r"wgmma\.mma|mma\.sync|tcgen05\.mma|v_mfma", _assembly(compiled)))
    return {**found, "shared": compiled.metadata.shared, "tensor_core_products": products}


def _assembly(compiled) -> str:
    return compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]


if __name__ == "__main__":
    target_name, dtype_name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for name, compiled in compile_launches(
        target_name, getattr(torch, dtype_name), size, "bias" in sys.argv
    ):
        row = {"kernel": name, "warps": compiled.metadata.num_warps}
        print(json.dumps(row | resources(target_name, compiled)), flush=True)
