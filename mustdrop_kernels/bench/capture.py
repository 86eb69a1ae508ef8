# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of calls that may not be capturable.

A failed capture leaves the process in a bad state: until torch 2.12 the capture's stream stays current, the caching
allocator stays in capture mode, and the default generator raises. Therefore each call is probed first; a call that
synchronizes with the device or copies from pageable memory is not captured. The state after any other failed capture is
restored and checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import first_line

_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")


class PoisonedError(BaseException):
    """A failed capture left the device unusable in this process, so later results cannot be trusted.

    It is no ``Exception``, so that code which continues after errors does not continue after this one.
    """


class _PageableCopy(RuntimeError):
    """A copy between pageable host memory and the device."""


class _RefusePageableCopies(TorchDispatchMode):
    """Raises for copies between pageable host memory and the device.

    torch's own check (``set_sync_debug_mode``) misses those with ``non_blocking=True``.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _COPIES:
            places = [result, *args[: 2 if func._schema.name == "aten::copy_" else 1]]
            kinds = {tensor.device.type for tensor in places if isinstance(tensor, torch.Tensor)}
            pageable = (t for t in places if isinstance(t, torch.Tensor) and t.device.type == "cpu")
            if self.device_type in kinds and any(not _is_pinned(tensor) for tensor in pageable):
                raise _PageableCopy("it copies between the device and pageable host memory")
        return result


def _is_pinned(tensor: torch.Tensor) -> bool:
    return torch.cuda.is_available() and tensor.is_pinned()


@contextlib.contextmanager
def _synchronizing_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def why_not(call: Callable[[], object], traced: bool = True, device_type: str = "cuda") -> str | None:
    """The reason why a call cannot be captured, found by one call outside of a capture; None if it can.

    Args:
        call: function that has run before, so that it compiles and initializes nothing.
        traced: check each copy; not for compiled calls, since torch.compile falls back to eager code under such a mode.
        device_type: of the device.
    """
    copies = _RefusePageableCopies(device_type) if traced else contextlib.nullcontext()
    try:
        with _synchronizing_is_an_error(), copies:
            call()
    except _PageableCopy as error:
        return str(error)
    except RuntimeError as error:
        return f"it synchronizes with the device: {first_line(error)[:200]}"
    finally:
        torch.cuda.synchronize()
    return None


def capture(
    work: Callable[[], object], warm_up: Callable[[], object]
) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """(graph of some work, None), or (None, reason) with the former state restored.

    Args:
        work: function to capture.
        warm_up: function to call first on another stream, for libraries that initialize per stream.

    Raises:
        PoisonedError: the capture failed and the state could not be restored.
    """
    before = torch.cuda.current_stream()
    other = torch.cuda.Stream()
    other.wait_stream(before)
    with torch.cuda.stream(other):
        warm_up()
    before.wait_stream(other)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        _clean_up(graph, before)
        return None, f"its capture failed: {first_line(error)[:200]}"
    return graph, None


def _clean_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Restore stream, allocator and generator; steps that this version of torch has already done may raise."""
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    with contextlib.suppress(Exception):
        pool = graph.pool()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)  # torch has not ended the pool, so it would not release it
    try:
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # a successful capture resets the generator
            torch.zeros(1, device="cuda")
        torch.randn(1, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        usable = torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    except RuntimeError as error:
        raise PoisonedError(
            f"a capture failed, and the device is unusable after it: {first_line(error)[:200]}"
        ) from error
    if not usable:
        raise PoisonedError("a capture failed, and its stream is still the current one")
