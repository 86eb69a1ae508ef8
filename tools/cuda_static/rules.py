# SPDX-License-Identifier: Apache-2.0
"""Rules: counts in the disassembly of a kernel, and their limits.

A fault of this file is a pattern that a compiler makes of innocent C++ and that costs several times the time. It shows
in no test, since the results are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .disassembly import BRANCHES, REGIONS, Function, Instruction
from .kernel import Code, Kernel, label

# Plain loads are LDG or, through generic addresses, LD; cp.async is LDGSTS; bulk and tensor copies UBLKCP and UTMALDG.
_LOAD16 = re.compile(r"(LDG?\.[\w.]*(128|256)|LDGSTS\.[\w.]*128|UBLKCP|UTMALDG)")
_STORE16 = re.compile(r"(STG?\.[\w.]*(128|256)|UTMASTG)")
_MATRIX = re.compile(r"(HMMA|HGMMA|UTCHMMA)\b")

# A kernel that is instantiated to move 16 bytes at once says so: a piece of 16 bytes, or that many elements.
_WIDE = re.compile(r"_kernel<(uint4\b|(half_t|bfloat16_t), (\(int\))?8\b|float, (\(int\))?4\b)")
# Of those, the ones that write rows (the others write a number per row).
_WRITERS = re.compile(r"(gather|compact|compact_chunks|write|cluster)_kernel<")
# Folders whose kernels for 16-bit numbers have to use matrix instructions.
_MATRIX_FOLDERS = {"attention_scores": ("half_t", "bfloat16_t")}

UNROLLED = 8  # exponentials, or matrix instructions, from which on a loop's body counts as unrolled
MOST_CUTS = 1 / 4  # of the exponentials, and per matrix instruction


def _count(code: Iterable[Instruction], name: str | re.Pattern[str]) -> int:
    """Instructions whose name begins so."""
    pattern = re.compile(name)
    return sum(bool(pattern.match(instruction.name)) for instruction in code)


def _is_exponential(instruction: Instruction) -> bool:
    return instruction.name.startswith("MUFU.EX2")


def _is_cut(instruction: Instruction) -> bool:
    """True where nothing is moved across it: a branch, or a place where the threads of a warp meet."""
    return instruction.opcode in BRANCHES | REGIONS


# ------------------------------------------------------------------------------------------------ faults


def cut_exponentials(function: Function) -> int:
    """Exponentials of unrolled loops that a branch separates from the one before.

    A test inside an unrolled loop that stays a branch puts each exponential into a region of its own (BSSY, MUFU.EX2,
    BRA, BSYNC). Then no two are under way at the same time, and the latency of each shows. In each loop with at least
    ``UNROLLED`` exponentials outside of its inner loops, those are counted that have a branch or a meeting point
    between themselves and the exponential before. The first one of an iteration does not count, so that a loop's own
    back edge is none. A loop where at most a quarter is cut off is in order: one test for several exponentials.
    """
    total = 0
    for loop in function.all_loops:
        seen, cut, cuts, count = False, False, 0, 0
        for instruction in loop.own_code:
            if _is_exponential(instruction):
                cuts += seen and cut
                seen, cut, count = True, False, count + 1
            elif _is_cut(instruction):
                cut = True
        if count >= UNROLLED and cuts > MOST_CUTS * count:
            total += cuts
    return total


def cut_products(function: Function) -> int:
    """Branches among the matrix instructions of loops over the depth, where there are more than one to four.

    The loads of the operands (LDSM) cannot be started early across a branch or a WARPSYNC, so that the latency of each
    shows. Counted in the basic blocks that hold LDSM or HMMA, in loops with at least ``UNROLLED`` matrix instructions
    outside of their inner loops. Alternatives for different sizes count together: a loop whose common path is free of
    branches stays below the limit.
    """
    total = 0
    for loop in function.all_loops:
        blocks = [block for block in loop.own if any(i.opcode in ("LDSM", "HMMA") for i in block.code)]
        code = [instruction for block in blocks for instruction in block.code]
        products, cuts = _count(code, r"HMMA\b"), sum(map(_is_cut, code))
        if products >= UNROLLED and cuts > MOST_CUTS * products:
            total += cuts
    return total


def divisions_in_loops(function: Function) -> int:
    """Divisions and reciprocals in loops.

    A division by an integer that is known at run time only is a sequence of about twenty dependent instructions: I2F,
    MUFU.RCP, F2I and corrections. A division of floats, and a reciprocal, has the MUFU.RCP alone. Where a divisor does
    not change, ptxas may move some of the three out of the loop; so the most frequent one counts.
    """
    code = [instruction for loop in function.loops for instruction in loop.code]
    return max(_count(code, name) for name in (r"MUFU\.RCP", r"I2F\b", r"F2I\b"))


@dataclass(frozen=True)
class Rule:
    """A kind of fault."""

    message: str  # of a kernel, with {count}
    folders: tuple[str, ...]  # whose kernels it is for; empty: all
    count: Callable[[Function], int] | None = None  # in the disassembly; None: ptxas reports it


RULES = {
    "exponentials": Rule(
        "{count} exponentials of unrolled loops stand behind a branch of their own", (), cut_exponentials
    ),
    "products": Rule(
        "{count} branches and meeting points among the matrix instructions of a loop, more than one to four",
        (),
        cut_products,
    ),
    "divisions": Rule("{count} divisions or reciprocals in loops", ("spatial_merge",), divisions_in_loops),
    "spills": Rule("spills {count} bytes", ()),
    "stack": Rule("has {count} bytes of local memory", ()),
}


# ------------------------------------------------------------------------------------------------ kernels


def per_exponential(function: Function) -> float | None:
    """Instructions for each exponential of an unrolled loop, from its first to its last; the most of all loops."""
    most = None
    for loop in function.all_loops:
        code = loop.own_code
        places = [at for at, instruction in enumerate(code) if _is_exponential(instruction)]
        if len(places) >= UNROLLED:
            most = max(most or 0.0, (places[-1] - places[0] + 1) / len(places))
    return most


def read_code(function: Function, folder: str) -> Code:
    """All that is counted in a kernel of a folder."""
    looped = [instruction for loop in function.loops for instruction in loop.code]
    rules = {name: rule for name, rule in RULES.items() if rule.count and folder in (rule.folders or (folder,))}
    counts = {name: rule.count(function) for name, rule in rules.items() if rule.count}
    return Code(
        instructions=len(function.code),
        load16=_count(looped, _LOAD16),
        store16=_count(looped, _STORE16),
        matrix=_count(looped, _MATRIX),
        per_exponential=per_exponential(function),
        faults={name: count for name, count in counts.items() if count},
    )


@dataclass(frozen=True)
class Fault:
    """A rule that a kernel does not keep."""

    rule: str
    kernel: Kernel
    count: int

    def __str__(self) -> str:
        message = RULES[self.rule].message.format(count=self.count)
        return f"{label(self.kernel.target)}: {self.kernel.path}: {message}"


def faults_of(kernels: Iterable[Kernel]) -> list[Fault]:
    """The faults of kernels that may be known."""
    found = []
    for kernel in kernels:
        counts = {"spills": kernel.spill_bytes, "stack": kernel.stack_bytes}
        counts |= kernel.code.faults if kernel.code else {}
        found += [Fault(rule, kernel, count) for rule, count in counts.items() if count]
    return found


def _lacks(kernel: Kernel) -> Iterator[str]:
    """Missing instructions of a kernel."""
    if kernel.code is None:
        return
    wide = bool(_WIDE.search(kernel.name))
    if wide and not kernel.code.load16:
        yield "has no 16-byte load in a loop"
    if wide and _WRITERS.search(kernel.name) and not kernel.code.store16:
        yield "has no 16-byte store in a loop"
    if kernel.code.matrix and not kernel.code.load16:
        yield "feeds its matrix instructions with no 16-byte load in a loop"


def missing(kernels: Sequence[Kernel], folders: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Instructions that kernels should have and lack: 16-byte accesses, matrix instructions."""
    problems = [f"{label(k.target)}: {k.path} {what}" for k in kernels for what in _lacks(k)]
    for folder in folders:
        for target in targets:
            mine = [k for k in kernels if (k.folder, k.target) == (folder, target) and k.code]
            for element in _MATRIX_FOLDERS.get(folder, ()):
                if mine and not any(k.code and k.code.matrix and re.search(rf"\b{element}\b", k.name) for k in mine):
                    problems.append(f"{label(target)}: {folder} has no kernel of {element} with matrix instructions")
    return problems
