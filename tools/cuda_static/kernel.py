# SPDX-License-Identifier: Apache-2.0
"""Facts about one compiled kernel, and names of targets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Code:
    """Statistics of the disassembly of a kernel."""

    instructions: int
    load16: int  # in loops, like the next two
    store16: int
    matrix: int
    per_exponential: float | None  # instructions per MUFU.EX2 of an unrolled loop, the maximum over its loops
    faults: dict[str, int] = field(default_factory=dict)  # by the rule's name (rules.RULES)


@dataclass(frozen=True)
class Kernel:
    """One kernel on one target."""

    name: str
    target: str
    folder: str
    registers: int
    shared_bytes: int  # static; most kernels use dynamic shared memory
    stack_bytes: int
    spill_bytes: int
    code: Code | None = None  # None: not disassembled

    @property
    def path(self) -> str:
        """Folder and name, as in the list of known faults."""
        return f"{self.folder}/{self.name}"


def generic(target: str) -> str:
    """A target without its suffix: "90" for "90a", which gives the same code for these sources."""
    return target.rstrip("af") if target[:1].isdigit() else target


def label(target: str) -> str:
    """Name of a target in tables and messages."""
    return target if target == "ptx" else f"sm_{target}"
