# SPDX-License-Identifier: Apache-2.0
"""Precompilation: fills Triton's cache for a GPU that is not present.

Kernels take Triton's own launch path up to the launch, with a stub driver that reports the target: options,
specialization and cache keys are those of a first launch on the target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import launch
from .crosscompile import TARGETS, TYPES, Unit, replaced_launches

_DTYPES = {name: dtype for dtype, name in TYPES.items()}

# Called for each kernel that Triton compiles or finds in its cache: the kernel's folder, and whether it was a hit.
Listener = Callable[[Path, bool], None]


class _Driver:
    """Stub driver of the target. Triton caches compiled kernels by device, so the target's name is the device."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target].triton_target


@contextlib.contextmanager
def without_device(target: str, listener: Listener) -> Iterator[None]:
    """Compile for the target within the context; launches are impossible."""

    def record(*, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        listener(Path(next(iter(metadata_group.values()))).parent, cache_hit)

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = record
    triton.runtime.driver.set_active(_Driver(target))
    try:
        yield
    finally:
        triton.knobs.compilation.listener = before
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            triton.runtime.driver.reset_active()


@contextlib.contextmanager
def compiling(target: str, listener: Listener) -> Iterator[None]:
    """Operators of this backend, called with CPU tensors, compile the kernels that they launch on the target.

    Nothing is launched: results are uninitialized.
    """

    def compile_only(made: launch.Launch, *pointers: Any) -> None:
        made.kernel.run(*pointers, *made.scalars, grid=made.grid, warmup=True, **made.options)

    with without_device(target, listener), replaced_launches(target, compile_only):
        yield


def precompile(unit: Unit) -> None:
    """Compile a recorded launch, or find it in the cache. Must be called within ``without_device``."""
    arguments = [_argument(kind, (i,), unit) for i, (_, kind) in enumerate(unit.signature)]
    unit.kernel.run(*arguments, grid=(1, 1, 1), warmup=True, **launch.options(unit.num_warps, unit.num_stages))


def _argument(kind: Any, path: tuple[int, ...], unit: Unit) -> Any:
    """A value that Triton's argument analysis specializes like the unit's argument."""
    if isinstance(kind, tuple):
        return tuple(_argument(k, (*path, i), unit) for i, k in enumerate(kind))
    aligned = path in unit.attributes
    if kind.startswith("*"):
        return _pointer(_DTYPES[kind[1:]], aligned)
    if kind == "constexpr":
        return dict(unit.constants)[path]
    return {"fp32": 0.5, "i32": 2**8, "i64": 2**40}[kind] + (0 if aligned or kind == "fp32" else 1)


def _pointer(dtype: torch.dtype, aligned: bool) -> Tensor:
    """A tensor whose address is, or is not, a multiple of 16."""
    memory = torch.empty(64, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16
    return memory[begin : begin + 32].view(dtype)[0 if aligned else 1 :]
