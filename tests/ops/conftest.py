# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the conformance tests, among them `backend`: every backend on every available device, where it serves.

A new backend only has to register itself. MUSTDROP_TEST_BACKENDS=a,b restricts the tests to those.

Without a GPU the CUDA kernels are emulated on the host (tests/cuda_emulation), with their own launchers and with those
of the backend `cupy`, and TRITON_INTERPRET=1 runs the Triton kernels in Triton's interpreter. These are slow: a sample
of each test's cases runs on them, the rest is marked slow.
MUSTDROP_EMULATION_SAMPLE=n selects one case in n for the emulation (1: all; 0: none).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import cuda_emulation
import pytest
import torch
from cuda_emulation import nvrtc

import mustdrop_kernels
from mustdrop_kernels import backends
from mustdrop_kernels.ops import registry

from .cases import FLOATS, dtype_id, same_bits
from .schemas import OPS

SAMPLE = int(os.environ.get("MUSTDROP_EMULATION_SAMPLE", "4"))
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class BackendUnderTest:
    """The public functions bound to one backend and device; skips the test for an op that the backend lacks."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device

    def __repr__(self) -> str:
        return f"{self.name}-{self.device}"

    def __getattr__(self, op: str) -> Callable:
        if op not in OPS:
            raise AttributeError(op)
        reason = backends.registered()[self.name].why_not(op, self.device)
        if reason is not None:
            pytest.skip(f"{self.name} does not serve {op} on {self.device}: {reason}")
        return partial(getattr(mustdrop_kernels, op), backend=self.name)


def candidates() -> Mapping[str, backends.Backend]:
    """All backends. The emulated ones are registered only while their tests run (``_emulation``)."""
    emulated = (cuda_emulation.emulated(), nvrtc.emulated()) if SAMPLE else ()
    return {**backends.registered(), **{backend.name: backend for backend in emulated}}


def backends_to_test() -> list[str]:
    names = list(candidates())
    chosen = os.environ.get("MUSTDROP_TEST_BACKENDS")
    if not chosen:
        return names
    wanted = [name.strip() for name in chosen.split(",")]
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise pytest.UsageError(f"MUSTDROP_TEST_BACKENDS names {unknown}; registered are {names}")
    return wanted


def pairs() -> list[BackendUnderTest]:
    """Pairs of backend and device that serve at least one op."""
    found = [BackendUnderTest(name, device) for device in DEVICES for name in backends_to_test()]
    registry = candidates()
    return [p for p in found if any(registry[p.name].why_not(op, p.device) is None for op in OPS)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `backend`; `device` alone is for tests without a backend (fakes, schemas)."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", pairs(), ids=repr)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(params=FLOATS, ids=dtype_id)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True])
def align_end(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[False, True], ids=["", "lse"])
def with_lse(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def check_same_bits() -> Iterator[Callable[[Callable[[], Iterable[torch.Tensor]]], None]]:
    """Check of a call: with one CPU thread, with two, and repeated, its results have the same bits."""
    before = torch.get_num_threads()

    def check(call: Callable[[], Iterable[torch.Tensor]]) -> None:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(list(call()))
        for other in runs[1:]:
            assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))

    yield check
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _repeatable_seed() -> None:
    torch.manual_seed(0)


def _backend_of(item: pytest.Item) -> str:
    parameters = getattr(item, "callspec", None)
    backend = parameters.params.get("backend") if parameters else None
    return repr(backend) if isinstance(backend, BackendUnderTest) else ""


EMULATED, LAUNCHED, INTERPRETED = f"{cuda_emulation.NAME}-cpu", f"{nvrtc.NAME}-cpu", "triton-cpu"


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all cases of a test on a slow backend except the first and a sample of the others."""
    seen: set[tuple[str, str]] = set()
    for item in items:
        backend = _backend_of(item)
        if backend not in (EMULATED, LAUNCHED, INTERPRETED) or "slow" in item.keywords:
            continue
        test = (item.nodeid.split("[")[0], backend)
        first = test not in seen
        drawn = SAMPLE > 0 and zlib.crc32(item.nodeid.encode()) % SAMPLE == 0
        # LAUNCHED runs the same kernels as EMULATED, so a part of the tests suffices for its launches.
        if not {EMULATED: first or drawn, LAUNCHED: first and drawn, INTERPRETED: first}[backend]:
            item.add_marker(pytest.mark.slow)
        seen.add(test)


@pytest.fixture(autouse=True)
def _emulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register an emulated backend while its test runs, with a thread order and device derived from the test."""
    if _backend_of(request.node) not in (EMULATED, LAUNCHED):
        return
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    backends.register_backend(cuda_emulation.emulated(), replace=True)
    backends.register_backend(nvrtc.emulated(), replace=True)
    cuda_emulation.configure_for(request.node.name)
