# SPDX-License-Identifier: Apache-2.0
"""Static analysis of the CUDA kernels on a machine without a GPU.

Compiles every csrc/*/cuda*.cu for every target with warnings as errors and prints of each kernel: instructions,
registers, shared memory, spills, 16-byte accesses and matrix instructions in loops. Then the launches at the shapes of
mustdrop_kernels/bench/shapes.py: blocks of a multiprocessor, and waves on an H200.

    python tools/check_cuda.py                       # 80, 90, 100, 120, and the PTX compiled for a newer device
    python tools/check_cuda.py --targets 90,80 --sources gather --json out/kernels.json
    python tools/check_cuda.py --targets 90 --model  # cycles of the loops listed in cuda_static/loops.txt

It fails on spills and local memory, on wide kernels without wide accesses, and on branches and divisions in loops that
multiply the time (cuda_static/rules.py). cuda_static/known_faults.txt lists the current exceptions; entries may only be
removed or lowered.

Requires nvcc, of the system or of the wheel nvidia-cuda-nvcc; without it a message is printed and the exit status is 0
(--require: 1). nvdisasm is part of the CUDA toolkit and of Triton's wheel; without it the disassembly is left out, with
a message. Results are cached in build/check_cuda until a source, a flag or the compiler changes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from cuda_static import compiling, disassembly, known_faults, launches, model, occupancy, rules, score_times
from cuda_static.kernel import Kernel, generic, label
from cuda_static.report import fault_table, kernel_table

TARGETS = ("80", "90", "100", "120", "ptx")
DTYPES = ("bfloat16", "float32")  # of the times of the scores


def examine(nvcc: str, nvdisasm: str | None, source: Path, target: str) -> list[Kernel]:
    """Compile one source for one target and analyze the result."""
    binary, output = compiling.compile_source(nvcc, source, target)
    kernels = compiling.parse_ptxas(output, target, source.parent.name)
    if nvdisasm:
        for function in disassembly.disassemble(nvdisasm, binary):
            if kernel := kernels.get(function.name):
                kernels[function.name] = replace(kernel, code=rules.read_code(function, kernel.folder))
    return [kernel for kernel in kernels.values() if not kernel.name.startswith("architecture_probe")]


def examine_all(
    nvcc: str, nvdisasm: str | None, sources: Sequence[Path], targets: Sequence[str], jobs: int
) -> tuple[list[Kernel], list[str]]:
    """All kernels, and errors of the compiler; prints progress on stderr."""
    kernels: list[Kernel] = []
    problems: list[str] = []
    began, total = time.monotonic(), len(sources) * len(targets)
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        pairs = [(source, target) for source in sources for target in targets]
        largest_first = sorted(pairs, key=lambda pair: -sum(p.stat().st_size for p in pair[0].parent.glob("*.cu*")))
        running = {pool.submit(examine, nvcc, nvdisasm, *pair): pair for pair in largest_first}
        for done, future in enumerate(as_completed(running), 1):
            source, target = running[future]
            name = f"{compiling.name_of(source)} for {label(target)}"
            try:
                found = future.result()
            except (compiling.CompileError, disassembly.DisassemblyError) as error:
                problems.append(str(error))
                found = []
            kernels += found
            print(f"[{done}/{total}] {time.monotonic() - began:5.0f} s  {name}: {len(found)} kernels", file=sys.stderr)
            if not found and not problems:
                problems.append(f"{name}: no kernel was found in the output of ptxas")
    return kernels, problems


def assess(
    kernels: Sequence[Kernel],
    folders: Sequence[str],
    targets: Sequence[str],
    known: known_faults.KnownFaults,
    nvcc: str,
) -> list[str]:
    """Problems of the compiled kernels and of the list of known faults."""
    faults = rules.faults_of(kernels)
    return rules.missing(kernels, folders, targets) + known_faults.compare(known, kernels, faults, folders, nvcc)


def show_occupancy(kernels: Sequence[Kernel]) -> list[dict[str, object]]:
    """Print the occupancy of the launches on an H200; returns the rows."""
    if not any(generic(kernel.target) == launches.CAPABILITY for kernel in kernels):
        print(f"occupancy: left out, {label(launches.CAPABILITY)} is not among the targets")
        return []
    try:
        recorded = launches.record()
    except launches.LaunchesError as error:
        print(f"occupancy: left out, the launches could not be recorded: {error}")
        return []
    rows = occupancy.occupancies(recorded, kernels)
    print(occupancy.occupancy_table(rows))
    return [{**asdict(row), "waves_taken": math.ceil(row.waves)} for row in rows]


def show_model(nvcc: str, nvdisasm: str, target: str, folders: Sequence[str]) -> dict[str, model.Estimate]:
    """Print the cycles of the named loops of some folders; returns them by name."""
    named = [row for row in model.parse_table(model.TABLE.read_text()) if row.folder in folders]
    found: dict[str, model.Estimate] = {}
    for source in compiling.find_sources(",".join(sorted({row.folder for row in named}))):
        try:
            binary, output = compiling.compile_source(nvcc, source, target)
        except compiling.CompileError:
            continue  # reported by the check, or the loops are shown as missing
        kernels = compiling.parse_ptxas(output, target, source.parent.name)
        for function in disassembly.disassemble(nvdisasm, binary):
            kernel = kernels.get(function.name)
            rows = [row for row in named if kernel and row.kernel == kernel.path]
            found |= {row.name: estimate for row in rows if (estimate := model.estimate(row, function))}
    print(model.model_table(named, found))
    return found


def show_score_times(found: dict[str, model.Estimate]) -> list[dict[str, object]]:
    """Print the times of the scores, for bfloat16 and float32; returns the rows."""
    try:
        launched = [launches.record(score_times.SHAPES, ops=[score_times.OP], dtype=dtype) for dtype in DTYPES]
    except launches.LaunchesError as error:
        print(f"times of the scores: left out, the launches could not be recorded: {error}")
        return []
    rows = [row for recorded in launched for row in score_times.estimate(recorded, found)]
    print(score_times.time_table(rows))
    return [asdict(row) for row in rows]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="with commas between (default: %(default)s)")
    parser.add_argument("--sources", help="folders of csrc, with commas between (default: all)")
    parser.add_argument("--model", action="store_true", help="print the cycles of the loops in cuda_static/loops.txt")
    parser.add_argument("--no-occupancy", action="store_true", help="do not record the launches (about 30 s at first)")
    parser.add_argument("--json", type=Path, help="write the tables here too")
    parser.add_argument("--require", action="store_true", help="fail where there is no nvcc")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="at once (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Run the check and print the tables and problems."""
    options = parse_options()
    nvcc = compiling.find_nvcc()
    reason = "was not found (set MUSTDROP_NVCC or CUDA_HOME, or pip install nvidia-cuda-nvcc)"
    if nvcc and (problem := compiling.why_no_compiler(nvcc)):
        reason, nvcc = f"({nvcc}) cannot compile an empty kernel: {problem}", None
    if nvcc is None:
        print(f"check-cuda: skipped, nvcc {reason}")
        return int(options.require)
    targets, sources = options.targets.split(","), compiling.find_sources(options.sources)
    if not sources:
        print(f"check-cuda: no csrc/*/cuda*.cu in {options.sources or 'csrc'}", file=sys.stderr)
        return 1
    nvdisasm, folders = compiling.find_nvdisasm(nvcc), sorted({source.parent.name for source in sources})
    kernels, problems = examine_all(nvcc, nvdisasm, sources, targets, options.jobs)
    release = compiling.release_of(nvcc)
    problems += assess(kernels, folders, targets, known_faults.parse(known_faults.LIST.read_text()), release)
    print(kernel_table(kernels, targets), fault_table(rules.faults_of(kernels), targets), sep="\n\n", end="\n\n")
    document: dict[str, object] = {"nvcc": release, "kernels": [asdict(kernel) for kernel in kernels]}
    if not options.no_occupancy:
        document["occupancy"] = show_occupancy(kernels)
        print()
    if options.model and nvdisasm:
        target = next((t for t in targets if generic(t) == model.TARGET), model.TARGET)
        found = show_model(nvcc, nvdisasm, target, folders)
        print()
        document["model"] = [asdict(estimate) for estimate in found.values()]
        if "attention_scores" in folders:
            document["score_times"] = show_score_times(found)
            print()
    print(f"{len(kernels)} kernels, {nvcc} {release}; disassembly: {nvdisasm or 'left out, nvdisasm was not found'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
