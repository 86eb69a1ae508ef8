# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel in every shipped configuration for GPUs that are not here.

Prints what each needs (shared memory, registers, spills) and fails where a kernel does not fit its target.
Usage: python bench/check_triton.py [target ...], targets as in mustdrop_kernels.backends.triton.crosscompile.
"""

from __future__ import annotations

import argparse
import sys

from mustdrop_kernels.backends.triton import crosscompile, interpreted


def check(target: str) -> int:
    """Compile for one target; how many kernels do not fit."""
    failures = 0
    for unit in crosscompile.units(target):
        try:
            needs = crosscompile.compile_unit(unit, target)
        except Exception as error:  # the compiler raises many kinds; all of them count, none hides the next kernel
            failures += 1
            print(f"{target:8} FAILED {unit.name}: {type(error).__name__}: {error}", flush=True)
            continue
        problem = crosscompile.problem(needs, target)
        failures += problem is not None
        state = "ok" if problem is None else f"FAILED, {problem}:"
        print(f"{target:8} {state} {unit.name}: {needs.registers} registers, {needs.shared} bytes shared", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", metavar="target", help=f"of {', '.join(crosscompile.TARGETS)}; default all"
    )
    targets = parser.parse_args().targets or list(crosscompile.TARGETS)
    if unknown := sorted(set(targets) - set(crosscompile.TARGETS)):
        parser.error(f"unknown targets {unknown}; there are {', '.join(crosscompile.TARGETS)}")
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels are not compiled then")
    failures = {target: check(target) for target in targets}
    for target, number in failures.items():
        print(f"{target}: {number} failures")
    return 1 if any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
