# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/*/cuda.cu with the host compiler against the emulation of CUDA, under sanitizers.

The launchers are compiled as they are, but for their registration: the operators of the library are
``torch.ops.mustdrop_emulated.*`` on CPU tensors. Objects are kept in build/cuda_emulation under a hash of what they
were made of.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_emulation"

SANITIZERS = {
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-Wno-unused-parameter", "-fno-omit-frame-pointer", "-DMUSTDROP_CUDA_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
RENAMED = {
    "STABLE_TORCH_LIBRARY(mustdrop, m)": "STABLE_TORCH_LIBRARY(mustdrop_emulated, m)",
    "STABLE_TORCH_LIBRARY_IMPL(mustdrop, CUDA, m)": "STABLE_TORCH_LIBRARY_IMPL(mustdrop_emulated, CPU, m)",
}


class EmulationError(RuntimeError):
    """The emulation could not be built; the message holds what the compiler said."""


def compiler() -> str | None:
    """The host compiler."""
    return shutil.which(os.environ.get("CXX", "g++"))


def why_not() -> str | None:
    """Why the emulation cannot be built here, None where it can."""
    return None if compiler() else "no host C++ compiler (g++) was found"


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise EmulationError("torch was not found")
    return Path(spec.origin).parent


def _text(path: Path) -> str:
    """A source as it is compiled: under the emulation's name, with lines that still point at the original."""
    text = path.read_text()
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return f'#line 1 "{path}"\n{text}'


def _object(source: Path, depends: list[Path], flags: list[str]) -> Path:
    text = _text(source)
    digest = hashlib.sha256("\0".join([text, *flags, *(p.read_text() for p in depends)]).encode()).hexdigest()[:20]
    target = BUILD / f"{source.parent.name}-{source.stem}-{digest}.o"
    if not target.exists():
        copy = target.with_suffix(".cpp")
        copy.write_text(text)
        partial = target.with_suffix(f".{os.getpid()}")
        _run([compiler() or "g++", *flags, "-c", str(copy), "-o", str(partial)])
        partial.rename(target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}\n{done.stderr[-8000:]}")


def build(sanitizer: str, extra: tuple[Path, ...] = ()) -> Path:
    """The shared library, compiled where something has changed.

    Args:
        sanitizer: a key of ``SANITIZERS``.
        extra: further sources, for the tests of the emulation itself.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    torch = _torch()
    include = [
        f"-I{ROOT / 'csrc'}",
        f"-I{HERE}",
        f"-isystem{torch / 'include'}",
        f"-isystem{sysconfig.get_path('include')}",
    ]
    flags = [*FLAGS, *SANITIZERS[sanitizer], *include, "-include", str(HERE / "cuda_emulation.h")]
    shared = (
        sorted((ROOT / "csrc").glob("*/*.cuh")) + sorted((ROOT / "csrc").glob("*/*.h")) + [HERE / "cuda_emulation.h"]
    )
    sources = [
        HERE / "scheduler.cpp",
        ROOT / "csrc" / "schemas.cpp",
        *sorted((ROOT / "csrc").glob("*/cuda.cu")),
        *extra,
    ]
    objects = []
    for source in sources:
        own = [p for p in shared if p.parent.name in ("common", "cuda_emulation") or _uses(source, p)]
        objects.append(_object(source, own, flags))
    digest = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
    library = BUILD / f"libmustdrop_emulated-{sanitizer}-{digest}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        link = [compiler() or "g++", "-shared", *SANITIZERS[sanitizer], *map(str, objects), "-o", str(partial)]
        _run([*link, f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--allow-shlib-undefined"])
        partial.rename(library)
    return library


def _uses(source: Path, header: Path) -> bool:
    """Whether a launcher may include a kernel header: its own folder's, or one that its text names."""
    return source.parent == header.parent or f"{header.parent.name}/{header.name}" in source.read_text()
