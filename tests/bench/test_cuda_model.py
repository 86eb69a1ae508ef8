# SPDX-License-Identifier: Apache-2.0
"""The latency model of tools/check_cuda.py, on a loop that nvcc 13.0 made and on ones made up, counted by hand."""

from __future__ import annotations

import pytest
from cuda_static import model
from cuda_static.disassembly import Function, Instruction, parse

# A reduction over the lanes of a key, of cls_kernel: a loop around a shuffle.
SHUFFLES = """	.section	.text.cls,"ax"
        /*2440*/                   IMAD.U32 R8, RZ, RZ, UR6 ;                 /* 0x00000006ff087e24 */
                                                                              /* 0x000fce000f8e00ff */
.L_x_88:
        /*2450*/                   LEA.HI R9, R8.reuse, R8, RZ, 0x1 ;         /* 0x0000000808097211 */
                                                                              /* 0x040fe400078f08ff */
        /*2460*/                   ISETP.GT.AND P0, PT, R8, 0x3, PT ;         /* 0x000000030800780c */
                                                                              /* 0x000fe40003f04270 */
        /*2470*/                   SHF.R.S32.HI R10, RZ, 0x1, R9 ;            /* 0x00000001ff0a7819 */
                                                                              /* 0x000fca0000011409 */
        /*2480*/                   SHFL.BFLY PT, R12, R59, R10, 0x1f ;        /* 0x0c001f0a3b0c7589 */
                                                                              /* 0x000e2200000e0000 */
        /*2490*/                   IMAD.MOV.U32 R8, RZ, RZ, R10 ;             /* 0x000000ffff087224 */
                                                                              /* 0x000fe400078e000a */
        /*24a0*/                   FADD R59, R12, R59 ;                       /* 0x0000003b0c3b7221 */
                                                                              /* 0x001fc60000000000 */
        /*24b0*/               @P0 BRA `(.L_x_88) ;                           /* 0xfffffffc00e40947 */
                                                                              /* 0x000fea000383ffff */
        /*24c0*/                   EXIT ;                                     /* 0x000000000000794d */
                                                                              /* 0x000fea0003800000 */
"""
FIELDS = "loop | attention_scores/cls_kernel<bfloat16_t, 8> | {} | {} | {} | {} | {}"


def word(stall: int, writes: int = 7, reads: int = 7, waits: int = 0) -> int:
    """The upper half of an encoding with these control fields."""
    return stall << 41 | writes << 46 | reads << 49 | waits << 52


def function(lines: str) -> Function:
    """A function of lines "text ; stall writes reads waits"."""
    address, printed = 0, ['\t.section\t.text.kernel,"ax"']
    for line in filter(None, map(str.strip, lines.splitlines())):
        if line.startswith(".L"):
            printed.append(line)
            continue
        text, _, control = line.partition(";")
        printed.append(f"        /*{address:04x}*/  {text};  /* 0x{0:016x} */")
        printed.append(f"        /* 0x{word(*map(int, control.split())):016x} */")
        address += 16
    (found,) = parse(printed)
    return found


def named(holds="-", way="-", trips="1", part="- -", unit="- a trip") -> model.Named:
    (row,) = model.parse_table(FIELDS.format(holds, way, trips, part, unit))
    return row


def test_control_words():
    (function,) = parse(SHUFFLES.splitlines())
    assert model.Control.of(function.code[4]) == model.Control(stall=1, writes=0, reads=7, waits=0)
    assert model.Control.of(function.code[6]) == model.Control(stall=3, writes=7, reads=7, waits=1)


def test_a_recorded_loop():
    """Issues at 0, 2, 4, 9, 10; the sum waits for the shuffle until 9 + 24 = 33; 36 + 5 + 8 for the branch back."""
    (function,) = parse(SHUFFLES.splitlines())
    (loop,) = function.loops
    path = model.iteration(loop, ["SHFL"], 1)
    assert model.issue_times(path) == [0, 2, 4, 9, 10, 33, 36, 41]
    found = model.estimate(named("SHFL", "SHFL"), function)
    assert (found.instructions, found.cycles, found.units, found.of) == (7, 49, 1, "a trip")


def test_a_part_of_an_iteration():
    """From the first shuffle on: the sum at 24, the branch at 27, which ends at 32."""
    (function,) = parse(SHUFFLES.splitlines())
    found = model.estimate(named("SHFL", "SHFL", part="SHFL -", unit="FADD a sum"), function)
    assert (found.instructions, found.cycles, found.units) == (4, 32, 1)
    behind = model.estimate(named("SHFL", "SHFL", part=">SHFL FADD"), function)
    assert (behind.instructions, behind.cycles) == (2, 2 + 3)  # nothing is under way


def test_operands_are_held_until_they_are_read():
    times = model.issue_times(function("STS [R1], R0 ; 1 7 2 0\nFADD R0, R0, R0 ; 4 7 7 4\nEXIT ; 5").code)
    assert times == [0, model.READ, model.READ + 4, model.READ + 9]


def test_what_is_never_executed_costs_its_place():
    times = model.issue_times(function("LDS R0, [R1] ; 1 0\n@!PT LDS R2, [R1] ; 2 0 7 1\nEXIT ; 1 7 7 1").code)
    assert times == [0, 1, model.latency("LDS"), model.latency("LDS") + 1]


@pytest.mark.parametrize(
    ("name", "cycles"), [("LDG.E.128", 260), ("LDGSTS.E.BYPASS.128", 20), ("LD.E", 40), ("LDS.128", 30), ("FADD", 15)]
)
def test_latencies(name, cycles):
    assert model.latency(name) == cycles


BRANCHES = """
.L_loop:
    ISETP.GT.AND P0, PT, R8, 0x3, PT ; 2
    @P0 BRA `(.L_many) ; 5
    MUFU.EX2 R1, R1 ; 1
    BRA `(.L_join) ; 5
.L_many:
    MUFU.EX2 R1, R1 ; 1
    MUFU.EX2 R2, R2 ; 1
    FADD R3, R3, R3 ; 2
.L_inner:
    FMUL R4, R4, R4 ; 4
    @P1 BRA `(.L_inner) ; 5
.L_join:
    @P2 BRA `(.L_loop) ; 5
    EXIT ; 5
"""


def opcodes(path: list[Instruction]) -> list[str]:
    return [instruction.opcode for instruction in path]


def test_the_way_through_an_iteration():
    (loop,) = function(BRANCHES).loops
    many = ["ISETP", "BRA", "MUFU", "MUFU", "FADD", "FMUL", "BRA", "BRA"]
    assert opcodes(model.iteration(loop, ["MUFU.EX2"], 1)) == many
    assert opcodes(model.iteration(loop, ["MUFU.EX2"], 3)) == [*many[:5], *["FMUL", "BRA"] * 3, "BRA"]
    assert opcodes(model.iteration(loop, ["HMMA"], 1)) == ["ISETP", "BRA", "MUFU", "BRA", "BRA"]  # the shortest


def test_loops_are_found_by_what_they_hold():
    code = function(BRANCHES)
    outer, inner = code.all_loops
    assert named("MUFU.EX2 ISETP").find(code) is outer
    assert named("BRA !MUFU").find(code) is inner
    assert named("HMMA").find(code) is None
    assert model.estimate(named("HMMA", "HMMA"), code) is None
    assert model.estimate(named("MUFU", "MUFU", part="HMMA HMMA"), code) is None


def test_the_table():
    rows = model.parse_table(model.TABLE.read_text())
    assert len({row.name for row in rows}) == len(rows)
    text = model.model_table(rows, {}).splitlines()
    assert sum("no such loop" in line for line in text) == len(rows)
    assert "no measurement" in text[-1]
    with pytest.raises(model.TableError, match=r"loops\.txt:1: not seven columns"):
        model.parse_table("name | kernel | holds")
