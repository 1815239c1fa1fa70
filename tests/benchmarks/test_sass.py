"""Ways through SASS written by hand: the numbers that decide, and those that are not known."""

from __future__ import annotations

import ctypes

import pytest

from benchmarks import assembly, sass


def way(body: str, *arguments, target="sm_90", grid=(4, 1), block=(64, 2), thread=(0, 0)):
    """Numbers of the lines that a thread passes and executes, the labels not counted."""
    lines = [line.strip() for line in body.strip().splitlines()]
    text = "\n".join(
        line if line.startswith(".") else f"        /*0000*/                   {line} ;"
        for line in lines
    )
    bank = sass.constants(target, arguments, grid, block)
    return sass.follow(list(assembly._sass(text)), bank, thread)


def number(*statements: str, bank=(), **options) -> int:
    """What R0 is afterwards: the first of the numbers from 0 on that it is equal to."""
    body = "\n".join(statements)
    loop = """
        MOV R90, RZ
        .L_next:
        ISETP.EQ.U32.AND P6, PT, R0, R90, PT
        @P6 EXIT
        VIADD R90, R90, 0x1
        BRA `(.L_next)
    """
    found = way(f"{body}\n{loop}", *bank, **options).passed
    return (len(found) - len(statements) - 3) // 4


@pytest.mark.parametrize(
    ("target", "parameter", "grid", "block"),
    [("sm_80", 0x160, 0xC, 0x0), ("sm_90", 0x210, 0xC, 0x0), ("sm_100", 0x380, 0x370, 0x360)],
)
def test_parameters_and_sizes_lie_where_each_target_has_them(target, parameter, grid, block):
    class Pair(ctypes.Structure):
        _fields_ = (("long", ctypes.c_int64), ("flag", ctypes.c_bool))

    given = [ctypes.c_float(1), ctypes.c_int64(7), Pair(3, True), ctypes.c_int(5)]
    for at, expected in ((8, 7), (16, 3), (32, 5)):
        place = f"c[0x0][{parameter + at:#x}]"
        assert number(f"MOV R0, {place}", bank=given, target=target) == expected
    assert number(f"LDC.U8 R0, c[0x0][{parameter + 24:#x}]", bank=given, target=target) == 1
    assert number(f"ULDC UR4, c[0x0][{grid:#x}]", "MOV R0, UR4", target=target) == 4
    assert number(f"MOV R0, c[0x0][{block + 4:#x}]", target=target) == 2


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        (["S2R R0, SR_TID.X"], 5),
        (["S2R R0, SR_TID.Y"], 1),
        (["HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08"], 1),
        (["MOV R1, 0x7", "IMAD R0, R1, 0x3, R1"], 28),
        (["MOV R1, 0xfffffffe", "IMAD.WIDE R2, R1, 0x3, RZ", "VIADD R0, R2, 0x8"], 2),
        (["MOV R1, 0xfffffffe", "IMAD.WIDE.U32 R2, R1, 0x3, RZ", "MOV R0, R3"], 2),
        (["IADD3 R1, P0, -RZ, -0x1, 0x3", "IMAD.X R0, RZ, RZ, 0x4, P0"], 5),
        (["MOV R1, 0x80000000", "LEA R2, P0, R1, 0x1, 0x1",
          "LEA.HI.X R0, R1, RZ, RZ, 0x1, P0"], 1),
        (["MOV R1, 0xffffffff", "LEA.HI R0, R1, 0x2, RZ, 0x5"], 33),
        (["MOV R1, 0x45", "SHF.R.S32.HI R0, RZ, 0x4, R1"], 4),
        (["MOV R1, 0xf0000000", "SHF.R.S32.HI R2, RZ, 0x1f, R1", "VIADD R0, R2, 0x2"], 1),
        (["MOV R1, 0xc0000000", "SHF.L.U64.HI R0, R1, 0x2, RZ"], 3),
        (["MOV R1, 0x6", "LOP3.LUT R0, R1, 0x3, RZ, 0x3c, !PT"], 5),
        (["MOV R1, 0x4", "LOP3.LUT P0, RZ, R1, 0x3, RZ, 0xc0, !PT", "SEL R0, 0x1, 0x2, P0"], 2),
        (["MOV R1, 0xffffffff", "VIMNMX R2, R1, 0x2, PT", "VIADD R0, R2, 0x4"], 3),
        (["MOV R1, 0xffffffff", "VIMNMX.U32 R0, R1, 0x2, PT"], 2),
        (["MOV R1, 0x2010", "PRMT R0, R1, 0x7771, RZ"], 0x20),
        (["MOV R1, 0x80", "PRMT R2, R1, 0x8880, RZ", "IADD3 R0, R2, 0x81, RZ"], 1),
        (["MOV R1, 0xffffffff", "IADD3 R2, P0, P1, R1, R1, R1",
          "IADD3.X R0, RZ, RZ, RZ, P0, P1"], 2),
        (["MOV R1, 0x80000000", "IMAD.HI.U32 R0, R1, 0x6, RZ"], 3),
        (["UISETP.NE.AND UP0, UPT, URZ, 0x1, UPT",
          "LOP3.LUT P0, RZ, RZ, RZ, RZ, 0xc0, UP0", "SEL R0, 0x3, 0x4, P0"], 3),
        (["UISETP.NE.AND UP2, UPT, URZ, 0x1, UPT", "UP2UR UR5, UPR, URZ, 0x4",
          "ISETP.NE.AND P0, PT, RZ, UR5, PT", "SEL R0, 0x3, 0x4, P0"], 3),
        (["UISETP.NE.AND UP0, UPT, URZ, 0x1, UPT",
          "PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x8", "SEL R0, 0x3, 0x4, P1"], 3),
        (["ISETP.NE.AND P3, PT, RZ, RZ, PT", "P2R R1, PR, RZ, 0x8",
          "ISETP.EQ.AND P0, PT, R1, RZ, PT", "SEL R0, 0x6, 0x7, P0"], 6),
        (["MOV R1, 0x14", "ISETP.EQ.AND P3, PT, RZ, RZ, PT", "R2P PR, R1, 0x1c",
          "SEL R2, 0x1, 0x2, P3", "SEL R3, R2, 0x5, P2", "SEL R0, R3, 0x6, P4"], 2),
        (["ISETP.EQ.AND P3, PT, RZ, RZ, PT", "P2R R1, PR, RZ, 0x8",
          "ISETP.NE.AND P3, PT, RZ, RZ, PT", "R2P PR, R1, 0x8", "SEL R0, 0x6, 0x7, P3"], 6),
        # Words of 64 bits: 1·2³² + 2 against 1·2³² + 3, the upper ones being equal.
        (["MOV R1, 0x1", "MOV R2, 0x2", "ISETP.GE.U32.AND P0, PT, R2, 0x3, PT",
          "ISETP.GE.AND.EX P0, PT, R1, 0x1, PT, P0", "SEL R0, 0x8, 0x9, P0"], 9),
        (["MOV R1, 0x1", "ISETP.EQ.OR P0, PT, R1, RZ, PT", "SEL R0, 0x1, 0x2, P0"], 1),
        (["CS2R R0, SRZ"], 0),
        (["MOV R1, 0x5", "F2F.F32.F64 R0, R8", "MOV R0, R1"], 5),
        (["MOV R1, 0x5", "I2F.F64 R2, R8", "MOV R0, R1"], 5),
    ],
    ids=lambda one: one[-1] if isinstance(one, list) else "",
)  # fmt: skip
def test_integer_instructions(statements, expected):
    assert number(*statements, thread=(5, 1)) == expected


def test_a_loop_is_passed_as_often_as_the_arguments_say():
    body = """
        MOV R0, RZ
        .L_loop:
        VIADD R0, R0, 0x1
        ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT
        @!P0 BRA `(.L_loop)
        EXIT
    """
    assert way(body, ctypes.c_int(3)).passed == [0, *[1, 2, 3] * 3, 4]


def test_a_skipped_instruction_is_passed_and_not_executed():
    body = """
        ISETP.NE.AND P0, PT, RZ, RZ, PT
        @P0 LDG.E.U16 R1, desc[UR4][R2.64]
        @!P0 LDG.E.128 R4, desc[UR4][R2.64]
        EXIT
    """
    found = way(body)
    assert found.passed == [0, 1, 2, 3]
    assert found.executed == [0, 2, 3]


def test_where_data_decide_the_way_out_is_the_shorter():
    body = """
        LDG.E R1, desc[UR4][R2.64]
        FSETP.GT.AND P0, PT, R1, RZ, PT
        @P0 BRA `(.L_fast)
        FADD R1, R1, R1
        CALL.REL.NOINC `($slow)
        .L_fast:
        FADD R1, R1, R1
        EXIT
    """
    assert way(body).passed == [0, 1, 2, 5, 6]
    # What is loaded overwrites a number that was known.
    assert way("MOV R1, RZ\n" + body.replace("FSETP.GT", "ISETP.EQ")).passed == [0, 1, 2, 3, 6, 7]


def test_an_unknown_guard_makes_its_result_unknown():
    body = """
        MOV R0, RZ
        LDG.E R1, desc[UR4][R2.64]
        ISETP.NE.AND P0, PT, R1, RZ, PT
        @P0 MOV R0, 0x1
        ISETP.EQ.AND P1, PT, R0, RZ, PT
        @P1 BRA `(.L_long)
        EXIT
        .L_long:
        NOP
        EXIT
    """
    assert way(body).passed == [*range(7)]  # as short as can be, not where R0 = 0 would lead


def test_threads_that_are_not_together_and_calls_of_an_exit():
    body = """
        BRA.DIV UR4, `(.L_apart)
        @P0 CALL.REL.NOINC `(.L_out)
        CALL.REL.NOINC `(.L_out)
        .L_apart:
        NOP
        .L_out:
        EXIT
    """
    assert way(body).passed == [0, 1, 4]


def test_what_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="IABSDIFF is not known"):
        way("IABSDIFF R0, R1, R2\nEXIT")
    with pytest.raises(ValueError, match="PRMT"):
        way("PRMT.F4E R0, RZ, 0x1, RZ\nEXIT")


def test_a_way_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(sass, "_LONGEST", 100)
    with pytest.raises(ValueError, match="no end"):
        way(".L_loop:\nBRA `(.L_loop)\nEXIT")
    with pytest.raises(ValueError, match="a loop depends on the data"):
        way(
            ".L_loop:\nLDG.E R1, desc[UR4][R2.64]\nISETP.NE.AND P0, PT, R1, RZ, PT\n"
            "@P0 BRA `(.L_loop)\nEXIT"
        )
    with pytest.raises(ValueError, match="EXIT: depends on the data"):
        way("LDG.E R1, desc[UR4][R2.64]\nISETP.NE.AND P0, PT, R1, RZ, PT\n@P0 EXIT\nEXIT")
