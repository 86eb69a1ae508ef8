# SPDX-License-Identifier: Apache-2.0
"""Facts about one compiled kernel, and names of targets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Code:
    """Counts in the disassembly of a kernel."""

    instructions: int
    load16: int  # in loops, as the next two
    store16: int
    matrix: int
    per_exponential: float | None  # instructions for each MUFU.EX2 of an unrolled loop, the most of its loops
    faults: dict[str, int] = field(default_factory=dict)  # by the rule's name (rules.RULES)


@dataclass(frozen=True)
class Kernel:
    """One kernel on one target."""

    name: str
    target: str
    folder: str
    registers: int
    shared_bytes: int  # static; most kernels take theirs at launch
    stack_bytes: int
    spill_bytes: int
    code: Code | None = None  # None: not disassembled

    @property
    def path(self) -> str:
        """Folder and name, as the list of known faults has them."""
        return f"{self.folder}/{self.name}"


def generic(target: str) -> str:
    """A target without its suffix: "90" of "90a", which compiles these sources to the same code."""
    return target.rstrip("af") if target[:1].isdigit() else target


def label(target: str) -> str:
    """A target as tables and messages name it."""
    return target if target == "ptx" else f"sm_{target}"
