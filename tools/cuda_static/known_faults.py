# SPDX-License-Identifier: Apache-2.0
"""Parser of known_faults.txt beside this file, and the comparison of a run with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .kernel import Kernel, generic, label
from .rules import RULES, Fault

LIST = Path(__file__).with_name("known_faults.txt")


class ListError(ValueError):
    """A line of the list that cannot be read."""


@dataclass(frozen=True)
class Known:
    """One line of the list: a fault that all kernels of a pattern have."""

    line: int
    rule: str
    pattern: str  # "folder/kernel", with * and ? as in a shell
    most: dict[str, int]  # by target, without suffix

    @property
    def folder(self) -> str:
        """Source of csrc with the kernels."""
        return self.pattern.split("/")[0]

    def covers(self, rule: str, kernel: Kernel) -> bool:
        """True if this line covers a rule and a kernel, on any target."""
        return rule == self.rule and fnmatchcase(kernel.path, self.pattern)

    def __str__(self) -> str:
        return f"{LIST.name}:{self.line} ({self.rule} {self.pattern})"


@dataclass(frozen=True)
class KnownFaults:
    """The list."""

    compiler: str  # release of nvcc whose counts these are
    lines: tuple[Known, ...]


def parse(text: str) -> KnownFaults:
    """Read the list.

    Raises:
        ListError: a line is not of the form described at the head of the file.
    """
    compiler, targets, lines = "", [], []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if words[0] == "nvcc":
            compiler = words[1]
        elif words[0] == "rule":
            targets = words[2:]
        else:
            rule, counts, pattern = words[0], words[-len(targets) :], " ".join(words[1 : -len(targets)])
            wrong = [count for count in counts if not re.fullmatch(r"-|[1-9]\d*", count)]
            if rule not in RULES or not targets or wrong or not pattern:
                raise ListError(f"{LIST.name}:{number}: not a rule, a kernel and a count for each target: {line}")
            most = {t: int(count) for t, count in zip(targets, counts, strict=True) if count != "-"}
            lines.append(Known(number, rule, pattern, most))
    return KnownFaults(compiler, tuple(lines))


def compare(
    known: KnownFaults, kernels: Sequence[Kernel], faults: Iterable[Fault], folders: Iterable[str], compiler: str
) -> list[str]:
    """Problems: faults that are not in the list or exceed it, and lines of the list with too high counts.

    Args:
        known: the list.
        kernels: all that were checked.
        faults: the faults of these kernels.
        folders: folders whose sources were all checked.
        compiler: release of nvcc that compiled them.
    """
    found = {(fault.rule, fault.kernel.path, fault.kernel.target): fault for fault in faults}
    problems = []
    for fault in found.values():
        most = [k.most.get(generic(fault.kernel.target), 0) for k in known.lines if k.covers(fault.rule, fault.kernel)]
        if not max(most, default=0):
            problems.append(f"{fault}; this is new")
        elif fault.count > max(most):
            problems.append(f"{fault}; {LIST.name} allows {max(most)}")
    for line in known.lines:
        if line.folder in folders:
            problems += _too_generous(line, kernels, found, exact=compiler == known.compiler)
    return problems


def _too_generous(
    line: Known, kernels: Sequence[Kernel], found: dict[tuple[str, str, str], Fault], *, exact: bool
) -> list[str]:
    """Lines of the list that allow more than the kernels have.

    Another compiler may emit a few branches or divisions less, so lower counts are reported only with the list's own
    compiler (`exact`). Faults that are gone are reported with any.
    """
    problems = []
    for target in dict.fromkeys(kernel.target for kernel in kernels):
        most = line.most.get(generic(target))
        if most is None:
            continue
        remove = f"remove the line, or its count for {generic(target)}"
        mine = [k for k in kernels if k.target == target and line.covers(line.rule, k) and k.code]
        counts = {k.name: f.count for k in mine if (f := found.get((line.rule, k.path, target)))}
        gone = [kernel.name for kernel in mine if kernel.name not in counts]
        if not mine and any((k.folder, k.target) == (line.folder, target) and k.code for k in kernels):
            problems.append(f"{label(target)}: {line}: there is no such kernel; {remove}")
        elif gone:
            names = "all its kernels" if not counts else ", ".join(gone)
            problems.append(f"{label(target)}: {line}: the fault is gone from {names}; {remove}")
        elif counts and exact and max(counts.values()) < most:
            problems.append(f"{label(target)}: {line}: {most} have become {max(counts.values())}; lower the count")
    return problems
