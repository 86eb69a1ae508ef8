# SPDX-License-Identifier: Apache-2.0
"""The `backend` fixture: every registered backend on every device present, for each op that it serves there.

A new backend only registers itself; no test names one. MUSTDROP_TEST_BACKENDS=a,b tests those alone.

The CUDA kernels take part without a GPU too, emulated on the host (tests/cuda_emulation), which is slow: of each test a
sample of its cases runs, the others are marked slow. MUSTDROP_EMULATION_SAMPLE=n takes one in n (1: all; 0: none).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import cuda_emulation
import pytest
import torch

import mustdrop_kernels
from mustdrop_kernels import backends

from .schemas import OPS

SAMPLE = int(os.environ.get("MUSTDROP_EMULATION_SAMPLE", "4"))
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class BackendUnderTest:
    """The public functions bound to one backend and device; skips, with its reason, what the backend does not serve."""

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
    """All backends. The emulated one is registered for the length of its tests alone (``_emulation``)."""
    emulated = {cuda_emulation.NAME: cuda_emulation.emulated()} if SAMPLE else {}
    return {**backends.registered(), **emulated}


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
    """Pairs of backend and device with at least one op; one pair that serves nothing would only add skipped tests."""
    found = [BackendUnderTest(name, device) for device in DEVICES for name in backends_to_test()]
    registry = candidates()
    return [p for p in found if any(registry[p.name].why_not(op, p.device) is None for op in OPS)]


# In Triton's interpreter a test takes a second: the ordinary run takes so many forms of each test, the slow one all.
INTERPRETED_FORMS = 1


def _interpreted_form(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and repr(callspec.params.get("backend")) == "triton-cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the interpreter leaves to `make test-all`: all but some forms of each test, evenly spread."""
    forms: dict[str, list[pytest.Item]] = {}
    for item in filter(_interpreted_form, items):
        if "slow" not in item.keywords:
            forms.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in forms.values():
        steps = max(min(INTERPRETED_FORMS, len(same)) - 1, 1)
        taken = {i * (len(same) - 1) // steps for i in range(INTERPRETED_FORMS)}
        for i, item in enumerate(same):
            if i not in taken:
                item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` brings its device; `device` alone is for tests of what no backend computes (fakes, schemas)."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", pairs(), ids=repr)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of CPU threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _repeatable_seed() -> None:
    torch.manual_seed(0)


def _emulated(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    backend = parameters.params.get("backend") if parameters else None
    return isinstance(backend, BackendUnderTest) and backend.name == cuda_emulation.NAME


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the emulated cases of each test the first and one in SAMPLE of the others stay; the rest is slow."""
    seen: set[str] = set()
    for item in filter(_emulated, items):
        test = item.nodeid.split("[")[0]
        if test in seen and zlib.crc32(item.nodeid.encode()) % SAMPLE:
            item.add_marker(pytest.mark.slow)
        seen.add(test)


@pytest.fixture(autouse=True)
def _emulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the emulated backend while a test of it runs, with that test's own order of threads and device."""
    if not _emulated(request.node):
        return
    monkeypatch.setattr(backends, "_registered", dict(backends._registered))
    backends.register_backend(cuda_emulation.emulated())
    cuda_emulation.configure_for(request.node.name)
