# SPDX-License-Identifier: Apache-2.0
"""Static evidence about the CUDA kernels, on a machine without a GPU.

Compiles every csrc/*/cuda*.cu for every target with warnings as errors, prints registers, shared memory and spills of
each kernel, refuses spills and local memory, and looks in the disassembly for 16-byte accesses and matrix instructions
inside the loops.

    python bench/check_cuda.py                       # 80, 90a, 100a, 120, and what a newer device makes of the PTX
    python bench/check_cuda.py --targets 90a,80 --sources gather --json out/kernels.json

Needs nvcc, of the system or of the wheel nvidia-cuda-nvcc; without one it says so and ends with status 0
(--require: 1). nvdisasm comes with the CUDA toolkit and with Triton's wheel; without it the disassembly is left out,
and said to be. Results are kept in build/check_cuda until a source, a flag or the compiler changes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "check_cuda"

# "ptx" is the oldest virtual architecture assembled for a device that no machine code of ours runs on: what the driver
# does there when it loads the library.
TARGETS = ("80", "90a", "100a", "120", "ptx")
PTX = ("compute_80", "sm_103")

# Plain loads are LDG or, through generic addresses, LD; cp.async is LDGSTS; bulk and tensor copies UBLKCP and UTMALDG.
INSTRUCTIONS = {
    "load16": re.compile(r"\b(LDG?\.[\w.]*(128|256)|LDGSTS\.[\w.]*128|UBLKCP|UTMALDG)"),
    "store16": re.compile(r"\b(STG?\.[\w.]*(128|256)|UTMASTG)"),
    "matrix": re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b"),
}

# A kernel that is instantiated to move 16 bytes at once says so: a piece of 16 bytes, or that many elements.
WIDE = re.compile(r"_kernel<(uint4\b|(half_t|bfloat16_t), (\(int\))?8\b|float, (\(int\))?4\b)")
# Of those, the ones that write rows (the others write a number per row).
WRITERS = re.compile(r"(gather|compact|compact_chunks|write|cluster)_kernel<")
# Folders whose kernels for 16-bit numbers have to use matrix instructions.
MATRIX_FOLDERS = {"attention_scores": ("half_t", "bfloat16_t")}


@dataclass(frozen=True)
class Kernel:
    """What is known about one kernel on one target."""

    name: str
    target: str
    folder: str
    registers: int
    shared_bytes: int  # static; most kernels take theirs at launch
    stack_bytes: int
    spill_bytes: int
    load16: int | None = None  # such instructions in loops; None: not disassembled
    store16: int | None = None
    matrix: int | None = None


class CheckError(RuntimeError):
    """A source that does not compile, or machine code that cannot be read."""


# ------------------------------------------------------------------------------------------------ tools


def find_nvcc() -> str | None:
    """nvcc of the environment, of the system, or of the wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("MUSTDROP_NVCC"),
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
    ]
    candidates += ["/usr/local/cuda/bin/nvcc", *map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"))]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def find_nvdisasm(nvcc: str) -> str | None:
    """nvdisasm beside nvcc, on the PATH, or in Triton's wheel."""
    candidates = [
        shutil.which("nvdisasm"),
        str(Path(nvcc).resolve().parent / "nvdisasm"),
        "/usr/local/cuda/bin/nvdisasm",
    ]
    if spec := importlib.util.find_spec("triton"):
        candidates += [str(Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin" / "nvdisasm")]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def why_no_compiler(nvcc: str) -> str | None:
    """What keeps nvcc from compiling anything at all (a wheel without its headers, no host compiler); None: nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text("#include <cuda_runtime.h>\n__global__ void empty() {}\n")
        command = [nvcc, "-arch=sm_80", "-cubin", str(source), "-o", f"{folder}/empty.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-400:]


def torch_include() -> Path:
    """torch's headers, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CheckError("torch was not found: its headers are needed")
    return Path(spec.origin).parent / "include"


def find_sources(folders: str | None) -> list[Path]:
    """Every CUDA source, or those of the named folders."""
    sources = sorted((ROOT / "csrc").glob("*/cuda*.cu"))
    return [s for s in sources if folders is None or s.parent.name in folders.split(",")]


# ------------------------------------------------------------------------------------------------ compiling


def compile_source(nvcc: str, source: Path, target: str) -> tuple[Path, str]:
    """Compile to machine code for one target; the code and what ptxas said, kept until something changes."""
    virtual, real = PTX if target == "ptx" else (f"compute_{target}", f"sm_{target}")
    flags = [
        "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_include()),
        f"-gencode=arch={virtual},code={real}", "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
    ]  # fmt: skip
    depends = [*(p for p in (ROOT / "csrc").glob("*/*") if p.suffix in (".h", ".cuh")), source]
    texts = [p.read_bytes() for p in sorted(depends)]
    digest = hashlib.sha256(b"\0".join([" ".join([nvcc, *flags]).encode(), *texts])).hexdigest()[:16]
    code = BUILD / f"{source.parent.name}-{source.stem}-{target}-{digest}.cubin"
    log = code.with_suffix(".log")
    if not (code.exists() and log.exists()):
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = code.with_suffix(f".{os.getpid()}")
        done = subprocess.run([nvcc, *flags, "-cubin", str(source), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            partial.unlink(missing_ok=True)
            raise CheckError(f"{name_of(source)} for {real}:\n{done.stderr[-6000:]}")
        log.write_text(done.stderr)
        partial.rename(code)
    return code, log.read_text()


def name_of(source: Path) -> str:
    """A source as messages call it."""
    return str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source)


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Readable names, as they are where there is no c++filt."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, [readable(line) for line in done.stdout.splitlines()], strict=True))


def readable(signature: str) -> str:
    """`gather_kernel<uint4, true>` of `void mustdrop::gather_kernel<uint4, true>(mustdrop::GatherParameters)`."""
    text = re.sub(r"\(anonymous namespace\)::|mustdrop::", "", signature).removeprefix("void ")
    text = re.sub(r"\((int|unsigned int|bool)\)(?=\d)", "", text)
    return text.split("(")[0]


def parse_ptxas(text: str, target: str, folder: str) -> dict[str, Kernel]:
    """The kernels of a ptxas report, by mangled name."""
    found: dict[str, Kernel] = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<name>[\w$]+)'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spill = int(match["stores"]) + int(match["loads"])
        size = int(shared[1]) if shared else 0
        name = match["name"]
        found[name] = Kernel(name, target, folder, int(match["registers"]), size, int(match["stack"]), spill)
    names = demangle(list(found))
    return {name: replace(kernel, name=names[name]) for name, kernel in found.items()}


# ------------------------------------------------------------------------------------------------ disassembly


def sections(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The functions of a disassembly: mangled name and lines."""
    name, code = "", []
    for line in lines:
        if start := re.match(r"\s*\.section\s+(\.text\.([\w$]+))?", line):
            if name:
                yield name, code
            name, code = start[2] or "", []
        elif name and (re.match(r"\s*/\*[0-9a-f]+\*/", line) or re.match(r"\.L_\w+:", line)):
            code.append(line)
    if name:
        yield name, code


@dataclass
class BasicBlock:
    """Instructions without a branch between them, and the blocks that may come next."""

    lines: list[str]
    following: set[int]


def basic_blocks(code: list[str]) -> list[BasicBlock]:
    """Splits a function at its labels and after its branches."""
    blocks, labels, jumps = [BasicBlock([], set())], {}, []
    for line in code:
        if label := re.match(r"(\.L_\w+):", line):
            blocks[-1].following.add(len(blocks))
            labels[label[1]] = len(blocks)
            blocks.append(BasicBlock([], set()))
            continue
        blocks[-1].lines.append(line)
        branch = re.search(r"\bBRA\b(.*)`\((\.L_\w+)\)", line)
        if branch:
            jumps.append((len(blocks) - 1, branch[2]))
        if re.search(r"\b(EXIT|RET|BRX|BRA)\b", line):
            if "@" in line or (branch and re.search(r"\bU?P\d", branch[1])):  # conditional
                blocks[-1].following.add(len(blocks))
            blocks.append(BasicBlock([], set()))
    for origin, label in jumps:
        if label in labels:
            blocks[origin].following.add(labels[label])
    for block in blocks:
        block.following = {n for n in block.following if n < len(blocks)}
    return blocks


def reachable(start: int, edges: Sequence[Iterable[int]]) -> set[int]:
    """Every node that a walk from `start` meets, itself included."""
    seen, todo = {start}, [start]
    while todo:
        for node in edges[todo.pop()]:
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def loops_of(code: list[str]) -> Iterator[str]:
    """The instructions that a thread may come back to."""
    blocks = basic_blocks(code)
    forward = [block.following for block in blocks]
    backward: list[set[int]] = [set() for _ in blocks]
    for node, following in enumerate(forward):
        for other in following:
            backward[other].add(node)
    inside: set[int] = set()
    for node, following in enumerate(forward):
        for head in following:
            if head <= node and not (node in inside and head in inside):
                inside |= reachable(head, forward) & reachable(node, backward)
    return (line for node in sorted(inside) for line in blocks[node].lines)


def count_instructions(code: list[str]) -> dict[str, int]:
    """How many instructions of each kind of ``INSTRUCTIONS`` are in loops."""
    lines = list(loops_of(code))
    return {kind: sum(bool(pattern.search(line)) for line in lines) for kind, pattern in INSTRUCTIONS.items()}


def disassemble(nvdisasm: str, code: Path, kernels: dict[str, Kernel]) -> dict[str, Kernel]:
    """The kernels with their instructions counted, read as a stream."""
    command = [nvdisasm, "-c", "-ndf", str(code)]
    counted = dict(kernels)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for name, lines in sections(process.stdout):
            if name in counted:
                counted[name] = replace(counted[name], **count_instructions(lines))
        said = process.stderr.read()
    if process.returncode:
        raise CheckError(f"{nvdisasm} cannot read {code.name}: {said.strip()[:300]}")
    return counted


# ------------------------------------------------------------------------------------------------ judging


def judge_kernel(kernel: Kernel) -> Iterator[str]:
    """What one kernel should not do, or does not do."""
    if kernel.spill_bytes:
        yield f"spills {kernel.spill_bytes} bytes"
    if kernel.stack_bytes:
        yield f"has {kernel.stack_bytes} bytes of local memory"
    if kernel.load16 is None:
        return
    wide = bool(WIDE.search(kernel.name))
    if wide and not kernel.load16:
        yield "has no 16-byte load in a loop"
    if wide and WRITERS.search(kernel.name) and not kernel.store16:
        yield "has no 16-byte store in a loop"
    if kernel.matrix and not kernel.load16:
        yield "feeds its matrix instructions with no 16-byte load in a loop"


def judge(kernels: Sequence[Kernel], folders: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Everything that is wrong."""
    problems = [f"{label(k.target)}: {k.name} {what}" for k in kernels for what in judge_kernel(k)]
    for folder in folders:
        for target in targets:
            mine = [k for k in kernels if (k.folder, k.target) == (folder, target) and k.load16 is not None]
            for element in MATRIX_FOLDERS.get(folder, ()):
                if mine and not any(k.matrix and re.search(rf"\b{element}\b", k.name) for k in mine):
                    problems.append(f"{label(target)}: {folder} has no kernel of {element} with matrix instructions")
    return problems


def label(target: str) -> str:
    """A target in the table."""
    return target if target == "ptx" else f"sm_{target}"


def table(kernels: Sequence[Kernel], targets: Sequence[str]) -> str:
    """Registers by kernel and target; the worst shared memory, stack and spills; the fewest instructions in loops."""
    by_key = {(kernel.name, kernel.target): kernel for kernel in kernels}
    names = sorted({kernel.name for kernel in kernels})
    width = max((len(name) for name in names), default=6)
    head = "registers".ljust(width) + "".join(f"{label(target):>9}" for target in targets)
    lines = [head + "   shared  stack spills | in loops: load16 store16 matrix"]
    for name in names:
        row = [by_key.get((name, target)) for target in targets]
        there = [kernel for kernel in row if kernel]
        cells = "".join(f"{kernel.registers if kernel else '-':>9}" for kernel in row)
        worst = [max(getattr(k, field) for k in there) for field in ("shared_bytes", "stack_bytes", "spill_bytes")]
        counts = [[getattr(k, kind) for k in there] for kind in INSTRUCTIONS]
        least = ["-" if None in values else str(min(values)) for values in counts]
        lines.append(
            f"{name:<{width}}{cells}{worst[0]:>9}{worst[1]:>7}{worst[2]:>7} |{least[0]:>17}{least[1]:>8}{least[2]:>7}"
        )
    return "\n".join(lines)


def examine(nvcc: str, nvdisasm: str | None, source: Path, target: str) -> list[Kernel]:
    """Compile one source for one target and read what came of it."""
    code, said = compile_source(nvcc, source, target)
    kernels = parse_ptxas(said, target, source.parent.name)
    if nvdisasm:
        kernels = disassemble(nvdisasm, code, kernels)
    return [kernel for kernel in kernels.values() if not kernel.name.startswith("architecture_probe")]


def examine_all(
    nvcc: str, nvdisasm: str | None, sources: Sequence[Path], targets: Sequence[str], jobs: int
) -> tuple[list[Kernel], list[str]]:
    """All kernels, and what does not compile; says on stderr how far it is."""
    kernels: list[Kernel] = []
    problems: list[str] = []
    began, total = time.monotonic(), len(sources) * len(targets)
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        pairs = [(source, target) for source in sources for target in targets]
        largest_first = sorted(pairs, key=lambda pair: -sum(p.stat().st_size for p in pair[0].parent.glob("*.cu*")))
        running = {pool.submit(examine, nvcc, nvdisasm, *pair): pair for pair in largest_first}
        for done, future in enumerate(as_completed(running), 1):
            source, target = running[future]
            try:
                found = future.result()
            except CheckError as error:
                problems.append(str(error))
                found = []
            kernels += found
            print(
                f"[{done}/{total}] {time.monotonic() - began:5.0f} s  {name_of(source)} for {label(target)}: "
                f"{len(found)} kernels",
                file=sys.stderr,
            )
            if not found and not problems:
                problems.append(f"{name_of(source)} for {label(target)}: no kernel was found in what ptxas said")
    return kernels, problems


def main() -> int:
    """Check, print, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="with commas between (default: %(default)s)")
    parser.add_argument("--sources", help="folders of csrc, with commas between (default: all)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--require", action="store_true", help="fail where there is no nvcc")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="at once (default: %(default)s)")
    options = parser.parse_args()
    nvcc = find_nvcc()
    reason = "was not found (set MUSTDROP_NVCC or CUDA_HOME, or pip install nvidia-cuda-nvcc)"
    if nvcc and (problem := why_no_compiler(nvcc)):
        reason, nvcc = f"({nvcc}) cannot compile an empty kernel: {problem}", None
    if nvcc is None:
        print(f"check-cuda: skipped, nvcc {reason}")
        return int(options.require)
    nvdisasm = find_nvdisasm(nvcc)
    targets, sources = options.targets.split(","), find_sources(options.sources)
    if not sources:
        print(f"check-cuda: no csrc/*/cuda*.cu in {options.sources or 'csrc'}", file=sys.stderr)
        return 1
    kernels, problems = examine_all(nvcc, nvdisasm, sources, targets, options.jobs)
    problems += judge(kernels, sorted({source.parent.name for source in sources}), targets)
    print(table(kernels, targets))
    print(f"\n{len(kernels)} kernels, {nvcc}; disassembly: {nvdisasm or 'left out, nvdisasm was not found'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n")
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
