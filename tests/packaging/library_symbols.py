# SPDX-License-Identifier: Apache-2.0
"""Undefined symbols of a shared library, and those that are allowed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

STABLE_ABI = re.compile(r"(aoti_torch_|torch_)\w+$")  # torch's C functions; its C++ is not allowed
CPP_RUNTIME = re.compile(r".*@(GLIBCXX|CXXABI|GCC)_[\d.]+$")
C_LIBRARY = re.compile(r"\w+@GLIBC_[\d.]+$")
LINKER = re.compile(r"(_ITM_(de)?registerTMCloneTable|__gmon_start__)$")
ALLOWED = (STABLE_ABI, CPP_RUNTIME, C_LIBRARY, LINKER)

NEEDED = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
NEEDED_BY_CUDA = {"libtorch_cuda.so", "libdl.so.2", "libpthread.so.0", "librt.so.1"}  # CUDA's runtime is static


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols(library: Path) -> list[str]:
    lines = output_of("nm", "-D", "--undefined-only", library).splitlines()
    return [line.split(maxsplit=1)[1].strip() for line in lines]


def strange_symbols(library: Path) -> list[str]:
    """Undefined symbols of a library that are not allowed."""
    return [s for s in undefined_symbols(library) if not any(allowed.match(s) for allowed in ALLOWED)]


def needed(library: Path) -> set[str]:
    """The NEEDED libraries of a library."""
    return set(re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", library)))


def has_search_path(library: Path) -> bool:
    return re.search(r"\((RPATH|RUNPATH)\)", output_of("readelf", "-d", library)) is not None
