# SPDX-License-Identifier: Apache-2.0
"""Compilation of the CUDA sources to machine code, and the parser of ptxas's report."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .kernel import Kernel

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "check_cuda"
SOURCES = runpy.run_path(str(ROOT / "mustdrop_kernels" / "_sources.py"))

# "ptx" is the oldest virtual architecture assembled for a device without machine code in the library, as the driver
# does when it loads the library there.
PTX = ("compute_80", "sm_103")


class CompileError(RuntimeError):
    """A source that does not compile."""


# ------------------------------------------------------------------------------------------------ tools


def find_nvcc() -> str | None:
    """Path of nvcc of the environment, the system or the wheel."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc")
    found: str | None = SOURCES["find_nvcc"](*map(str, wheels))
    return found


def find_nvdisasm(nvcc: str) -> str | None:
    """Path of nvdisasm beside nvcc, on the PATH or in Triton's wheel."""
    candidates = [
        shutil.which("nvdisasm"),
        str(Path(nvcc).resolve().parent / "nvdisasm"),
        "/usr/local/cuda/bin/nvdisasm",
    ]
    if spec := importlib.util.find_spec("triton"):
        candidates += [str(Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin" / "nvdisasm")]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def why_no_compiler(nvcc: str) -> str | None:
    """The reason that nvcc cannot compile an empty kernel (no headers, no host compiler), or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text("#include <cuda_runtime.h>\n__global__ void empty() {}\n")
        command = [nvcc, "-arch=sm_80", "-cubin", str(source), "-o", f"{folder}/empty.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-400:]


def release_of(nvcc: str) -> str:
    """Release of a compiler: "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "of an unknown release"


def torch_include() -> Path:
    """torch's headers, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CompileError("torch was not found: its headers are needed")
    return Path(spec.origin).parent / "include"


def find_sources(folders: str | None) -> list[Path]:
    """Every CUDA source, or those of the named folders."""
    sources = sorted((ROOT / "csrc").glob("*/cuda*.cu"))
    return [s for s in sources if folders is None or s.parent.name in folders.split(",")]


# ------------------------------------------------------------------------------------------------ compiling


def compile_source(nvcc: str, source: Path, target: str) -> tuple[Path, str]:
    """Compile to machine code for one target. Returns the code and ptxas's report, cached until an input changes."""
    virtual, real = PTX if target == "ptx" else (f"compute_{target}", f"sm_{target}")
    flags = [
        "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_include()),
        f"-gencode=arch={virtual},code={real}", "-Xptxas=-v",
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
            report = re.compile(r"ptxas info|\s+\d+ bytes stack frame")
            errors = [line for line in done.stderr.splitlines() if not report.match(line)]
            raise CompileError("\n".join([f"{name_of(source)} for {real}:", *errors])[:6000])
        log.write_text(done.stderr)
        partial.rename(code)
    return code, log.read_text()


def name_of(source: Path) -> str:
    """Name of a source in messages."""
    return str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source)


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Demangled names; unchanged without c++filt."""
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
