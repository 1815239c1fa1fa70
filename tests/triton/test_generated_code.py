"""What the kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import assembly, generated_code
from benchmarks.assembly import Instruction
from benchmarks.cuda_launches import SIZES
from benchmarks.generated_code import MACHINES, worse

ROOT = Path(__file__).parents[2]
KINDS = ("gelu", "gelu_tanh", "silu", "quick_gelu")

# Instructions per element, bf16, sm_90, of good forms; a tenth more is left to the compiler. The
# memory of an H100 leaves time for 35 in a forward.
INSTRUCTIONS = {
    "gelu": (22.0, 26.1, 33.5),
    "gelu_tanh": (15.5, 23.0, 34.9),
    "silu": (11.9, 17.0, 25.6),
    "quick_gelu": (12.9, 18.0, 26.6),
}


def run(*options: str) -> subprocess.CompletedProcess:
    # In a process of its own: in this one, kernels are interpreted.
    command = [sys.executable, "-m", "benchmarks.generated_code", *options]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def baseline(**columns: str) -> list[dict]:
    rows = [row for row in generated_code.read() if columns.items() <= row.items()]
    assert rows
    return rows


@pytest.mark.parametrize("family", ["activation", "layer_norm"])
def test_sm_90_bf16_is_no_worse_than_the_baseline(family):
    done = run(
        *("--check", "--family", family, "--target", "sm_90", "--dtype", "bfloat16", "--jobs", "1")
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_nothing_is_worse_than_the_baseline():
    done = run("--check")
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_baseline_is_complete():
    found = {
        (row["family"], row["subject"], row["dtype"], row["target"])
        for row in baseline()
        if row["compiler"].startswith("triton")
    }
    cases = (case for case in generated_code.cases() if case.family not in generated_code.CUDA)
    assert found == {tuple(case) for case in cases}
    assert {family for family, *_ in found} == {"activation", "layer_norm", "attention"}


def test_the_baseline_has_the_kernels_in_cuda_cpp():
    found = {
        (row["family"], row["subject"], row["order"], row["kernel"], row["dtype"], row["target"])
        for row in baseline()
        if row["compiler"].startswith("nvcc") and row["family"] != "activation"
    }
    calls = [
        call
        for source in ("layer_norm.cu", "softmax.cu")
        for call in generated_code.cuda_calls(source, processors=1)
    ]
    assert found == {
        (call.family, call.subject, call.order, call.launch.kernel[0], call.dtype, target)
        for call in calls
        for target in MACHINES
    }
    assert len(found) == 3 * 4 * (5 + 3 + 2 * 3)


def test_kernels_keep_to_their_registers_and_use_the_widest_accesses():
    for row in baseline():
        assert row["spills"] == "0", row
        loads, stores = (row[key].split("/") for key in ("load_bits", "store_bits"))
        assert loads[0] == "128", row
        if row["family"] == "softmax":  # beside the scores there is a wide number a row
            assert stores[0] == "128", row
            assert {*loads, *stores} <= {"128", str(max(32, 8 * SIZES[row["dtype"]]))}, row
        if row["family"] == "activation":
            assert loads == stores == ["128"], row
        if row["family"] == "layer_norm" and not row["kernel"].startswith("column_sums"):
            assert stores[0] == "128", row


def test_activations_are_as_short_as_the_best_form_known():
    orders = ("forward", "backward", "double_backward")
    counts = {
        (row["subject"], row["order"]): float(row["instructions"])
        for row in baseline(family="activation", dtype="bfloat16", target="sm_90")
        if row["compiler"].startswith("triton")
    }
    for kind in KINDS:
        for order, bound in zip(orders, INSTRUCTIONS[kind], strict=True):
            assert counts[kind, order] <= 1.1 * bound, (kind, order)
        assert counts[kind, "double_backward, of x alone"] <= counts[kind, orders[2]]


def test_cuda_kernels_are_as_short_as_triton_s():
    counts = {"triton": {}, "nvcc": {}}
    for row in baseline(family="activation"):
        of = counts[row["compiler"].split()[0]]
        of[tuple(row[key] for key in ("subject", "order", "dtype", "target"))] = float(
            row["instructions"]
        )
    targets = {kernel[3] for kernel in counts["nvcc"]}
    assert targets == set(MACHINES)
    assert counts["nvcc"].keys() == {one for one in counts["triton"] if one[3] in targets}
    for kernel, count in counts["nvcc"].items():
        assert count <= 1.1 * counts["triton"][kernel], kernel


def test_cuda_kernels_of_layer_norm_are_as_short_as_triton_s():
    # On sm_100 too, where Triton's compiler packs two float32 into one instruction.
    counts = {"triton": {}, "nvcc": {}}
    for row in baseline(family="layer_norm", subject="768"):
        of = counts[row["compiler"].split()[0]]
        kernel = (row["kernel"].removesuffix("_kernel"), row["order"], row["dtype"], row["target"])
        of[kernel] = float(row["instructions"])
    assert counts["nvcc"].keys() == {one for one in counts["triton"] if one[3] in MACHINES}
    assert len(counts["nvcc"]) == 96
    for kernel, count in counts["nvcc"].items():
        assert count <= 1.1 * counts["triton"][kernel], kernel


def test_attention_multiplies_on_tensor_cores():
    for row in baseline(family="attention", dtype="bfloat16"):
        assert (float(row["tensor"]) > 0) == (row["kernel"] != "backward_delta"), row


def test_the_model_of_time():
    # 22 instructions for each 4 bytes: 22/(132·4·32·1.755 GHz) against 4/(3.35 TB/s)
    assert MACHINES["sm_90"].issue_over_memory(22, 4) == pytest.approx(0.62, abs=0.005)


# -- The gate itself -----------------------------------------------------------------------------

ROW = {
    "compiler": "triton 1.0",
    "family": "activation",
    "subject": "gelu",
    "order": "forward",
    "kernel": "forward_kernel",
    "dtype": "bfloat16",
    "target": "sm_90",
    "registers": 32,
    "spills": 0,
    "shared_bytes": 0,
    "load_bits": "128",
    "store_bits": "128/32",
    "instructions": 22.0,
    "mufu": 2.0,
    "fp64": 0.0,
    "memory": 1.0,
}


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("registers", 34),
        ("spills", 1),
        ("shared_bytes", 16),
        ("load_bits", "64"),
        ("store_bits", "128/16"),
        ("instructions", 23.2),
        ("mufu", 2.2),
        ("fp64", 0.1),
    ],
)
def test_the_gate_names_kernel_and_figure(figure, value):
    (message,) = worse([ROW | {figure: value}], [ROW])
    assert message.startswith("triton activation gelu forward forward_kernel bfloat16 sm_90: ")
    assert figure in message


def test_the_gate_lets_pass_what_is_better_or_as_good():
    better = {"registers": 16, "load_bits": "256", "instructions": 20.0, "mufu": 0.0}
    assert worse([ROW], [ROW]) == []
    assert worse([ROW | better], [ROW]) == []
    assert worse([ROW | {"registers": 33, "instructions": 23.0}], [ROW]) == []


def test_the_gate_sees_kernels_that_come_and_go_and_other_compilers():
    other = ROW | {"kernel": "tail_kernel"}
    (message,) = worse([ROW, other], [ROW])
    assert "tail_kernel" in message
    assert "no baseline" in message
    (message,) = worse([ROW], [ROW, other])
    assert "tail_kernel" in message
    assert "not compiled" in message
    (message,) = worse([ROW | {"compiler": "triton 2.0", "registers": 64}], [ROW])
    assert "triton 1.0 then, triton 2.0 now" in message


# -- Ways through the code -----------------------------------------------------------------------


def test_the_main_path_is_the_one_of_whole_blocks():
    code = [
        Instruction((), target="tail"),
        Instruction((), access=("load", 128)),
        Instruction((), access=("load", 32)),  # a narrow access that belongs to it
        Instruction((), target="slow"),
        Instruction(("back",), access=("store", 128)),
        Instruction((), falls_through=False, ends=True),
        Instruction(("tail",), target="end"),  # a tail may skip its accesses
        Instruction((), access=("load", 16)),
        Instruction(("end",), falls_through=False, ends=True),
        Instruction(("slow",), target="back", falls_through=False),
    ]
    assert assembly.main_path(code) == list(range(6))


def test_a_loop_counts_as_often_as_it_is_passed():
    code = [
        Instruction((), pipe="control"),
        Instruction(("loop",), pipe="memory"),
        Instruction((), target="out"),
        Instruction(("on",), pipe="fma"),
        Instruction((), target="loop", falls_through=False, pipe="control"),
        Instruction(("out",), target="spin"),
        Instruction((), falls_through=False, ends=True, pipe="control"),
        Instruction(("spin",), target="on", falls_through=False),  # waits behind the exit
    ]
    way = assembly.listing(code)
    assert way == list(range(7))
    assert assembly.main_loop(code, way) == range(1, 5)
    counts = assembly.by_pipe(code, way, trips=3)
    assert {pipe: count for pipe, count in counts.items() if count} == {
        "memory": 3,
        "alu": 3 + 1,
        "fma": 3,
        "control": 1 + 3 + 1,
    }


def test_sass_is_read():
    listing = """
        .section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R5, R4 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
.L_x_1:
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*0070*/               @P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0080*/                   CALL.REL.NOINC `($__internal_0_$slowpath) ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/                   EXIT ;
"""
    code = list(assembly._sass(listing))
    assert [one.pipe for one in code] == [
        *("memory", "memory", "mufu", "tensor", "control", "memory", "memory"),
        *("control",) * 4,
    ]
    assert [one.access for one in code if one.access] == [
        *(("load", 128), ("load", 128), ("store", 16))
    ]
    assert code[4].target == ".L_x_1"
    assert code[4].falls_through
    assert [one.target for one in code[7:]] == [".L_x_2", None, ".L_x_1", None]
    assert [one.falls_through for one in code[7:]] == [True, True, False, False]
    assert [one.ends for one in code[7:]] == [False, False, False, True]


def test_kernels_are_known_by_their_mangled_names():
    file = "_GLOBAL__N__eaa57a13_13_layer_norm_cu_2fb86969"
    name = f"_ZN10gn_kernels4cuda{len(file)}{file}15double_backwardI{{}}EEvPKT_NS0_9ParameterE"
    half = f"NS_{len(file)}{file}8bfloat16E"
    for template, expected in (
        ("dLb0ELb1E", ("double_backward", "float64", (0, 1))),
        (f"{half}Lb1ELb0E", ("double_backward", "bfloat16", (1, 0))),
        (f"{half.replace('8b', '7')}Li8ELb1E", ("double_backward", "float16", (8, 1))),
        ("f", ("double_backward", "float32", ())),
    ):
        assert generated_code.cuda_row_kernel(name.format(template)) == expected
    forward = name.format("f").replace("15double_backward", "7forward")
    assert generated_code.cuda_row_kernel(forward)[0] == "forward"
    with pytest.raises(ValueError, match="no kernel over rows"):
        generated_code.cuda_row_kernel("_ZN10gn_kernels4cuda10activationIfEE")


def test_unknown_options_are_refused():
    done = run("--subject", "mish")
    assert done.returncode == 2
    assert "nothing is selected" in done.stderr
