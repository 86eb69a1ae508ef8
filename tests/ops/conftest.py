# SPDX-License-Identifier: Apache-2.0
"""The `backend` fixture: every registered backend on every device present, for each op that it serves there.

A new backend only registers itself; no test names one. MUSTDROP_TEST_BACKENDS=a,b tests those alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

import mustdrop_kernels
from mustdrop_kernels import backends

from .schemas import OPS

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


def backends_to_test() -> list[str]:
    names = list(backends.registered())
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
    registry = backends.registered()
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
