# SPDX-License-Identifier: Apache-2.0
"""Cross-compile every Triton kernel in every shipped configuration.

Prints the resources of each (registers, shared memory, stack) and fails if a kernel does not fit its target.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from mustdrop_kernels.backends.triton import crosscompile, interpreted
from mustdrop_kernels.files import write_text


@lru_cache(None)
def units(target: str) -> list[crosscompile.Unit]:
    return crosscompile.units(target)


def check(job: tuple[str, int]) -> dict[str, Any]:
    """Compile one kernel for one target. Returns its name, resources and problem."""
    target, number = job
    unit = units(target)[number]
    row: dict[str, Any] = {"target": target, "kernel": unit.name, "problem": None}
    try:
        needs = crosscompile.compile_unit(unit, target)
    except Exception as error:  # the compiler raises many types; report each and go on with the next kernel
        return {**row, "problem": f"{type(error).__name__}: {error}"}
    return {**row, **asdict(needs), "problem": crosscompile.problem(needs, target)}


def check_all(jobs: list[tuple[str, int]], processes: int) -> list[dict[str, Any]]:
    """All rows, in order; prints progress from time to time."""
    rows, printed = [], time.monotonic()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(check, jobs, chunksize=4):
            rows.append(row)
            if row["problem"]:
                print(f"WRONG: {row['target']}: {row['kernel']}: {row['problem']}", file=sys.stderr, flush=True)
            if time.monotonic() - printed > 10 or len(rows) == len(jobs):
                printed = time.monotonic()
                print(f"{len(rows)} of {len(jobs)} kernels", flush=True)
    return rows


def summary(rows: list[dict[str, Any]], target: str) -> str:
    """Maximum resources of a target's kernels, and the number of those that do not fit."""
    own = [row for row in rows if row["target"] == target]
    sizes = [row for row in own if "registers" in row]
    most = {name: max((row[name] for row in sizes), default=0) for name in ("registers", "shared", "spilled")}
    wrong = sum(row["problem"] is not None for row in own)
    limit = crosscompile.TARGETS[target]
    return (
        f"{target:8} {len(own)} kernels, {wrong} wrong; at most {most['registers']} of {limit.registers} registers, "
        f"{most['shared']} of {limit.shared} bytes of shared memory, {most['spilled']} bytes spilled"
    )


def main() -> int:
    """Run the check and print resources and problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ",".join(crosscompile.TARGETS)
    parser.add_argument("--targets", default=known, help="with commas between (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write one entry a kernel and target here")
    parser.add_argument("--verbose", action="store_true", help="print every kernel")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if unknown := sorted(set(targets) - set(crosscompile.TARGETS)):
        parser.error(f"unknown targets {unknown}; there are {known}")
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels are not compiled then")
    jobs = [(target, number) for target in targets for number in range(len(units(target)))]
    rows = check_all(jobs, max(1, min(options.jobs, os.cpu_count() or 1)))
    if options.verbose:
        for row in rows:
            needs = ", ".join(f"{row[name]} {name}" for name in ("registers", "shared", "spilled") if name in row)
            print(f"{row['target']:8} {row['kernel']}: {needs}")
    print(f"Triton {triton.__version__}", *(summary(rows, target) for target in targets), sep="\n")
    if options.json:
        write_text(options.json, json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
    return int(any(row["problem"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
