# SPDX-License-Identifier: Apache-2.0
"""The table of kernels: registers by target, memory, and counts of the disassembly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .kernel import Code, Kernel, label
from .rules import RULES, Fault


def _worst(there: Sequence[Kernel], value: Callable[[Code], float | None], choose: Callable[..., float] = max) -> str:
    """The maximum (or `choose`) over the targets that were disassembled."""
    values = [found for kernel in there if kernel.code and (found := value(kernel.code)) is not None]
    return "-" if not values else f"{choose(values):.1f}".removesuffix(".0")


def kernel_table(kernels: Sequence[Kernel], targets: Sequence[str]) -> str:
    """Registers by kernel and target; maximum code size, shared memory, stack and spills; minimum wide accesses.

    "EX2" is the number of instructions per exponential of an unrolled loop.
    """
    by_key = {(kernel.path, kernel.target): kernel for kernel in kernels}
    paths = sorted({kernel.path for kernel in kernels})
    width = max((len(path) for path in paths), default=6)
    head = "registers".ljust(width) + "".join(f"{label(target):>7}" for target in targets)
    lines = [f"{head} | instructions EX2 shared stack spills | in loops: load16 store16 matrix"]
    for path in paths:
        row = [by_key.get((path, target)) for target in targets]
        there = [kernel for kernel in row if kernel]
        cells = "".join(f"{kernel.registers if kernel else '-':>7}" for kernel in row)
        shared, stack, spills = (
            max(sizes) for sizes in zip(*((k.shared_bytes, k.stack_bytes, k.spill_bytes) for k in there), strict=True)
        )
        size, each = _worst(there, lambda code: code.instructions), _worst(there, lambda code: code.per_exponential)
        load, store, matrix = (
            _worst(there, value, min) for value in (lambda c: c.load16, lambda c: c.store16, lambda c: c.matrix)
        )
        lines.append(
            f"{path:<{width}}{cells} |{size:>13}{each:>5}{shared:>6}{stack:>6}{spills:>7} |"
            f"{load:>17}{store:>8}{matrix:>7}"
        )
    return "\n".join(lines)


def fault_table(faults: Sequence[Fault], targets: Sequence[str]) -> str:
    """Counts of the faults by rule, kernel and target."""
    counts = {(fault.rule, fault.kernel.path, fault.kernel.target): fault.count for fault in faults}
    rows = sorted({key[:2] for key in counts}, key=lambda row: (list(RULES).index(row[0]), row[1]))
    width = max((len(path) for _, path in rows), default=0)
    lines = [f"{'fault':<13}{'kernel':<{width}}" + "".join(f"{label(target):>7}" for target in targets)]
    for rule, path in rows:
        lines.append(f"{rule:<13}{path:<{width}}" + "".join(f"{counts.get((rule, path, t), '-'):>7}" for t in targets))
    return "\n".join(lines) if rows else "no faults"
