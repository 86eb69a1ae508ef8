# SPDX-License-Identifier: Apache-2.0
"""Compilation of kernels with NVRTC, with a cache on disk. Requires CuPy and NVRTC, no GPU.

cupy.RawModule is not used: it flushes subnormal numbers to zero, which the operators do not, and its cache key does
not cover included files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cupy.cuda import nvrtc

from ... import _load
from ...files import written_whole

HEADERS = _load.LIBRARY_FOLDER / "kernels"
OPTIONS = ("-std=c++17",)


class CompileError(RuntimeError):
    """NVRTC failed to compile a kernel; the message is its log."""


@dataclass(frozen=True)
class Code:
    """A compiled kernel: its lowered name, and the image (machine code or PTX)."""

    name: str
    image: bytes


@cache
def sources() -> dict[str, str]:
    """Kernel sources by include path."""
    return {p.relative_to(HEADERS).as_posix(): p.read_text() for p in sorted(HEADERS.glob("*/*.*h"))}


def architecture(capability: int) -> tuple[str, int]:
    """The NVRTC target for a device, and the compute capability (times ten) whose instructions the code may use.

    Machine code where this NVRTC supports the device, else PTX of the newest architecture that it supports, which the
    driver compiles.
    """
    known = [target for target in nvrtc.getSupportedArchs() if target <= capability]
    if not known:
        raise CompileError(f"this NVRTC ({'.'.join(map(str, nvrtc.getVersion()))}) does not support sm_{capability}")
    newest = max(known)
    return (f"sm_{newest}" if newest == capability else f"compute_{newest}"), newest


def cache_folder() -> Path:
    """CuPy's cache folder: $CUPY_CACHE_DIR, or ~/.cupy/kernel_cache."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def compiled(kernel: str, target: str) -> Code:
    """Compile a kernel for a target, or load it from the cache.

    Args:
        kernel: its name, such as "mustdrop::score_kernel<float, 1>".
        target: "sm_90", or "compute_90" for PTX.
    """
    key = "\0".join([str(nvrtc.getVersion()), *OPTIONS, target, kernel, *sources(), *sources().values()])
    path = cache_folder() / f"mustdrop-{hashlib.sha256(key.encode()).hexdigest()}.bin"
    try:
        name, image = path.read_bytes().split(b"\0", 1)
    except (OSError, ValueError):
        (code,) = compile_kernels([kernel], target)
        # A read-only home only costs time. Concurrent processes write the same content.
        with contextlib.suppress(OSError), written_whole(path) as scratch:
            scratch.write_bytes(code.name.encode() + b"\0" + code.image)
        return code
    return Code(name.decode(), image)


def compile_kernels(kernels: Sequence[str], target: str) -> list[Code]:
    """Compile kernels into one image, without the cache.

    Raises:
        CompileError: with NVRTC's log.
    """
    texts = sources()
    source = "".join(f'#include "{name}"\n' for name in texts) + "using namespace mustdrop;\n"
    headers = [text.encode() for text in texts.values()], [name.encode() for name in texts]
    program = nvrtc.createProgram(source, "mustdrop.cu", *headers)
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, [*OPTIONS, f"-arch={target}"])
        except nvrtc.NVRTCError as error:
            raise CompileError(f"{', '.join(kernels)} for {target}: {error}\n{nvrtc.getProgramLog(program)}") from error
        image = nvrtc.getCUBIN(program) if target.startswith("sm_") else nvrtc.getPTX(program)
        return [Code(nvrtc.getLoweredName(program, kernel), image) for kernel in kernels]
    finally:
        nvrtc.destroyProgram(program)
