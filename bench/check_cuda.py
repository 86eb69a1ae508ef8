# SPDX-License-Identifier: Apache-2.0
"""Static evidence about the CUDA kernels, on a machine without a GPU.

Compiles every csrc/*/cuda.cu for every target with warnings as errors, prints registers, shared memory and spills of
each kernel, refuses spills, and looks in the disassembly for 16-byte accesses and matrix instructions inside the loops.

    python bench/check_cuda.py                       # all targets: 80, 90a, 100a, 120
    python bench/check_cuda.py --targets 90a --sources gather

Needs nvcc, of the system or of the wheel nvidia-cuda-nvcc; without one it says so and ends with status 0
(--require: 1).
nvdisasm comes with the CUDA toolkit and with Triton's wheel; without it the disassembly is left out, and said to be.
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "check_cuda"
TARGETS = ("80", "90a", "100a", "120")

# Kernels whose loops have to hold these instructions: a pattern of the demangled name, then patterns of instructions.
# Plain loads may be LDG or, through generic addresses, LD; cp.async is LDGSTS.
LOAD16, STORE16, ASYNC16, SHARED16 = (
    r"\bLDG?\.[\w.]*128",
    r"\bSTG?\.[\w.]*128",
    r"\bLDGSTS\.[\w.]*128",
    r"\bLDS\.[\w.]*128",
)
EXPECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"gather_kernel<uint4", (LOAD16, STORE16)),
    (r"compact_kernel<uint4", (LOAD16, STORE16)),
    (r"merge_(similarity|write)_kernel<\w*(half_t|bfloat16_t|float), (\(int\))?[48]>", (LOAD16,)),
    (r"merge_write_kernel<\w*(half_t|bfloat16_t|float), (\(int\))?[48]>", (STORE16,)),
    (r"merge_cluster_kernel<", (ASYNC16, STORE16)),
    (r"cls_kernel<\w*(half_t|bfloat16_t|float), (\(int\))?[48]>", (LOAD16,)),
    (r"(score|normaliser)_kernel<\w*(half_t|bfloat16_t)>", (ASYNC16, r"\bLDSM\.16\.M88\.4", r"\bHMMA\.16816\.F32")),
    (r"(score|normaliser)_kernel<float>", (ASYNC16, SHARED16, r"\bFFMA\b")),
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one target."""

    name: str
    target: str
    registers: int
    shared_bytes: int  # static; most kernels take theirs at launch
    stack_bytes: int
    spill_bytes: int


class CheckError(RuntimeError):
    """A kernel that is not as it must be."""


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


def torch_include() -> Path:
    """torch's headers, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CheckError("torch was not found: its headers are needed")
    return Path(spec.origin).parent / "include"


def compile_source(nvcc: str, source: Path, target: str) -> tuple[Path, str]:
    """Compile to machine code for one target; the code and what ptxas said, kept until something changes."""
    flags = [
        "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Werror=all-warnings", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_include()),
        f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
    ]  # fmt: skip
    texts = [p.read_bytes() for p in sorted((ROOT / "csrc").glob("*/*")) if p.suffix in (".h", ".cuh", ".cu")]
    digest = hashlib.sha256(b"\0".join([" ".join([nvcc, *flags]).encode(), *texts])).hexdigest()[:16]
    code = BUILD / f"{source.parent.name}-{target}-{digest}.cubin"
    log = code.with_suffix(".log")
    if not (code.exists() and log.exists()):
        BUILD.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([nvcc, *flags, "-cubin", str(source), "-o", str(code)], capture_output=True, text=True)
        if done.returncode:
            code.unlink(missing_ok=True)
            raise CheckError(f"{source.relative_to(ROOT)} for sm_{target}:\n{done.stderr[-6000:]}")
        log.write_text(done.stderr)
    return code, log.read_text()


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names, as they are where there is no c++filt."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    readable = [
        line.removeprefix("void ").replace("mustdrop::", "").split("(mustdrop")[0] for line in done.stdout.splitlines()
    ]
    return dict(zip(names, [re.sub(r"\((?!int\)).*$", "", line) for line in readable], strict=True))


def parse_ptxas(text: str, target: str) -> list[Kernel]:
    """The kernels of a ptxas report."""
    found: list[Kernel] = []
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spill = int(match["stores"]) + int(match["loads"])
        size = int(shared[1]) if shared else 0
        found.append(Kernel(match["name"], target, int(match["registers"]), size, int(match["stack"]), spill))
    names = demangle([kernel.name for kernel in found])
    return [Kernel(**{**asdict(kernel), "name": names[kernel.name]}) for kernel in found]


def loops_of(code: list[str]) -> Iterator[str]:
    """The instructions between a label and a branch back to it."""
    labels: dict[str, int] = {}
    inside: set[int] = set()
    for number, line in enumerate(code):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = number
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in labels:
            inside.update(range(labels[branch[1]], number))
    return (code[number] for number in sorted(inside))


def check_disassembly(nvdisasm: str, code: Path) -> list[str]:
    """What the loops of the kernels lack."""
    done = subprocess.run([nvdisasm, "-c", str(code)], capture_output=True, text=True)
    if done.returncode:
        return [f"{nvdisasm} cannot read {code.name}: {done.stderr.strip()[:300]}"]
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", done.stdout, flags=re.MULTILINE)[1:]
    kernels = dict(zip(sections[::2], sections[1::2], strict=True))
    names = demangle(list(kernels))
    problems = []
    for mangled, text in kernels.items():
        wanted = {i for pattern, instructions in EXPECTED if re.search(pattern, names[mangled]) for i in instructions}
        loops = "\n".join(loops_of(text.splitlines())) if wanted else ""
        problems += [f"{names[mangled]}: no {i} in a loop" for i in sorted(wanted) if not re.search(i, loops)]
    return problems


def table(kernels: list[Kernel], targets: list[str]) -> str:
    """Registers by kernel and target."""
    names = sorted({kernel.name for kernel in kernels})
    by_key = {(kernel.name, kernel.target): kernel for kernel in kernels}
    width = max((len(name) for name in names), default=6)
    lines = [
        "registers".ljust(width) + "".join(f"{'sm_' + target:>9}" for target in targets) + "   shared  stack  spills"
    ]
    for name in names:
        row = [by_key.get((name, target)) for target in targets]
        there = [kernel for kernel in row if kernel]
        cells = "".join(f"{kernel.registers if kernel else '-':>9}" for kernel in row)
        worst = [
            max(getattr(kernel, field) for kernel in there) for field in ("shared_bytes", "stack_bytes", "spill_bytes")
        ]
        lines.append(f"{name:<{width}}{cells}{worst[0]:>9}{worst[1]:>7}{worst[2]:>8}")
    return "\n".join(lines)


def main() -> int:
    """Check, print, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="with commas between (default: %(default)s)")
    parser.add_argument("--sources", help="folders of csrc, with commas between (default: all)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--require", action="store_true", help="fail where there is no nvcc")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print(
            "check-cuda: skipped, nvcc was not found (set MUSTDROP_NVCC or CUDA_HOME, or pip install nvidia-cuda-nvcc)"
        )
        return int(options.require)
    nvdisasm = find_nvdisasm(nvcc)
    sources = sorted((ROOT / "csrc").glob("*/cuda.cu"))
    if options.sources:
        sources = [source for source in sources if source.parent.name in options.sources.split(",")]
    targets = options.targets.split(",")
    kernels: list[Kernel] = []
    problems: list[str] = []
    for source in sources:
        for target in targets:
            try:
                code, said = compile_source(nvcc, source, target)
            except CheckError as error:
                problems.append(str(error))
                continue
            kernels += parse_ptxas(said, target)
            if nvdisasm:
                problems += [f"sm_{target}: {problem}" for problem in check_disassembly(nvdisasm, code)]
    print(table(kernels, targets))
    print(
        f"\n{len(kernels)} kernels, compiled with {nvcc}; disassembly: {nvdisasm or 'left out, nvdisasm was not found'}"
    )
    problems += [f"sm_{k.target}: {k.name} spills {k.spill_bytes} bytes" for k in kernels if k.spill_bytes]
    problems += [f"sm_{k.target}: {k.name} has {k.stack_bytes} bytes of local memory" for k in kernels if k.stack_bytes]
    if sources and not kernels:
        problems.append("no kernel was found in what ptxas said")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
