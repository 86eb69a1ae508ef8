# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/*/cuda*.cu with the host compiler against the emulation of CUDA, under sanitizers.

The launchers are unchanged but for their registration: the operators of the library are
``torch.ops.mustdrop_emulated.*`` on CPU tensors. Objects are cached in build/cuda_emulation under a hash of their
inputs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_emulation"

# "races": undefined behavior, and data races by the hooks of -fsanitize=thread, whose runtime races.cpp replaces.
# "address": addresses and undefined behavior. "none": the schedule alone. "coverage": line coverage.
SANITIZERS = {
    "none": [],
    "coverage": ["--coverage", "-fprofile-update=atomic"],
    "races": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
HOOKS = {"races": ["-fsanitize=thread", "-DMUSTDROP_FIND_RACES"], "address": [], "none": [], "coverage": []}
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-Wno-unused-parameter", "-fno-omit-frame-pointer", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DMUSTDROP_DEVICE_KEY=CPU",
]  # fmt: skip
EMULATED = ["-DMUSTDROP_CUDA_EMULATED", "-DMUSTDROP_NAMESPACE=mustdrop_emulated"]
LAUNCHERS_ONLY = ["-DMUSTDROP_LAUNCHERS_ONLY", "-DMUSTDROP_NAMESPACE=mustdrop_nvrtc_emulated", "-fno-strict-aliasing"]
EMULATION = [HERE / "scheduler.cpp", HERE / "races.cpp", HERE / "driver.cpp"]  # not instrumented by the hooks


class EmulationError(RuntimeError):
    """The emulation could not be built; the message holds the compiler's output."""


def compiler() -> str | None:
    """Path of the host compiler, None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def why_not() -> str | None:
    """Reason why the emulation cannot be built here, None if it can."""
    return None if compiler() else "no host C++ compiler (g++) was found"


def launchers(root: Path = ROOT) -> list[Path]:
    """The CUDA launchers of a source tree."""
    return sorted((root / "csrc").glob("*/cuda*.cu"))


def build_library(sanitizer: str = "races", root: Path = ROOT) -> Path:
    """The emulated operators as a shared library, compiled if an input has changed.

    Args:
        sanitizer: a key of ``SANITIZERS``.
        root: the source tree that holds csrc/.
    """
    include, libraries = _torch_flags(root)
    sources = [root / "csrc" / "schemas.cpp", *launchers(root)]
    return _shared_library("mustdrop_emulated", sources, sanitizer, include, libraries, root)


def build_launchers() -> Path:
    """The launchers of the backend `cupy`, for CPU tensors: operators ``torch.ops.mustdrop_nvrtc_emulated.*``."""
    include, libraries = _torch_flags(ROOT)
    sources = [ROOT / "csrc" / "schemas.cpp", ROOT / "csrc" / "common" / "nvrtc.cpp", *launchers()]
    with _alone():
        objects = [_object(source, [*FLAGS, *LAUNCHERS_ONLY, *include]) for source in sources]
        return _linked("mustdrop_nvrtc_emulated", objects, [], libraries)


def _torch_flags(root: Path) -> tuple[list[str], list[str]]:
    torch = _torch()
    include = [f"-I{root / 'csrc'}", f"-isystem{torch / 'include'}", f"-isystem{sysconfig.get_path('include')}"]
    return include, [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--allow-shlib-undefined"]


def build_alone(source: Path, sanitizer: str = "races") -> Path:
    """A shared library of one source and the emulation."""
    return _shared_library(source.stem, [source], sanitizer, [f"-I{ROOT / 'csrc'}"], [])


def preload(sanitizer: str) -> dict[str, str]:
    """Environment variables of a process that loads a library of this sanitizer."""
    if sanitizer != "address":
        return {}
    names = ("libasan.so", "libstdc++.so.6")  # the sanitizer resolves symbols of the second at its start
    found = [_output([compiler() or "g++", f"-print-file-name={name}"]) for name in names]
    # Python does not free its memory at exit; fibers run on stacks of their own; results too large for memory raise, as
    # without a sanitizer.
    options = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options}


def _shared_library(
    name: str, sources: Sequence[Path], sanitizer: str, include: list[str], libraries: list[str], root: Path = ROOT
) -> Path:
    with _alone():
        flags = [
            *FLAGS,
            *EMULATED,
            *SANITIZERS[sanitizer],
            f"-I{HERE}",
            *include,
            "-include",
            str(HERE / "cuda_emulation.h"),
        ]
        kernels = [_object(source, [*flags, *HOOKS[sanitizer]], root) for source in sources]
        define = [flag for flag in HOOKS[sanitizer] if flag.startswith("-D")]
        objects = kernels + [_object(source, [*flags, *define]) for source in EMULATION]
        return _linked(f"{name}-{sanitizer}", objects, SANITIZERS[sanitizer], libraries)


def _linked(name: str, objects: Sequence[Path], flags: list[str], libraries: list[str]) -> Path:
    digest = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
    library = BUILD / f"lib{name}-{digest}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        _output([compiler() or "g++", "-shared", *flags, *map(str, objects), "-o", str(partial), *libraries])
        partial.rename(library)
    return library


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Serializes processes, so that they compile a library once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise EmulationError("torch was not found")
    return Path(spec.origin).parent


def _text(path: Path) -> str:
    """The text of a source with a #line directive that names the original."""
    return f'#line 1 "{path}"\n{path.read_text()}'


def _object(source: Path, flags: list[str], root: Path = ROOT) -> Path:
    """An object file, shared by source trees with equal texts."""
    text = _text(source)
    folders = [source.parent, *(Path(flag[2:]) for flag in flags if flag.startswith("-I"))]
    depends = _headers(source, folders, {HERE / "cuda_emulation.h"})
    made_of = "\0".join([text, *flags, *(p.read_text() for p in depends)]).replace(str(root), "")
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:20]
    target = BUILD / f"{source.parent.name}-{source.stem}-{digest}.o"
    if not target.exists():
        copy = target.with_suffix(".cpp")
        copy.write_text(text)
        partial = target.with_suffix(f".{os.getpid()}")
        _output([compiler() or "g++", *flags, f"-I{source.parent}", "-c", str(copy), "-o", str(partial)])
        partial.rename(target)
    return target


def _headers(source: Path, folders: list[Path], start: set[Path]) -> list[Path]:
    """Every header of this repository that a source includes, directly or not."""
    found, todo = set(start), [source, *start]
    while todo:
        for name in re.findall(r'^#include "([^"]+)"', todo.pop().read_text(), flags=re.MULTILINE):
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path is not None and path not in found:
                found.add(path)
                todo.append(path)
    return sorted(found)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
    return done.stdout.strip()
