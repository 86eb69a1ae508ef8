# SPDX-License-Identifier: Apache-2.0
"""Cross-compilation of every kernel in every shipped configuration, and the resources that the results need.

The operators run on CPU tensors of the relevant shapes with each launch recorded instead of made; the recorded launches
are compiled as a launch on the target would compile them.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import configs, crosscompile_calls, launch

KIB = 1024

# Bytes of stack allowed per thread while registers are left: ptxas spills a few values to keep one more program
# resident. Where registers are exhausted, nothing may spill.
STACK = 128


@dataclass(frozen=True)
class Target:
    """A GPU: its name in Triton, the number of programs that fill it, and the limits of one program.

    ``shared``: bytes of shared memory. ``registers``: 32-bit registers per thread; ``file``: of all warps of a program.
    """

    backend: str
    arch: int | str
    warp_size: int
    processors: int
    shared: int
    registers: int
    file: int

    @property
    def triton_target(self) -> GPUTarget:
        """The target object of Triton's compiler."""
        return GPUTarget(self.backend, self.arch, self.warp_size)


# Register file of one compute unit: 65536 registers on NVIDIA, four SIMDs of 512 on CDNA, two of 1536 on RDNA 3.
TARGETS = {
    "sm80": Target("cuda", 80, 32, 108, 163 * KIB, 255, 2048),
    "sm90": Target("cuda", 90, 32, 132, 227 * KIB, 255, 2048),
    "sm100": Target("cuda", 100, 32, 148, 227 * KIB, 255, 2048),
    "sm120": Target("cuda", 120, 32, 170, 99 * KIB, 255, 2048),
    "gfx942": Target("hip", "gfx942", 64, 304, 64 * KIB, 512, 2048),
    "gfx950": Target("hip", "gfx950", 64, 256, 160 * KIB, 512, 2048),
    "gfx1100": Target("hip", "gfx1100", 32, 96, 64 * KIB, 256, 3072),
}


@dataclass(frozen=True)
class Unit:
    """One specialization of a kernel."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[int, ...], ...]  # arguments that 16 divides
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Name for messages: kernel, element types, tile sizes."""
        types = [t for _, t in self.signature if isinstance(t, str) and t.startswith("*")]
        tiles = [f"{n}={v}" for (i, v) in self.constants if (n := self.kernel.arg_names[i[0]]).isupper()]
        return f"{self.kernel.__name__}({', '.join([*types[:2], *tiles])}, warps={self.num_warps})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the kernel's name: Triton's functions cannot be pickled."""
        own = (self.signature, self.constants, self.attributes, self.num_warps, self.num_stages)
        return _unpickled, (self.kernel.__module__, self.kernel.__name__, *own)


def _unpickled(module: str, kernel: str, *own: Any) -> Unit:
    return Unit(getattr(importlib.import_module(module), kernel), *own)


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel: bytes of shared memory, registers and bytes of stack of a thread, warps."""

    shared: int
    registers: int
    spilled: int
    num_warps: int


TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def _describe(value: Any, path: tuple[int, ...], param: Any, constants: dict[Any, Any], aligned: list[Any]) -> Any:
    """Type of an argument, as Triton's own argument analysis determines it."""
    if isinstance(value, tuple):
        return tuple(_describe(v, (*path, i), param, constants, aligned) for i, v in enumerate(value))
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            aligned.append(path)
        return f"*{TYPES[value.dtype]}"
    special = not param.do_not_specialize
    if param.is_constexpr or value is None or (value == 1 and isinstance(value, int) and special):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0 and special:
        aligned.append(path)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _unit(made: launch.Launch, pointers: tuple[Any, ...]) -> Unit:
    constants: dict[Any, Any] = {}
    aligned: list[Any] = []
    types = {}
    arguments = (*pointers, *made.scalars)
    for i, (param, value) in enumerate(zip(made.kernel.params, arguments, strict=True)):
        types[param.name] = _describe(value, (i,), param, constants, aligned)
    options = made.options
    return Unit(
        made.kernel, tuple(types.items()), tuple(constants.items()), tuple(aligned),
        options["num_warps"], options["num_stages"],
    )  # fmt: skip


@contextlib.contextmanager
def replaced_launches(target: str, instead: Callable[..., None], processors: int | None = None) -> Iterator[None]:
    """Choose tiles for the target and call ``instead(launch, *pointers)`` in place of each non-empty launch.

    ``processors``: multiprocessors of the target, if it is not the full chip.
    """

    def launched(made: launch.Launch, *pointers: Any) -> None:
        if not made.empty:
            instead(made, *pointers)

    launch.Plans.forget_all()
    with (
        mock.patch.object(launch.Launch, "__call__", launched),
        mock.patch.object(configs, "architecture", return_value=target),
        mock.patch.object(configs, "processors", return_value=processors or TARGETS[target].processors),
        mock.patch.object(configs, "TUNED", {}),
    ):
        try:
            yield
        finally:
            launch.Plans.forget_all()


@contextlib.contextmanager
def recording(target: str, processors: int | None = None) -> Iterator[dict[Unit, None]]:
    """Collect the kernels that this backend would launch on the target, without launching them."""
    units: dict[Unit, None] = {}

    def record(made: launch.Launch, *pointers: Any) -> None:
        units[_unit(made, pointers)] = None

    with replaced_launches(target, record, processors):
        yield units


def compiled(unit: Unit, target: str) -> Any:
    """Compile a kernel for a target with Triton's compiler."""
    source = ASTSource(
        unit.kernel,
        dict(unit.signature),
        constexprs=dict(unit.constants),
        attrs={path: [["tt.divisibility", 16]] for path in unit.attributes},
    )
    options = launch.options(unit.num_warps, unit.num_stages)
    return triton.compile(source, target=TARGETS[target].triton_target, options=options)


def compile_unit(unit: Unit, target: str) -> Resources:
    """Compile for a target and return the resources of the result."""
    made = compiled(unit, target)
    if TARGETS[target].backend == "cuda":
        registers, spilled = _cubin_usage(made.asm["cubin"])
    else:
        registers, spilled = _amdgcn_usage(made.asm["amdgcn"])
    return Resources(int(made.metadata.shared), registers, spilled, unit.num_warps)


def _amdgcn_usage(code: str) -> tuple[int, int]:
    """Registers and bytes of scratch memory (spills) of a thread."""
    number = {
        name: int(n) for name, n in re.findall(r"^\s+\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", code, re.M)
    }
    return number["vgpr_count"], number["private_segment_fixed_size"]


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def problem(resources: Resources, target: str) -> str | None:
    """The reason that these resources exceed the target, or None."""
    limit = TARGETS[target]
    if resources.shared > limit.shared:
        return f"needs {resources.shared} bytes of shared memory, {target} has {limit.shared}"
    if resources.registers > limit.registers or resources.registers * resources.num_warps > limit.file:
        return f"needs {resources.registers} registers in each of {resources.num_warps} warps"
    exhausted = resources.registers == min(limit.registers, limit.file // resources.num_warps)
    if resources.spilled > (0 if exhausted else STACK):
        return f"spills {resources.spilled} bytes at {resources.registers} registers a thread"
    return None


def units(target: str) -> list[Unit]:
    """All kernels that are shipped for a target."""
    with recording(target) as found:
        for call in crosscompile_calls.calls():
            call()
    return list(found)
