# SPDX-License-Identifier: Apache-2.0
"""Parser of nvdisasm's output: instructions, basic blocks, and the loop nest."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# Instructions that end a basic block or synchronize the threads of a warp: no instruction is moved across them.
BRANCHES = frozenset({"BRA", "BRX", "JMP", "CALL", "RET", "EXIT"})
REGIONS = frozenset({"BSSY", "BSYNC", "BREAK", "WARPSYNC"})

_INSTRUCTION = re.compile(r"\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P[0-9T]+\s+)?(?P<text>[^;]*?)\s*;")
_UPPER_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")


class DisassemblyError(RuntimeError):
    """Machine code that nvdisasm cannot read."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    address: int  # bytes from the function's begin
    guard: str  # "@P0", "@!UP1"; empty: unconditional
    text: str  # "LDG.E.128 R12, desc[UR6][R4.64]"
    word: int = 0  # the upper 64 bits of the encoding, where nvdisasm printed it (-hex)

    @cached_property
    def name(self) -> str:
        """The opcode with its modifiers: "LDG.E.128"."""
        return self.text.split(None, 1)[0] if self.text else ""

    @cached_property
    def opcode(self) -> str:
        """The opcode: "LDG"."""
        return self.name.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a branch goes to; None for other instructions."""
        if self.opcode != "BRA":
            return None
        found = re.search(r"`\(([^)]+)\)", self.text)
        return found[1] if found else None

    @property
    def is_conditional(self) -> bool:
        """True if the instruction after a branch may be executed next."""
        predicate = re.search(r"\b!?U?P\d", self.text.split("`")[0])
        return bool(self.guard or predicate) or self.name.startswith("BRA.DIV")


@dataclass
class Function:
    """One kernel: instructions in the order of their addresses, and the targets of labels."""

    name: str  # mangled
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index into ``code``

    @cached_property
    def loops(self) -> list[Loop]:
        """The outermost loops, in the order of their addresses. Requires the complete code."""
        blocks = basic_blocks(self)
        return _loops(blocks, {i: block.following for i, block in enumerate(blocks)})

    @property
    def all_loops(self) -> list[Loop]:
        """Every loop, outer before inner."""
        return [loop for outer in self.loops for loop in outer.walk()]

    @cached_property
    def whole(self) -> Loop:
        """The function as a loop that is executed once; its iteration ends with an EXIT."""
        blocks = basic_blocks(self)
        deeper = {block.number for loop in self.loops for block in loop.blocks}
        return Loop(0, blocks, [block for block in blocks if block.number not in deeper], self.loops)


def parse(lines: Iterable[str]) -> Iterator[Function]:
    """The functions of a disassembly."""
    function: Function | None = None
    for line in lines:
        if start := re.match(r"\s*\.section\s+(?:\.text\.([\w$]+))?", line):
            if function:
                yield function
            function = Function(start[1]) if start[1] else None
        elif function is None:
            continue
        elif match := _INSTRUCTION.match(line):
            guard = (match["guard"] or "").strip()
            function.code.append(Instruction(int(match["address"], 16), guard, match["text"]))
        elif label := re.match(r"(\.L_\w+):", line):
            function.labels[label[1]] = len(function.code)
        elif function.code and (upper := _UPPER_WORD.match(line)):
            last = function.code[-1]
            function.code[-1] = Instruction(last.address, last.guard, last.text, int(upper[1], 16))
    if function:
        yield function


def disassemble(nvdisasm: str, code: Path) -> Iterator[Function]:
    """The functions of a cubin, with their encodings, read as a stream."""
    command = [nvdisasm, "-c", "-ndf", "-hex", str(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        yield from parse(process.stdout)
        said = process.stderr.read()
    if process.returncode:
        raise DisassemblyError(f"{nvdisasm} cannot read {code.name}: {said.strip()[:300]}")


# ------------------------------------------------------------------------------------------------ control flow


@dataclass
class Block:
    """Instructions without a branch between them, and the successor blocks."""

    number: int  # in the order of addresses
    code: list[Instruction]
    following: set[int] = field(default_factory=set)  # by number


def basic_blocks(function: Function) -> list[Block]:
    """A function split at its labels and after its branches.

    The target of BRA.DIV is left out: that code handles divergent warps at places where the source implies convergence.
    """
    code = function.code
    starts = {0, *function.labels.values()}
    starts |= {i + 1 for i, instruction in enumerate(code) if instruction.opcode in BRANCHES}
    bounds = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(bounds)}
    ends = [*bounds[1:], len(code)]
    blocks = [Block(i, code[begin:end]) for i, (begin, end) in enumerate(zip(bounds, ends, strict=True))]
    for i, block in enumerate(blocks):
        last = block.code[-1]
        goal = function.labels.get(last.target or "")
        if goal in number and not last.name.startswith("BRA.DIV"):
            block.following.add(number[goal])
        leaves = last.opcode in BRANCHES - {"CALL"} and not last.is_conditional
        if not leaves and i + 1 < len(blocks):
            block.following.add(i + 1)
    return blocks


@dataclass
class Loop:
    """Blocks of a loop, and the inner loops."""

    entry: int  # number of the first block of an iteration
    blocks: list[Block]  # in the order of their addresses, those of inner loops included
    own: list[Block]  # those outside of inner loops
    inner: list[Loop]

    @property
    def code(self) -> list[Instruction]:
        """The instructions, those of inner loops included."""
        return [instruction for block in self.blocks for instruction in block.code]

    @property
    def own_code(self) -> list[Instruction]:
        """The instructions outside of inner loops."""
        return [instruction for block in self.own for instruction in block.code]

    def walk(self) -> Iterator[Loop]:
        """This loop and its inner loops."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


def _loops(blocks: Sequence[Block], edges: dict[int, set[int]]) -> list[Loop]:
    """The loops of a graph: strongly connected components; recursively, those without the back edges to the entry."""
    loops = []
    for component in _components(edges):
        if len(component) == 1 and not edges[component[0]] & set(component):
            continue
        inside = set(component)
        entered = {node for other, following in edges.items() if other not in inside for node in following & inside}
        entry = min(entered or inside)
        rest = {node: (edges[node] & inside) - {entry} for node in component}
        inner = _loops(blocks, rest)
        deeper = {id(block) for loop in inner for block in loop.blocks}
        mine = [blocks[node] for node in sorted(component)]
        loops.append(Loop(entry, mine, [block for block in mine if id(block) not in deeper], inner))
    return sorted(loops, key=lambda loop: loop.blocks[0].number)


def _components(edges: dict[int, set[int]]) -> list[list[int]]:
    """The strongly connected components (Tarjan's algorithm, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    waiting: set[int] = set()
    found: list[list[int]] = []
    for root in edges:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        waiting.add(root)
        walk = [(root, iter(edges[root]))]
        while walk:
            node, following = walk[-1]
            for other in following:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    waiting.add(other)
                    walk.append((other, iter(edges[other])))
                    break
                if other in waiting:
                    low[node] = min(low[node], index[other])
            else:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    found.append(stack[at:])
                    waiting -= set(stack[at:])
                    del stack[at:]
    return found
