"""The machine against PTX written by hand: values, masks, reconvergence, what it must refuse."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.machine import (
    DeadlockError,
    Memory,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    UninitialisedError,
    UnsupportedError,
    fma32,
    fma64,
    parse,
    run,
)

REGISTERS = """
    .reg .pred %p<8>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<64>;
    .reg .f32 %f<16>;
    .reg .b64 %rd<16>;
"""


def kernel(body: str, parameters: int = 2):
    declared = ",\n".join(f"    .param .u64 k_param_{i}" for i in range(parameters))
    pointers = "\n".join(f"    ld.param.u64 %rd{i}, [k_param_{i}];" for i in range(parameters))
    text = (
        f".version 8.0\n.target sm_90\n.visible .entry k(\n{declared}\n)\n{{{REGISTERS}{pointers}"
    )
    return parse(f"{text}\n    mov.u32 %r0, %tid.x;\n{body}\n}}\n")["k"]


# out[thread] = in[thread]·2 + 1, for block %ctaid.x of 32 threads and n elements
SCALE = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 32, %r0;
    setp.ge.s32 %p1, %r2, {n};
    @%p1 bra $L__end;
    mul.wide.s32 %rd4, %r2, 4;
    add.s64 %rd5, %rd0, %rd4;
    add.s64 %rd6, %rd1, %rd4;
    ld.global.f32 %f1, [%rd5];
    fma.rn.f32 %f2, %f1, 0f40000000, 0f3F800000;
    st.global.f32 [%rd6], %f2;
$L__end:
    ret;
"""


@pytest.mark.parametrize("n", [1, 31, 32, 33, 70])
def test_a_tail_is_written_and_nothing_else(n):
    memory, x = Memory(), np.arange(n, dtype=np.float32)
    source, result = memory.put(x), memory.reserve(4 * n)
    traffic = run(kernel(SCALE.format(n=n)), memory, [source, result], (3,), 32)
    np.testing.assert_array_equal(memory.get(result, np.float32), 2 * x + 1)
    assert (memory.writes(result) == 1).all()
    assert traffic[:2] == (4 * n, 4 * n)


def test_a_store_out_of_bounds_is_seen():
    memory = Memory()
    arguments = [memory.put(np.zeros(64, np.float32)), memory.reserve(4 * 40)]
    with pytest.raises(OutOfBoundsError, match=r"block 1, thread 8: `st\.global\.f32"):
        run(kernel(SCALE.format(n=41)), memory, arguments, (2,), 32)


def test_a_load_before_a_buffer_is_seen():
    memory = Memory()
    body = "ld.global.f32 %f1, [%rd0+-4];\n ret;"
    with pytest.raises(OutOfBoundsError, match="offset -4"):
        run(kernel(body), memory, [memory.put(np.zeros(8)), memory.put(np.zeros(8))], (1,), 32)


def test_a_null_pointer_is_seen():
    with pytest.raises(OutOfBoundsError, match="no buffer"):
        run(kernel("ld.global.f32 %f1, [%rd0];\n ret;"), Memory(), [0, 0], (1,), 32)


def test_a_misaligned_vector_is_seen():
    memory = Memory()
    place = memory.put(np.zeros(64, np.float32), misaligned_by=4)
    body = "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd0];\n ret;"
    with pytest.raises(MisalignedError, match="16 bytes"):
        run(kernel(body), memory, [place, place], (1,), 32)


def test_memory_that_nothing_wrote_is_seen():
    memory = Memory()
    place = memory.reserve(64)
    with pytest.raises(UninitialisedError):
        run(kernel("ld.global.f32 %f1, [%rd0];\n ret;"), memory, [place, place], (1,), 32)
    with pytest.raises(UninitialisedError, match="%f3"):
        run(kernel("add.f32 %f1, %f3, %f3;\n ret;"), memory, [place, place], (1,), 32)


# Threads pass a loop as often as their number says, then meet again.
LOOP = """
    mov.b32 %r1, 0;
    mov.b32 %r2, 0;
$L__loop:
    setp.ge.u32 %p1, %r1, %r0;
    @%p1 bra $L__out;
    add.s32 %r1, %r1, 1;
    add.s32 %r2, %r2, %r1;
    bra.uni $L__loop;
$L__out:
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
    mul.wide.u32 %rd4, %r0, 4;
    add.s64 %rd5, %rd1, %rd4;
    st.global.u32 [%rd5], %r3;
    ret;
"""


def check_that_threads_meet(code: str) -> None:
    memory = Memory()
    result = memory.reserve(4 * 64)
    run(kernel(code), memory, [0, result], (1,), 64)
    sums = np.arange(64) * (np.arange(64) + 1) // 2
    np.testing.assert_array_equal(memory.get(result, np.uint32), sums[np.arange(64) ^ 1])


def test_threads_diverge_and_meet_again():
    check_that_threads_meet(LOOP)


def test_a_shuffle_waits_for_threads_that_are_elsewhere():
    start, loop = LOOP.split("$L__loop:\n")
    loop, out = loop.split("$L__out:\n")
    # Those behind run first.
    check_that_threads_meet(f"{start} bra.uni $L__loop;\n$L__out:\n{out}$L__loop:\n{loop}")


def test_a_shuffle_and_a_barrier_wait_for_each_other():
    code = LOOP.replace(
        "    shfl.sync", "    setp.eq.u32 %p1, %r0, 3;\n    @%p1 bar.sync 0;\n    shfl.sync"
    )
    memory = Memory()
    with pytest.raises(DeadlockError, match="a shuffle is waited for, and a barrier"):
        run(kernel(code), memory, [0, memory.reserve(4 * 64)], (1,), 64)


# A sum over 128 threads: in each warp by shuffles, then over the warps through shared memory.
SUM = """
    .shared .align 4 .b8 part[16];
    cvt.rn.f32.u32 %f1, %r0;
{shuffles}
    and.b32 %r2, %r0, 31;
    shr.u32 %r3, %r0, 5;
    shl.b32 %r4, %r3, 2;
    mov.u32 %r5, part;
    add.s32 %r6, %r5, %r4;
    setp.eq.s32 %p1, %r2, 0;
    @%p1 st.shared.f32 [%r6], %f1;
    {barrier}
    ld.shared.v4.f32 {{%f2, %f3, %f4, %f5}}, [%r5];
    add.f32 %f6, %f2, %f3;
    add.f32 %f7, %f4, %f5;
    add.f32 %f8, %f6, %f7;
    mul.wide.u32 %rd4, %r0, 4;
    add.s64 %rd5, %rd1, %rd4;
    st.global.f32 [%rd5], %f8;
    ret;
"""
SHUFFLES = "\n".join(
    f"    mov.b32 %r10, %f1; shfl.sync.bfly.b32 %r11, %r10, {k}, 31, -1;"
    " mov.b32 %f2, %r11; add.f32 %f1, %f1, %f2;"
    for k in (16, 8, 4, 2, 1)
)


def sum_of_128(barrier: str) -> np.ndarray:
    memory = Memory()
    result = memory.reserve(4 * 128)
    code = kernel(SUM.format(shuffles=SHUFFLES, barrier=barrier).replace(".align 4", ".align 16"))
    run(code, memory, [0, result], (1,), 128)
    return memory.get(result, np.float32)


def test_a_reduction_through_shared_memory():
    np.testing.assert_array_equal(sum_of_128("bar.sync 0;"), np.full(128, 127 * 64.0))


def test_a_missing_barrier_is_seen():
    with pytest.raises(RaceError, match=r"wrote since the last barrier"):
        sum_of_128("")
    with pytest.raises(RaceError):
        sum_of_128("bar.warp.sync -1;")


def test_a_barrier_that_not_all_reach_is_seen():
    with pytest.raises(DeadlockError):
        sum_of_128("setp.lt.u32 %p2, %r0, 64; @%p2 ret; bar.sync 0;")


def test_a_read_before_the_next_write_needs_a_barrier():
    body = """
    .shared .align 4 .b8 word[4];
    mov.u32 %r5, word;
    st.shared.u32 [%r5], 7;
    bar.sync 0;
    ld.shared.u32 %r6, [%r5];
    setp.eq.s32 %p1, %r0, 0;
    @%p1 st.shared.u32 [%r5], 8;
    ret;
"""
    with pytest.raises(RaceError, match="several threads"):
        run(kernel(body), Memory(), [0, 0], (1,), 64)


def test_shared_memory_has_an_end():
    body = ".shared .align 4 .b8 word[4];\n mov.u32 %r5, word;\n ld.shared.u32 %r6, [%r5+4];\n ret;"
    with pytest.raises(OutOfBoundsError, match="shared memory"):
        run(kernel(body), Memory(), [0, 0], (1,), 32)


def converted(statement: str, x: np.ndarray, dtype: type, bits: int) -> np.ndarray:
    memory = Memory()
    source, result = memory.put(x), memory.reserve(bits // 8 * x.size)
    wide = {2: "b16 %rs1", 4: "b32 %r1", 8: "b64 %rd9"}[x.itemsize]
    narrow = {16: "b16", 32: "b32", 64: "b64"}[bits]
    place = {16: "%rs2", 32: "%r2", 64: "%rd10"}[bits]
    body = f"""
    mul.wide.u32 %rd4, %r0, {x.itemsize};
    add.s64 %rd5, %rd0, %rd4;
    mul.wide.u32 %rd6, %r0, {bits // 8};
    add.s64 %rd7, %rd1, %rd6;
    ld.global.{wide}, [%rd5];
    {statement}
    st.global.{narrow} [%rd7], {place};
    ret;
"""
    run(kernel(body), memory, [source, result], (1,), x.size)
    return memory.get(result, dtype)


def test_rounding_to_bf16_is_to_nearest_even():
    x = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x00000001], "u4")
    x = np.concatenate([x, np.zeros(26, "u4")]).view(np.float32)
    y = converted("cvt.rn.bf16.f32 %rs2, %r1;", x, np.uint16, 16)
    assert y[:6].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x0000]
    y = converted("cvt.rn.bf16x2.f32 %r2, %r1, 0f3F800000;", x, np.uint32, 32)
    assert y[:2].tolist() == [0x3F803F80, 0x3F823F80]


def test_conversions_to_integers_round_and_saturate():
    x = np.array([2.5, 3.5, -2.5, 3e9, -3e9, np.nan] + [0.0] * 26, np.float32)
    whole = {"rni": [2, 4, -2], "rzi": [2, 3, -2], "rmi": [2, 3, -3], "rpi": [3, 4, -2]}
    for mode, expected in whole.items():
        y = converted(f"cvt.{mode}.s32.f32 %r2, %r1;", x, np.int32, 32)
        assert y[:6].tolist() == [*expected, 2**31 - 1, -(2**31), 0]


def test_fma_rounds_once():
    generator = np.random.default_rng(0)
    bits = generator.integers(0x30000000, 0x4F000000, (3, 2000), dtype=np.uint32)
    a, b, c = bits.view(np.float32)
    c = np.where(np.arange(2000) % 2, -(a * b), c).astype(np.float32)  # cancels
    exact = [
        Fraction(float(i)) * Fraction(float(j)) + Fraction(float(k))
        for i, j, k in zip(a, b, c, strict=True)
    ]
    y = fma32(a, b, c)
    below = np.nextafter(y, np.float32(-np.inf))
    above = np.nextafter(y, np.float32(np.inf))
    for value, low, high, truth in zip(y, below, above, exact, strict=True):
        error = abs(Fraction(float(value)) - truth)
        assert error <= abs(Fraction(float(low)) - truth)
        assert error <= abs(Fraction(float(high)) - truth)
    x = np.array([1 + 2.0**-30])
    assert fma64(x, x, -(x * x))[0] == 2.0**-60  # what the product alone loses


def test_two_floats_at_a_time():
    x = np.array([1 + 2.0**-12] * 32, np.float32)
    body = """
    mov.b64 %rd9, {%r1, %f2};
    fma.rn.f32x2 %rd10, %rd9, %rd9, %rd9;
    sub.f32x2 %rd10, %rd10, %rd9;
    mov.b64 {%f1, %f3}, %rd10;
    """
    both = [
        converted(f"mov.f32 %f2, 0f40000000; {body} mov.b32 %r2, {half};", x, np.float32, 32)[0]
        for half in ("%f1", "%f3")
    ]
    assert both == [np.float32(x[0] * x[0].astype(np.float64)), 4.0]


def test_flushing_and_approximations():
    x = np.array([2.0**-130, 1.5, -1.0, np.inf] + [1.0] * 28, np.float32)
    assert (
        converted("add.ftz.f32 %f1, %r1, 0f00000000; mov.b32 %r2, %f1;", x, np.float32, 32)[0]
        == 0.0
    )
    y = converted("ex2.approx.ftz.f32 %f1, %r1; mov.b32 %r2, %f1;", x, np.float32, 32)
    np.testing.assert_array_equal(y, np.exp2(x.astype(np.float64)).astype(np.float32))


def test_reciprocals_of_float64_are_coarse():
    x = np.array([3.0, 1 + 2.0**-40, 2.0**1023.5, np.inf, -8.0] + [1.0] * 27)
    y = converted("rcp.approx.ftz.f64 %rd10, %rd9;", x, np.float64, 64)
    assert 0 < abs(3 * y[0] - 1) < 2.0**-20
    assert y[1:5].tolist() == [1.0, 0.0, 0.0, -0.125]
    assert (y.view(np.uint64) & np.uint64(0xFFFFFFFF) == 0).all()
    root = converted("rsqrt.approx.ftz.f64 %rd10, %rd9;", np.abs(x), np.float64, 64)
    assert 0 < abs(3 * root[0] ** 2 - 1) < 2.0**-19
    assert root[1] == 1.0
    assert root[3] == 0.0


def test_a_block_has_three_axes():
    memory = Memory()
    result = memory.reserve(4 * 24)
    body = """
    mov.u32 %r1, %tid.y;
    mov.u32 %r2, %tid.z;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %ntid.y;
    mad.lo.u32 %r5, %r2, %r4, %r1;
    mad.lo.u32 %r6, %r5, %r3, %r0;
    mul.lo.u32 %r7, %r2, 100;
    mad.lo.u32 %r8, %r1, 10, %r7;
    add.u32 %r9, %r8, %r0;
    mul.wide.u32 %rd4, %r6, 4;
    add.s64 %rd5, %rd1, %rd4;
    st.global.u32 [%rd5], %r9;
    ret;
"""
    run(kernel(body), memory, [0, result], (1,), (4, 3, 2))
    expected = [100 * z + 10 * y + x for z in range(2) for y in range(3) for x in range(4)]
    assert memory.get(result, np.uint32).tolist() == expected


def test_what_is_not_known_is_named():
    with pytest.raises(UnsupportedError, match="wgmma"):
        run(kernel("wgmma.fence.aligned;\n ret;"), Memory(), [0, 0], (1,), 32)


def test_beyond_two_to_the_31():
    n, base = 40, 2**31 + 32  # elements of four bytes; the block that begins there
    memory, x = Memory(), np.arange(n, dtype=np.float32)
    arguments = [memory.put(x, first=4 * base), memory.reserve(4 * n, first=4 * base)]
    body = """
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd8, %r1, 32;
    cvt.u64.u32 %rd9, %r0;
    add.s64 %rd10, %rd8, %rd9;
    shl.b64 %rd4, %rd10, 2;
    add.s64 %rd5, %rd0, %rd4;
    add.s64 %rd6, %rd1, %rd4;
    ld.global.f32 %f1, [%rd5];
    st.global.f32 [%rd6], %f1;
    ret;
"""
    run(kernel(body), memory, arguments, (2**31,), 32, blocks=[base // 32])
    assert memory.get(arguments[1], np.float32)[:32].tolist() == x[:32].tolist()
    narrow = body.replace("mul.wide.u32 %rd8, %r1, 32;", "shl.b32 %r2, %r1, 7; cvt.u64.u32 %rd8, "
                          "%r2; shr.u64 %rd8, %rd8, 2;")  # fmt: skip
    with pytest.raises(OutOfBoundsError):
        run(kernel(narrow), memory, arguments, (2**31,), 32, blocks=[base // 32])
