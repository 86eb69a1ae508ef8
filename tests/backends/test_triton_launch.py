# SPDX-License-Identifier: Apache-2.0
"""Launches that bypass Triton's argument analysis, compiled for a real target and recorded by a stub driver.

No kernel runs; the arguments of the GPU driver are compared between Triton's own path and the bypass.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from example import SIMPLE, simple_arguments

from mustdrop_kernels.backends import triton as backend

if backend.interpreted():
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)
if backend.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from mustdrop_kernels.backends.triton import launch
from mustdrop_kernels.backends.triton.compact import compact_kv_
from mustdrop_kernels.backends.triton.select import select_topk

STREAM = 7
simple = backend.implementation(SIMPLE)


class Driver:
    """Stub driver that records loads and launches. The device index of CPU tensors is -1."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.loaded: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            unload_module=lambda module: None,
        )

    def _load(self, name: str, *_: object) -> tuple:
        self.loaded.append(name)
        return object(), len(self.loaded), 32, 0, 1024

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: object, metadata: object):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            self.launches.append(((x, y, z), stream, function, packed, args))

        return run


def compiled_functions() -> list[triton.runtime.JITFunction]:
    modules = [module for name, module in sys.modules.items() if name.startswith(backend.__name__ + ".")]
    return [f for module in modules for f in vars(module).values() if isinstance(f, triton.runtime.JITFunction)]


@pytest.fixture
def driver():
    fake = Driver()
    triton.runtime.driver.set_active(fake)
    for function in compiled_functions():  # compiled kernels are bound to the driver at compile time
        function.device_caches.clear()
    launch.Plans.forget_all()
    yield fake
    launch.Plans.forget_all()
    with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to restore
        triton.runtime.driver.reset_active()


@pytest.fixture
def arguments_analyzed(monkeypatch):
    """Records the runs of Triton's own launch path."""
    calls = []
    run = triton.runtime.JITFunction.run
    monkeypatch.setattr(
        triton.runtime.JITFunction, "run", lambda self, *a, **k: calls.append(self) or run(self, *a, **k)
    )
    return calls


def call(op: str) -> None:
    if op == "simple":
        simple(*simple_arguments(torch.zeros(1, 9, 64, dtype=torch.float16), 1, 4))
    elif op == "select":
        select_topk(torch.zeros(1, 9), torch.full((1, 9), 2, dtype=torch.uint8), 3)
    else:
        caches = [torch.zeros(1, 2, 9, 64, dtype=torch.float16) for _ in range(6)]
        compact_kv_(caches[:3], caches[3:], [torch.tensor([[1, 4]])], [torch.tensor([2], dtype=torch.int32)])


@pytest.mark.parametrize("op", ["simple", "select", "compact"])
def test_second_launch_hands_over_the_same(driver, arguments_analyzed, op):
    call(op)
    call(op)
    assert len(arguments_analyzed) == 1, "Triton's own path runs once per signature"
    assert len(driver.loaded) == 1
    first, second = driver.launches
    assert first[:4] == second[:4]
    assert first[1] == STREAM
    assert len(first[4]) == len(second[4])
    for a, b in zip(first[4], second[4], strict=True):
        assert type(a) is type(b)
        if isinstance(a, (int, float)):
            assert a == b


def test_alignment_chooses_the_kernel(driver, arguments_analyzed):
    buffer = torch.zeros(9 * 64 + 16, dtype=torch.float16)
    for shift in (0, 1, 8, 3, 16):  # of 2 bytes each: 0, 8 and 16 are aligned
        simple(*simple_arguments(buffer[shift : shift + 9 * 64].view(1, 9, 64), 1, 4))
    assert len(arguments_analyzed) == 2
    assert [entry[2] for entry in driver.launches] == [1, 2, 1, 2, 1]


def test_a_profiler_sees_every_launch(driver, arguments_analyzed, monkeypatch):
    call("simple")
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda *_: None)
    call("simple")
    assert len(arguments_analyzed) == 2
    assert len(driver.launches) == 2


def test_an_empty_launch_is_none(driver):
    counts = torch.zeros(0, dtype=torch.int32)
    select_topk(torch.zeros(0, 9), torch.zeros(0, 9, dtype=torch.uint8), 3)
    simple(torch.zeros(0, 9, 64), torch.zeros(0, 4, dtype=torch.int64), counts)
    assert not driver.launches
