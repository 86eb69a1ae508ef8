# SPDX-License-Identifier: Apache-2.0
"""Captures that fail, on a stand-in for torch.cuda that is poisoned by them as torch 2.10 and 2.11 are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from example import OTHER, QUICK

from mustdrop_kernels.bench import capture, run
from mustdrop_kernels.bench.capture import PoisonedError
from mustdrop_kernels.bench.run import Options
from mustdrop_kernels.bench.shapes import parse_shape


class Cuda:
    """The state that a capture changes. A capture that fails leaves all of it changed."""

    def __init__(self, ends_pools: bool = True) -> None:
        self.stream, self.allocator_captures, self.generator_captures = "default", 0, False
        self.ends_pools, self.sync_mode, self.calls = ends_pools, 0, 0
        self.released: list[object] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in (
            "graph", "current_stream", "set_stream", "get_sync_debug_mode", "set_sync_debug_mode", "empty_cache",
            "is_current_stream_capturing",
        ):  # fmt: skip
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_pool, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.released.append(pool), raising=False)
        patch.setattr(torch, "randn", self.randn)
        patch.setattr(torch, "zeros", lambda *shape, device: None)

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.empty_cache()
        before, self.stream = self.stream, "capture"
        self.allocator_captures += 1
        self.generator_captures = True
        yield  # what it raises passes here: nothing is put back
        self.allocator_captures -= 1
        self.generator_captures = False
        self.stream = before

    def empty_cache(self) -> None:
        if self.allocator_captures:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def end_pool(self, device: int, pool: object) -> None:
        if not (self.ends_pools and self.allocator_captures):
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocator_captures -= 1

    def randn(self, *shape: int, device: str) -> None:
        if self.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def current_stream(self) -> Named:
        return Named(self.stream)

    def set_stream(self, stream: Named) -> None:
        self.stream = str(stream)

    def is_current_stream_capturing(self) -> bool:
        return self.stream == "capture"

    def get_sync_debug_mode(self) -> int:
        return self.sync_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_mode = {"default": 0, "error": 2}.get(mode, mode)

    def item(self) -> None:
        """A call that synchronizes with the device."""
        self.calls += 1
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        if self.stream == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")


class Named(str):
    def wait_stream(self, other: object) -> None: ...


class Stream:
    def wait_stream(self, other: object) -> None: ...


class Graph:
    def pool(self) -> tuple[int, int]:
        return 0, 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    found.install(monkeypatch)
    return found


def test_a_call_that_synchronizes_is_not_captured(cuda):
    reason = capture.why_not(cuda.item)
    assert reason == "it synchronizes with the device: called a synchronizing CUDA operation"
    assert (cuda.calls, cuda.sync_mode) == (1, 0)
    assert capture.why_not(lambda: None) is None


@pytest.mark.parametrize(
    "copy",
    [
        lambda: torch.ones(3).to("meta", non_blocking=True),
        lambda: torch.empty(3, device="meta").copy_(torch.ones(3), non_blocking=True),
        lambda: torch.ones(()).to("meta", non_blocking=True),
    ],
)
def test_a_copy_from_pageable_memory_is_not_captured(cuda, copy):
    assert capture.why_not(copy, device_type="meta") == "it copies between the device and pageable host memory"


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ones(3, device="meta").double() * 2.0 + torch.tensor(1.0),
        lambda: torch.empty(3, device="meta").copy_(torch.empty(3, device="meta")),
        lambda: torch.ones(3).double(),
    ],
)
def test_other_copies_are(cuda, call):
    assert capture.why_not(call, device_type="meta") is None


def test_what_succeeds(cuda):
    done = []
    graph, reason = capture.capture(lambda: done.append("work"), lambda: done.append("warm"))
    assert isinstance(graph, Graph)
    assert reason is None
    assert done == ["warm", "work"]


def test_a_capture_that_fails_leaves_nothing_behind(cuda):
    graph, reason = capture.capture(cuda.item, lambda: None)
    assert graph is None
    assert reason == "its capture failed: operation not permitted when stream is capturing"
    assert (cuda.stream, cuda.allocator_captures, cuda.generator_captures) == ("default", 0, False)
    assert cuda.released == [(0, 1)]
    assert capture.capture(lambda: None, lambda: None)[1] is None, "the next one succeeds"


def test_the_stand_in_is_poisoned_without_the_cleaning(cuda, monkeypatch):
    monkeypatch.setattr(capture, "_clean_up", lambda graph, stream: None)
    capture.capture(cuda.item, lambda: None)
    with pytest.raises(RuntimeError, match="Offset increment"):
        torch.randn(1, device="cuda")
    assert "captures_underway" in capture.capture(lambda: None, lambda: None)[1]


def test_a_device_that_stays_poisoned_ends_the_run(monkeypatch):
    """The document holds what was finished before, and says why it ends."""
    with monkeypatch.context() as patch:
        cuda = Cuda(ends_pools=False)
        cuda.install(patch)
        with pytest.raises(PoisonedError, match="captures_underway"):
            capture.capture(cuda.item, lambda: None)

    real, kept = run._measure, []

    def poisoned(case, options, tell):
        if case.op == OTHER:
            raise PoisonedError("a capture failed, and the device is unusable after it")
        return real(case, options, tell)

    monkeypatch.setattr(run, "_measure", poisoned)
    cpu = torch.device("cpu")
    options = Options(QUICK, (parse_shape("tiny"),), (torch.float32,), cpu, ("cpu",), baselines=(), quick=True)
    document = run.run(options, keep=kept.append)
    assert document["stopped"] == "a capture failed, and the device is unusable after it"
    assert document["cases"] == {"planned": 3, "measured": 1}
    assert [row["op"] for row in document["rows"]] == [QUICK[0]]
    assert [one["cases"]["measured"] for one in kept] == [1]
