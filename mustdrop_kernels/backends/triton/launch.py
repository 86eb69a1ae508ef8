# SPDX-License-Identifier: Apache-2.0
"""Kernel launches with little host overhead.

A call looks up a cached plan by the shapes, strides, dtypes and options of its arguments, so arguments are checked and
tiles are chosen once per signature. A plan holds ``Launch`` objects with all other kernel arguments; a launch whose
pointers have a known alignment bypasses Triton's own argument analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from . import interpreted
from .configs import Config

INTERPRETED = interpreted()

# Element types that Triton loads and stores directly. All others move as integers of the same size.
_NATIVE = frozenset(
    (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1, most: int | None = None) -> int:
    """The smallest power of two that is at least n, within bounds."""
    power = max(least, 1 << max(n - 1, 0).bit_length())
    return power if most is None else min(power, most)


def as_words(t: Tensor) -> Tensor:
    """View of the same memory with elements that Triton can move; 16-byte elements get one more dimension."""
    if t.dtype in _NATIVE:
        return t
    if t.element_size() == 16:
        return torch.view_as_real(t)
    return t.view(_WORDS[t.element_size()])


def coalesced(t: Tensor, first: int, at_most: int) -> list[tuple[int, int]]:
    """The dimensions of t from ``first`` on as ``at_most`` pairs of size and stride, the last one contiguous.

    Adjacent dimensions that are contiguous with each other are merged. At most ``at_most`` may remain.
    """
    dims: list[tuple[int, int]] = []
    for size, stride in zip(t.shape[first:], t.stride()[first:], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if not dims or dims[-1][1] != 1:
        dims.append((1, 1))
    return [(1, 0)] * (at_most - len(dims)) + dims


def signature(*args: Any) -> tuple[Any, ...]:
    """Cache key of a plan: everything about the arguments except addresses and contents of tensors."""
    return tuple(
        (a.dtype, a.shape, a.stride(), a.device)
        if isinstance(a, Tensor)
        else signature(*a)
        if isinstance(a, (list, tuple))
        else a
        if a is None or isinstance(a, (int, float, str))
        else type(a)  # invalid: the argument checks raise
        for a in args
    )


class Plans(dict[Any, Any]):
    """The plans of one operator by signature. Bounded, because prompts come in every length."""

    MOST = 4096
    everywhere: ClassVar[list[Plans]] = []

    def __init__(self) -> None:
        super().__init__()
        self.everywhere.append(self)

    @classmethod
    def forget_all(cls) -> None:
        """Clear the plans of all operators, after a change of the tile tables."""
        for plans in cls.everywhere:
            plans.clear()

    def add(self, key: Any, plan: Any) -> Any:
        """Store a plan and return it."""
        if len(self) >= self.MOST:
            self.clear()
        self[key] = plan
        return plan


def options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Compiler options. The default for fused multiply-adds differs between versions of Triton."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


class Launch:
    """A kernel with its grid, its arguments other than tensors, and its configuration. Call it with the tensors."""

    def __init__(self, kernel: Any, grid: Sequence[int], scalars: tuple[Any, ...], config: Config) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        self.kernel, self.grid, self.scalars = kernel, (x, y, z), scalars
        self.options = options(config.num_warps, config.num_stages)
        self.empty = x * y * z == 0
        self._compiled: dict[Any, Any] = {}  # by device and the pointers' alignment

    def __call__(self, *pointers: Any) -> None:
        """Launch on the current stream of the tensors' device; a tensor may be None, or a tuple of tensors."""
        if self.empty:
            return
        if INTERPRETED:
            self.kernel.run(*pointers, *self.scalars, grid=self.grid, warmup=False, **self.options)
            return
        active = triton.runtime.driver.active
        device, current = _device_index(pointers), active.get_current_device()
        if device != current:
            with torch.cuda.device(device):
                self._launch(active, device, pointers)
        else:
            self._launch(active, device, pointers)

    def _launch(self, active: Any, device: int, pointers: tuple[Any, ...]) -> None:
        key = (device, *map(_alignment, pointers))
        compiled = self._compiled.get(key)
        if compiled is None or _profiled():
            arguments = (*pointers, *self.scalars)
            self._compiled[key] = self.kernel.run(*arguments, grid=self.grid, warmup=False, **self.options)
            return
        stream = active.get_current_stream(device)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(*self.grid, stream, function, metadata, None, None, None, *pointers, *self.scalars)


def _profiled() -> bool:
    """True if launch hooks are set. Newer versions of Triton have a chain of hooks, empty by default."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def _device_index(pointers: tuple[Any, ...]) -> int:
    first = pointers[0]
    return int((first[0] if isinstance(first, tuple) else first).get_device())


def _alignment(pointer: Any) -> Any:
    """Alignment key of a pointer: Triton specializes on divisibility by 16."""
    if pointer is None:
        return None
    if isinstance(pointer, tuple):
        return tuple(map(_alignment, pointer))
    return pointer.data_ptr() % 16 == 0
