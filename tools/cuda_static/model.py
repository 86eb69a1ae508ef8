# SPDX-License-Identifier: Apache-2.0
"""Latency model: cycles of one warp in a loop of machine code, from the control word of each instruction.

An instruction's encoding holds the cycles before the next issue, the scoreboards (of six) that it sets until its result
is available or its operands are read, and those that it waits for. With the latencies of the units this gives the time
of one warp that issues in order, alone on its multiprocessor. It is an estimate and a lower bound, no measurement:
without contention by other warps, bank conflicts and bandwidth limits. It shows exposed latencies, branches in unrolled
loops and divisions.

The loops are named in loops.txt beside this file. The encoding is that of compute capability 9.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from .disassembly import Block, Function, Instruction, Loop

TABLE = Path(__file__).with_name("loops.txt")
TARGET = "90"

# Cycles from the issue of an instruction to its result, by prefix of its name; the first match is used. Instructions of
# fixed latency need none: their stall counts include it. LDG is a hit in the level-2 cache.
LATENCIES = {
    "LDSM": 33, "LDGSTS": 20, "LDGDEPBAR": 1, "LDG": 260, "LDS": 30, "LDC": 30, "LD.": 40, "STS": 20, "STG": 20,
    "ST.": 20, "MUFU": 23, "SHFL": 24, "S2R": 25, "S2UR": 25, "ULDC": 12, "I2F": 23, "F2I": 23, "HMMA": 33, "MATCH": 30,
    "ATOMS": 60, "VOTE": 12, "DEPBAR": 1, "R2UR": 12, "BAR": 20,
}  # fmt: skip
OTHER = 15
READ, READ_ASYNC = 15, 25  # until an instruction's operands are read, and those of a copy to shared memory
TAKEN = 8  # cost of a taken branch
BOARDS = 6
NONE = 7  # in place of a scoreboard's number


class TableError(ValueError):
    """A line of the table that cannot be read."""


# ------------------------------------------------------------------------------------------------ cycles


@dataclass(frozen=True)
class Control:
    """Control word of one instruction."""

    stall: int  # cycles to the next issue
    writes: int  # scoreboard that is set until the result is available, or NONE
    reads: int  # scoreboard that is set until the operands are read, or NONE
    waits: int  # a bit for each scoreboard that must be clear

    @classmethod
    def of(cls, instruction: Instruction) -> Control:
        """Decode the upper 64 bits of the encoding."""
        word = instruction.word
        return cls(word >> 41 & 15, word >> 46 & 7, word >> 49 & 7, word >> 52 & 63)


def latency(name: str) -> int:
    """Cycles until the result of an instruction is available."""
    return next((cycles for begin, cycles in LATENCIES.items() if name.startswith(begin)), OTHER)


def issue_times(path: Sequence[Instruction]) -> list[int]:
    """Issue time of each instruction in cycles, and finally that of a following one.

    Args:
        path: instructions in the order of execution. A predicated instruction counts as executed; if the next one is
            not the next in memory, a branch was taken.
    """
    times, now, free = [], 0, [0] * BOARDS
    for at, instruction in enumerate(path):
        control = Control.of(instruction)
        is_off = instruction.guard == "@!PT"
        if not is_off:
            now = max([now, *(free[board] for board in range(BOARDS) if control.waits >> board & 1)])
        times.append(now)
        if not is_off and control.writes != NONE:
            free[control.writes] = max(free[control.writes], now + latency(instruction.name))
        if not is_off and control.reads != NONE:
            cycles = READ_ASYNC if instruction.opcode == "LDGSTS" else READ
            free[control.reads] = max(free[control.reads], now + cycles)
        now += max(control.stall, 1)
        if at + 1 < len(path) and path[at + 1].address != instruction.address + 16:
            now += TAKEN
    return [*times, now]


# ------------------------------------------------------------------------------------------------ paths


def count(code: Iterable[Instruction], name: str) -> int:
    """Number of instructions whose name has this prefix, such as "MUFU.EX2"."""
    return sum(instruction.name.startswith(name) for instruction in code)


def weight(code: Iterable[Instruction], name: str) -> int:
    """Number of instructions with a prefix; negative for those with the prefix after "!".

    After "HMMA:16", code with more than 16 of them has a weight that no path prefers.
    """
    if name.startswith("!"):
        return -count(code, name[1:])
    prefix, _, most = name.partition(":")
    found = count(code, prefix)
    return -10_000 if most and found > int(most) else found


def _following(block: Block) -> set[int]:
    """Successors of a block; an EXIT leads to the begin of the kernel."""
    return block.following | ({0} if block.code[-1].opcode == "EXIT" else set())


def iteration(loop: Loop, most: Sequence[str], trips: int) -> list[Instruction]:
    """The instructions of one iteration, along one of the paths through it.

    Args:
        loop: the loop.
        most: prefixes whose counts the path maximizes, or minimizes after "!", in order of priority; then the fewest
            instructions.
        trips: number of iterations of each inner loop.
    """
    nodes: list[Block | Loop] = [*loop.own, *loop.inner]
    members = [[node] if isinstance(node, Block) else node.blocks for node in nodes]
    bodies = [node.code if isinstance(node, Block) else iteration(node, most, trips) * trips for node in nodes]
    weights = [(*(weight(body, name) for name in most), -len(body)) for body in bodies]
    node_of = {block.number: node for node, blocks in enumerate(members) for block in blocks}
    reached = [{number for block in blocks for number in _following(block)} for blocks in members]
    after = {
        node: {node_of[n] for n in numbers if n in node_of and n != loop.entry} - {node}
        for node, numbers in enumerate(reached)
    }
    best: dict[int, tuple[tuple[int, ...], list[int]]] = {}  # weight and nodes of the best path to the iteration's end
    for node in TopologicalSorter(after).static_order():  # successors first
        ways = [best[other] for other in sorted(after[node]) if other in best]
        if loop.entry in reached[node]:
            ways.append(((0,) * (len(most) + 1), []))
        if ways:  # otherwise it leaves the loop
            total, rest = max(ways, key=lambda way: way[0])
            best[node] = tuple(a + b for a, b in zip(weights[node], total, strict=True)), [node, *rest]
    return [instruction for node in best[node_of[loop.entry]][1] for instruction in bodies[node]]


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Named:
    """One line of the table: a loop, or a part of one."""

    name: str
    kernel: str  # "folder/kernel"
    has: tuple[str, ...]  # instructions that the loop has outside of inner loops; ("-",): the kernel from begin to end
    lacks: tuple[str, ...]  # and those that it lacks
    most: tuple[str, ...]  # see iteration()
    trips: int
    begin: str  # "LDSM": from the first; ">HMMA": after the last; "-": from the iteration's begin
    end: str  # "HMMA": to the last; "-": to the iteration's end
    unit: str  # instruction of which each represents ``of``; "-": the part as a whole
    of: str

    @property
    def folder(self) -> str:
        """Source of csrc with the kernel."""
        return self.kernel.split("/")[0]

    def find(self, function: Function) -> Loop | None:
        """The first loop with these instructions; the whole function for "-"."""
        if self.has == ("-",):
            return function.whole
        for loop in function.all_loops:
            code = loop.own_code
            if all(count(code, name) for name in self.has) and not any(count(code, name) for name in self.lacks):
                return loop
        return None

    def cut(self, path: Sequence[Instruction]) -> list[Instruction]:
        """The part of an iteration; empty without such instructions."""
        firsts = [at for at, i in enumerate(path) if i.name.startswith(self.begin.removeprefix(">"))]
        lasts = [at for at, i in enumerate(path) if i.name.startswith(self.end)]
        if (self.begin != "-" and not firsts) or (self.end != "-" and not lasts):
            return []
        begin = 0 if self.begin == "-" else firsts[-1] + 1 if self.begin.startswith(">") else firsts[0]
        return list(path[begin : len(path) if self.end == "-" else lasts[-1] + 1])


def parse_table(text: str) -> list[Named]:
    """Read the table.

    Raises:
        TableError: a line does not have the columns described at the head of the file.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = [column.strip() for column in line.split("|")]
        if len(columns) != 7 or not columns[4].isdigit():
            raise TableError(f"{TABLE.name}:{number}: not seven columns: {line}")
        name, kernel, holds, most, trips, part, unit = columns
        begin, end = part.split()
        each, _, of = unit.partition(" ")
        has = tuple(word for word in holds.split() if not word.startswith("!"))
        lacks = tuple(word[1:] for word in holds.split() if word.startswith("!"))
        rows.append(Named(name, kernel, has, lacks, tuple(most.split()), int(trips), begin, end, each, of))
    return rows


@dataclass(frozen=True)
class Estimate:
    """Result of the model for a named loop."""

    name: str
    kernel: str
    instructions: int
    cycles: int
    units: int
    of: str


def estimate(named: Named, function: Function) -> Estimate | None:
    """Cycles of a loop; None if there is no such loop.

    A whole iteration is taken in the steady state, the second of three, with the back edge. A part of an iteration
    begins with idle units.
    """
    loop = named.find(function)
    path = iteration(loop, named.most, named.trips) if loop else []
    part = named.cut(path)
    if not part:
        return None
    if len(part) == len(path) and named.has != ("-",):
        times = issue_times(path * 3)
        cycles = times[2 * len(path)] - times[len(path)]
    else:
        cycles = issue_times(part)[-1]
    units = 1 if named.unit == "-" else count(part, named.unit)
    return Estimate(named.name, named.kernel, len(part), cycles, units, named.of)


def model_table(rows: Sequence[Named], estimates: dict[str, Estimate]) -> str:
    """Table with a line per loop, and an explanation of the figures."""
    names, kernels = max(len(row.name) for row in rows), max(len(row.kernel) for row in rows)
    lines = [f"{'loop':<{names}}  {'kernel':<{kernels}} instructions  cycles     each"]
    for row in rows:
        found = estimates.get(row.name)
        cells = "no such loop: loops.txt does not fit the code"
        if found:
            each = found.cycles / found.units if found.units else 0.0
            cells = f"{found.instructions:>12}{found.cycles:>8}{each:>9.1f} for {found.of}"
        lines.append(f"{row.name:<{names}}  {row.kernel:<{kernels}} {cells}")
    lines += [
        "Cycles of one warp alone on a multiprocessor of compute capability 9.0, computed from the machine code: a",
        "lower bound without contention, an estimate and no measurement. Global loads hit the level-2 cache.",
    ]
    return "\n".join(lines)
