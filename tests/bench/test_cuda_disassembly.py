# SPDX-License-Identifier: Apache-2.0
"""Parsing of a recorded disassembly by tools/cuda_static: instructions, basic blocks, loops."""

from __future__ import annotations

from cuda_static.disassembly import Function, basic_blocks, parse

NAME = "_ZN8mustdrop17copy_write_kernelI5uint4EEvPKT_PS2_i"

DISASSEMBLY = f"""	.target	sm_90

	.section	.text.{NAME},"ax",@progbits
	.align	128
        .global         {NAME}
{NAME}:
.text.{NAME}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/                   ISETP.GE.AND P0, PT, R11, UR5, PT ; /* 0x000000050b007c0c */
                                                                       /* 0x000fda000bf06270 */
        /*0020*/               @P0 EXIT ;                              /* 0x000000000000094d */
                                                                       /* 0x000fea0003800000 */
.L_x_2:
        /*0030*/                   LDG.E.128 R12, desc[UR6][R4.64] ;   /* 0x000000060a0c7981 */
                                                                       /* 0x000ea2000c1e1d00 */
        /*0040*/                   STG.E.128 desc[UR6][R2.64], R12 ;   /* 0x0000000c02007986 */
                                                                       /* 0x0041e2000c101d06 */
        /*0050*/              @!P0 BRA `(.L_x_2) ;                     /* 0xfffffffc00f08947 */
                                                                       /* 0x000fea000383ffff */
        /*0060*/                   EXIT ;                              /* 0x000000000000794d */
                                                                       /* 0x000fea0003800000 */
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);                      /* 0xfffffffc00fc7947 */
                                                                       /* 0x000fc0000383ffff */
.L_x_5:

	.section	.nv.constant0,"a"
        /*0000*/ 	.byte	0x01
"""


def parsed(code: str) -> Function:
    """The function of some lines of code, with labels."""
    (function,) = parse([f'\t.section\t.text.{NAME},"ax"', *code.splitlines()])
    return function


def test_instructions():
    (function,) = parse(DISASSEMBLY.splitlines())
    assert function.name == NAME
    assert function.labels == {".L_x_2": 3, ".L_x_3": 7, ".L_x_5": 8}
    assert [i.opcode for i in function.code] == ["LDC", "ISETP", "EXIT", "LDG", "STG", "BRA", "EXIT", "BRA"]
    load, branch = function.code[3], function.code[5]
    assert (load.address, load.guard, load.name, load.target) == (0x30, "", "LDG.E.128", None)
    assert load.word == 0x000EA2000C1E1D00
    assert (branch.guard, branch.target, branch.is_conditional) == ("@!P0", ".L_x_2", True)


def test_blocks_end_at_labels_and_branches():
    (function,) = parse(DISASSEMBLY.splitlines())
    blocks = basic_blocks(function)
    assert [len(block.code) for block in blocks] == [3, 3, 1, 1]
    assert [block.following for block in blocks] == [{1}, {1, 2}, set(), {3}]


def test_a_branch_with_a_predicate_in_its_operands_is_conditional():
    function = parsed("""
        /*0000*/                   BRA.U UP0, `(.L_x_1) ;
        /*0010*/              @!P0 BRA P1, `(.L_x_1) ;
        /*0020*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0030*/                   EXIT ;""")
    assert [i.is_conditional for i in function.code] == [True, True, False, False]
    assert [block.following for block in basic_blocks(function)] == [{1, 3}, {2, 3}, {3}, set()]


def test_loops_nest():
    function = parsed("""
.L_x_1:
        /*0000*/                   LDS R0, [R1] ;
.L_x_2:
        /*0010*/                   FADD R0, R0, R0 ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   STS [R1], R0 ;
.L_x_3:
        /*0040*/                   FMUL R0, R0, R0 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;""")
    (outer,) = function.loops
    assert [i.opcode for i in outer.own_code] == ["LDS", "STS", "BRA"]
    assert [[i.opcode for i in loop.own_code] for loop in outer.inner] == [["FADD", "BRA"], ["FMUL", "BRA"]]
    assert len(outer.code) == 7
    assert function.all_loops == [outer, *outer.inner]


def test_a_block_that_branches_back_from_behind_the_loop():
    function = parsed("""
.L_x_1:
        /*0000*/               @P1 BRA `(.L_x_9) ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   BRA.U UP0, `(.L_x_1) ;
        /*0030*/                   STG.E.128 desc[UR6][R2.64], R12 ;
        /*0040*/                   EXIT ;
.L_x_9:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R2.64] ;
        /*0060*/                   BRA `(.L_x_2) ;""")
    (loop,) = function.loops
    assert [i.opcode for i in loop.code] == ["BRA", "HMMA", "BRA", "LDGSTS", "BRA"]


def test_code_for_parted_warps_is_in_no_loop():
    function = parsed("""
.L_x_1:
        /*0000*/                   BRA.DIV UR5, `(.L_x_9) ;
        /*0010*/                   SHFL.BFLY PT, R12, R59, R10, 0x1f ;
.L_x_2:
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
.L_x_9:
        /*0040*/                   WARPSYNC.COLLECTIVE R40, `(.L_x_10) ;
.L_x_10:
        /*0050*/                   BRA `(.L_x_2) ;""")
    (loop,) = function.loops
    assert [i.opcode for i in loop.code] == ["BRA", "SHFL", "BRA"]
