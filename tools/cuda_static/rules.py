# SPDX-License-Identifier: Apache-2.0
"""Rules: counts in the disassembly of a kernel and their limits.

A fault is a code pattern that the compiler emits for ordinary C++ and that multiplies the time. Tests do not find it,
since results are correct.
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

# Template arguments of kernels that move 16 bytes at once: a 16-byte type, or the number of elements.
_WIDE = re.compile(
    r"(score|normalizer)_kernel<.*, true>|_kernel<(uint4\b|(half_t|bfloat16_t), (\(int\))?8\b|float, (\(int\))?4\b)"
)
# Those that copy element by element, for rows that are not aligned.
_NARROW = re.compile(r", false>")
# Those that write rows (the others write a number per row).
_WRITERS = re.compile(r"(gather|compact|compact_chunks|write|cluster)_kernel<")
# Folders whose kernels for 16-bit types must use matrix instructions.
_MATRIX_FOLDERS = {"attention_scores": ("half_t", "bfloat16_t")}

UNROLLED = 8  # minimum exponentials or matrix instructions in the body of an unrolled loop
MOST_ALONE = 1 / 8  # of the exponentials
MOST_CUTS = 1 / 4  # per matrix instruction
MOST_EXPOSED = 1 / 8  # of the operand loads


def _count(code: Iterable[Instruction], name: str | re.Pattern[str]) -> int:
    """Number of instructions whose name has this prefix or matches this pattern."""
    pattern = re.compile(name)
    return sum(bool(pattern.match(instruction.name)) for instruction in code)


def _is_exponential(instruction: Instruction) -> bool:
    return instruction.name.startswith("MUFU.EX2")


def _is_cut(instruction: Instruction) -> bool:
    """True if no instruction is moved across it: a branch, or a synchronization of a warp."""
    return instruction.opcode in BRANCHES | REGIONS


# ------------------------------------------------------------------------------------------------ faults


def cut_exponentials(function: Function) -> int:
    """Exponentials of unrolled loops that branches separate from the others of their tile.

    A condition inside an unrolled loop that is compiled to a branch isolates each exponential (BSSY, MUFU.EX2, BRA,
    BSYNC), so that their latencies do not overlap. In each loop, outside of its inner loops, the exponentials in runs
    of fewer than ``UNROLLED`` between two branches or warp synchronizations are counted. Fewer than ``UNROLLED`` are
    no unrolled loop, and up to one of eight is allowed: rare paths, such as a rescaling, have few.
    """
    total = 0
    for loop in function.all_loops:
        runs = [0]
        for instruction in loop.own_code:
            if _is_exponential(instruction):
                runs[-1] += 1
            elif _is_cut(instruction):
                runs.append(0)
        count, alone = sum(runs), sum(run for run in runs if run < UNROLLED)
        if alone >= UNROLLED and alone > MOST_ALONE * count:
            total += alone
    return total


def cut_products(function: Function) -> int:
    """Branches among the matrix instructions of loops over the depth, if there is more than one per four.

    Operand loads (LDSM) cannot be hoisted across a branch or a WARPSYNC, so that their latencies are exposed. Counted
    in the basic blocks with LDSM or HMMA, in loops with at least ``UNROLLED`` matrix instructions outside of their
    inner loops. Alternatives for different sizes count together: a loop whose common path has no branches stays below
    the limit.
    """
    total = 0
    for loop in function.all_loops:
        blocks = [block for block in loop.own if any(i.opcode in ("LDSM", "HMMA") for i in block.code)]
        code = [instruction for block in blocks for instruction in block.code]
        products, cuts = _count(code, r"HMMA\b"), sum(map(_is_cut, code))
        if products >= UNROLLED and cuts > MOST_CUTS * products:
            total += cuts
    return total


def _registers(operand: str, width: int) -> set[int]:
    """Numbers of the registers from an operand such as "R40.reuse" on."""
    found = re.match(r"-?R(\d+)", operand.strip())
    return set(range(int(found[1]), int(found[1]) + width)) if found else set()


def exposed_operands(function: Function) -> int:
    """Operand loads (LDSM) whose latency no matrix instruction hides, if they are more than one of eight.

    A load is exposed if the next matrix instruction needs its result; the loads before a block's first matrix
    instruction do not count. Double-buffered operands are loaded during the products of the preceding step. Counted in
    the basic blocks of loops with at least ``UNROLLED`` matrix instructions.
    """
    loads = exposed = 0
    for block in {block.number: block for loop in function.all_loops for block in loop.own}.values():
        if _count(block.code, r"HMMA\b") < UNROLLED:
            continue
        pending: list[set[int]] = []  # registers of the loads since the last matrix instruction
        multiplies = False
        for instruction in block.code:
            operands = instruction.text.split(None, 1)[-1].split(",")
            if instruction.opcode == "LDSM" and multiplies:
                pending.append(_registers(operands[0], 4))
                loads += 1
            elif instruction.opcode == "HMMA":
                multiplies = True
                read = _registers(operands[1], 4) | _registers(operands[2], 2)
                exposed += sum(bool(written & read) for written in pending)
                pending.clear()
    return exposed if exposed > MOST_EXPOSED * loads else 0


def divisions_in_loops(function: Function) -> int:
    """Divisions and reciprocals in loops.

    A division by a run-time integer is a sequence of about twenty dependent instructions: I2F, MUFU.RCP, F2I and
    corrections. A division of floats, and a reciprocal, has only the MUFU.RCP. If a divisor is loop-invariant, ptxas
    may hoist some of the three; so the most frequent one is counted.
    """
    code = [instruction for loop in function.loops for instruction in loop.code]
    return max(_count(code, name) for name in (r"MUFU\.RCP", r"I2F\b", r"F2I\b"))


@dataclass(frozen=True)
class Rule:
    """A kind of fault."""

    message: str  # for a kernel, with {count}
    folders: tuple[str, ...]  # folders it applies to; empty: all
    count: Callable[[Function], int] | None = None  # in the disassembly; None: ptxas reports it


RULES = {
    "exponentials": Rule("{count} exponentials of unrolled loops are alone between branches", (), cut_exponentials),
    "products": Rule(
        "{count} branches and meeting points among the matrix instructions of a loop, more than one to four",
        (),
        cut_products,
    ),
    "operands": Rule("{count} loads of operands are needed by the next matrix instruction", (), exposed_operands),
    "divisions": Rule("{count} divisions or reciprocals in loops", ("spatial_merge",), divisions_in_loops),
    "spills": Rule("spills {count} bytes", ()),
    "stack": Rule("has {count} bytes of local memory", ()),
}


# ------------------------------------------------------------------------------------------------ kernels


def per_exponential(function: Function) -> float | None:
    """Instructions per exponential of an unrolled loop, from its first to its last; the maximum over all loops."""
    most = None
    for loop in function.all_loops:
        code = loop.own_code
        places = [at for at, instruction in enumerate(code) if _is_exponential(instruction)]
        if len(places) >= UNROLLED:
            most = max(most or 0.0, (places[-1] - places[0] + 1) / len(places))
    return most


def read_code(function: Function, folder: str) -> Code:
    """Statistics of a kernel of a folder."""
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
    """Violation of a rule by a kernel."""

    rule: str
    kernel: Kernel
    count: int

    def __str__(self) -> str:
        message = RULES[self.rule].message.format(count=self.count)
        return f"{label(self.kernel.target)}: {self.kernel.path}: {message}"


def faults_of(kernels: Iterable[Kernel]) -> list[Fault]:
    """Faults of kernels, known ones included."""
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
    if kernel.code.matrix and not kernel.code.load16 and not _NARROW.search(kernel.name):
        yield "feeds its matrix instructions with no 16-byte load in a loop"


def missing(kernels: Sequence[Kernel], folders: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Required instructions that kernels lack: 16-byte accesses, matrix instructions."""
    problems = [f"{label(k.target)}: {k.path} {what}" for k in kernels for what in _lacks(k)]
    for folder in folders:
        for target in targets:
            mine = [k for k in kernels if (k.folder, k.target) == (folder, target) and k.code]
            for element in _MATRIX_FOLDERS.get(folder, ()):
                if mine and not any(k.code and k.code.matrix and re.search(rf"\b{element}\b", k.name) for k in mine):
                    problems.append(f"{label(target)}: {folder} has no kernel of {element} with matrix instructions")
    return problems
