# SPDX-License-Identifier: Apache-2.0
"""The rules of tools/check_cuda.py, on stretches of machine code that nvcc 13.0 made, and on kernels made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cuda_static import rules
from cuda_static.disassembly import Function, parse
from cuda_static.kernel import Code, Kernel

# An element of an unrolled loop with a test that stayed a branch, as score_kernel<bfloat16_t, 2> had it.
CUT_EXPONENTIAL = """
FFMA R114, R52, UR6, -R112 ;
LOP3.LUT P4, RZ, R217, 0x2, RZ, 0xc0, !PT ;
BSSY B2, `(.L_{0}) ;
MUFU.EX2 R114, R114 ;
@!P4 BRA `(.L_{0}) ;
FFMA R100, R114, R113, R100 ;
.L_{0}:
BSYNC B2 ;"""
# The same with a selection in place of the branch.
EXPONENTIAL = """
FFMA R114, R52, UR6, -R112 ;
MUFU.EX2 R114, R114 ;
@P4 FFMA R100, R114, R113, R100 ;"""
# Sixteen rows against 32 keys, with the end of the loop over groups of rows as a branch.
CUT_PRODUCTS = """
LDSM.16.M88.4 R116, [R117] ;
HMMA.16816.F32.BF16 R4, R108, R116, R4 ;
HMMA.16816.F32.BF16 R8, R108, R118, R8 ;
HMMA.16816.F32.BF16 R12, R112, R116, R12 ;
HMMA.16816.F32.BF16 R16, R112, R118, R16 ;
@!P0 BRA `(.L_end) ;
WARPSYNC.ALL ;"""
PRODUCTS = "".join(line for line in CUT_PRODUCTS.splitlines(keepends=True) if line[:4] in ("LDSM", "HMMA"))
# Code of a division by an integer parameter, shortened.
DIVISION = """
IABS R22, R13 ;
I2F.RP R19, R22 ;
MUFU.RCP R19, R19 ;
IADD3 R20, R19, 0xffffffe, RZ ;
F2I.FTZ.U32.TRUNC.NTZ R21, R20 ;
IMAD.HI.U32 R21, R21, R23, R20 ;"""


def function(code: str) -> Function:
    """Lines without addresses as a function."""
    address, lines = 0, ['\t.section\t.text.kernel,"ax"']
    for line in filter(None, code.splitlines()):
        lines.append(line if line.startswith(".L") else f"        /*{address:04x}*/  {line}")
        address += 16 * (not line.startswith(".L"))
    (found,) = parse(lines)
    return found


def in_loop(body: str) -> Function:
    """A function that repeats some code."""
    return function(f".L_loop:\nBAR.SYNC.DEFER_BLOCKING 0x0 ;\n{body}\n.L_end:\n@P0 BRA `(.L_loop) ;\nEXIT ;")


# ------------------------------------------------------------------------------------------------ exponentials


CUT_BY_SIXTEEN = "".join(CUT_EXPONENTIAL.format(i) for i in range(16))
LEAVE = "\n@!P0 BRA `(.L_end) ;"
INNER_LOOP = f"\n.L_inner:{EXPONENTIAL}\n@P1 BRA `(.L_inner) ;"


@pytest.mark.parametrize(
    ("code", "cut"),
    [
        pytest.param(in_loop(CUT_BY_SIXTEEN), 16, id="each behind a branch of its own"),
        pytest.param(in_loop(EXPONENTIAL * 16), 0, id="no branches"),
        pytest.param(in_loop((EXPONENTIAL * 8 + LEAVE) * 4), 0, id="tiles of eight"),
        pytest.param(in_loop((EXPONENTIAL * 7 + LEAVE) * 4), 28, id="a test for seven"),
        pytest.param(in_loop((EXPONENTIAL * 32 + LEAVE) * 2 + EXPONENTIAL * 4), 0, id="a rare path"),
        pytest.param(in_loop(EXPONENTIAL * 16 + (LEAVE + EXPONENTIAL * 4) * 2), 8, id="paths that are not rare"),
        pytest.param(in_loop(EXPONENTIAL), 0, id="one an iteration"),
        pytest.param(in_loop(CUT_EXPONENTIAL.format(0)), 0, id="one an iteration, behind a branch"),
        # Up to three iterations one by one, as ptxas leaves them of a loop that is unrolled by four.
        pytest.param(in_loop((EXPONENTIAL + LEAVE) * 3), 0, id="the rest of an unrolled loop"),
        pytest.param(function(CUT_BY_SIXTEEN + "\nEXIT ;"), 0, id="outside of loops"),
        pytest.param(in_loop(EXPONENTIAL * 8 + INNER_LOOP + EXPONENTIAL * 8), 0, id="an inner loop counts by itself"),
    ],
)
def test_exponentials(code, cut):
    assert rules.cut_exponentials(code) == cut


def test_instructions_for_each_exponential():
    assert rules.per_exponential(in_loop(EXPONENTIAL * 16)) == pytest.approx((15 * 3 + 1) / 16)
    assert rules.per_exponential(in_loop(EXPONENTIAL)) is None


# ------------------------------------------------------------------------------------------------ products


TESTED = (PRODUCTS + "@!P0 BRA `(.L_end) ;\n") * 4  # one way of several, for less than the full depth


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        # A branch behind each group, WARPSYNC before three.
        pytest.param(CUT_PRODUCTS * 4, 4 + 3, id="branches"),
        pytest.param(PRODUCTS * 4, 0, id="no branches"),
        pytest.param(TESTED, 0, id="a branch for four"),
        pytest.param(TESTED + PRODUCTS * 4, 0, id="a common path without branches outweighs the others"),
        pytest.param(CUT_PRODUCTS, 0, id="few are no unrolled loop"),
    ],
)
def test_products(body, cut):
    assert rules.cut_products(in_loop(body)) == cut


def load(register: int) -> str:
    """A load of the operand from a register on."""
    return f"LDSM.16.M88.4 R{register}, [R117] ;\n"


def multiply(a: int, b: int) -> str:
    """Two products of operands in registers."""
    return f"HMMA.16816.F32.BF16 R4, R{a}.reuse, R{b}, R4 ;\nHMMA.16816.F32.BF16 R8, R{a}, R{b + 2}.reuse, R8 ;\n"


SINGLE = load(100) + (load(116) + multiply(100, 116)) * 4  # each load is needed by the next product
STEPS = load(120) + multiply(100, 116) + load(116) + multiply(100, 120)
DOUBLE = load(100) + load(116) + STEPS * 2


@pytest.mark.parametrize(
    ("body", "exposed"),
    [
        pytest.param(SINGLE, 3, id="one buffer"),
        pytest.param(DOUBLE, 0, id="two buffers"),
        pytest.param(load(100) + load(116) + multiply(100, 116) * 4, 0, id="the first loads do not count"),
        pytest.param(load(100) + load(116) + multiply(100, 116) * 4 + load(104) + multiply(104, 116), 1, id="of keys"),
        pytest.param(load(100) + load(116) + multiply(100, 116) * 4 + load(104) + multiply(112, 116), 0, id="others"),
        pytest.param(DOUBLE + STEPS * 4 + load(100) + multiply(100, 116), 0, id="one of many"),
        pytest.param((load(116) + multiply(100, 116)) * 3, 0, id="few are no unrolled loop"),
    ],
)
def test_operands(body, exposed):
    assert rules.exposed_operands(in_loop(body)) == exposed


# ------------------------------------------------------------------------------------------------ divisions


WITHOUT_RECIPROCAL = "\n".join(line for line in DIVISION.splitlines() if "RCP" not in line and "I2F" not in line)


@pytest.mark.parametrize(
    ("code", "number"),
    [
        pytest.param(in_loop(DIVISION * 3), 3, id="in a loop"),
        pytest.param(function(DIVISION * 3 + "\nEXIT ;"), 0, id="outside of loops"),
        pytest.param(in_loop(DIVISION + "\nMUFU.RCP R0, R1 ;"), 2, id="a reciprocal is one"),
        pytest.param(in_loop(WITHOUT_RECIPROCAL), 1, id="its reciprocal was moved out of the loop"),
        pytest.param(in_loop("I2FP.F32.S32 R0, R1 ;\nMUFU.RSQ R2, R3 ;"), 0, id="conversions of the integer unit"),
    ],
)
def test_divisions(code, number):
    assert rules.divisions_in_loops(code) == number


def test_divisions_count_in_merging_alone():
    code = in_loop(DIVISION)
    assert rules.read_code(code, "spatial_merge").faults == {"divisions": 1}
    assert rules.read_code(code, "gather").faults == {}


# ------------------------------------------------------------------------------------------------ kernels


def test_instructions_count_in_loops_alone():
    body = "LDG.E.128 R12, desc[UR6][R4.64] ;\nSTG.E.128 desc[UR6][R2.64], R12 ;\nLDGSTS.E.BYPASS.128 [R5], [R2.64] ;"
    code = rules.read_code(in_loop(body + PRODUCTS), "gather")
    assert (code.load16, code.store16, code.matrix) == (2, 1, 4)
    code = rules.read_code(function(body + "\nEXIT ;"), "gather")
    assert (code.load16, code.store16, code.matrix, code.instructions) == (0, 0, 0, 4)


GOOD = Kernel("gather_kernel<uint4, true>", "90", "gather", 40, 0, 0, 0, Code(680, 4, 4, 0, None))


def with_code(kernel: Kernel, **change: object) -> Kernel:
    """The kernel with other counts."""
    return replace(kernel, code=replace(kernel.code, **change))


def test_a_good_kernel():
    assert rules.missing([GOOD], ["gather"], ["90"]) == rules.faults_of([GOOD]) == []
    narrow = with_code(replace(GOOD, name="select_kernel<float>"), load16=0, store16=0)
    assert rules.missing([narrow], [], []) == []
    assert rules.missing([replace(GOOD, code=None)], ["attention_scores"], ["90"]) == []


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (GOOD.name, {"load16": 0}, "no 16-byte load"),
        (GOOD.name, {"store16": 0}, "no 16-byte store"),
        ("score_kernel<half_t, 64>", {"load16": 0, "matrix": 8}, "feeds its matrix instructions"),
        ("merge_similarity_kernel<float, 4>", {"load16": 0}, "no 16-byte load"),
    ],
)
def test_what_a_kernel_lacks(name, change, what):
    (problem,) = rules.missing([with_code(replace(GOOD, name=name), **change)], ["gather"], ["90"])
    assert what in problem
    assert problem.startswith("sm_90: gather/")


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (replace(GOOD, spill_bytes=4), "spills 4 bytes"),
        (replace(GOOD, stack_bytes=16, code=None), "16 bytes of local memory"),
        (with_code(GOOD, faults={"divisions": 7}), "7 divisions or reciprocals in loops"),
    ],
)
def test_faults_are_sentences(kernel, says):
    (fault,) = rules.faults_of([kernel])
    assert str(fault).startswith("sm_90: gather/gather_kernel<uint4, true>: ")
    assert says in str(fault)


def test_scores_need_matrix_instructions():
    plain = replace(GOOD, folder="attention_scores", name="score_kernel<float, 64>")
    half = with_code(replace(plain, name="score_kernel<half_t, 64>"), matrix=8)
    brain = with_code(replace(plain, name="score_kernel<bfloat16_t, 64>"), matrix=8)
    assert rules.missing([plain, half, brain], ["attention_scores"], ["90"]) == []
    (problem,) = rules.missing([plain, half, with_code(brain, matrix=0)], ["attention_scores"], ["90"])
    assert "no kernel of bfloat16_t with matrix instructions" in problem
