# SPDX-License-Identifier: Apache-2.0
"""Many threads at once, processes that fork and spawn: the same bits as one thread alone."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.sample_calls import sample
from ops.schemas import OPS
from torch import Tensor

import mustdrop_kernels as mk
from mustdrop_kernels import backends

THREADS, ROUNDS = 8, 12
IN_PLACE = ("compact_kv_", "compact_paged_kv_")


def results(op: str, backend: str | None = None) -> list[Tensor]:
    """What a call gives: its results, or its caches."""
    given = sample(op)
    found = getattr(mk, op)(**given, backend=backend)
    if op in IN_PLACE:
        return [*given["keys"], *given["values"]]
    return [found] if isinstance(found, Tensor) else list(found)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """work(0) .. work(THREADS - 1), each in a thread of its own, all begun together."""
    barrier, found, errors = threading.Barrier(THREADS), [None] * THREADS, []

    def run(i: int) -> None:
        try:
            barrier.wait()
            found[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_operator_from_many_threads(backend: str) -> None:
    """Each thread goes through the operators in an order of its own."""
    alone = {op: results(op, backend) for op in OPS}

    def work(i: int) -> list[str]:
        return [
            op for turn in range(ROUNDS) for op in (*OPS[(i + turn) % len(OPS) :], *OPS[: (i + turn) % len(OPS)])
            if not same(results(op, backend), alone[op])
        ]  # fmt: skip

    assert at_once(work) == [[]] * THREADS


def test_larger_work_from_many_threads() -> None:
    """Large enough for torch's own threads, which the calls then share."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        q = torch.randn(2, 8, 60, 64, generator=torch.Generator().manual_seed(1))
        k = torch.randn(2, 8, 300, 64, generator=torch.Generator().manual_seed(2))
        types = torch.full((2, 300), 2, dtype=torch.uint8)
        types[:, -40:] = 3
        alone = list(mk.topk_attention_select(q, k, types, 0.125, 64))
        found = at_once(lambda i: [list(mk.topk_attention_select(q, k, types, 0.125, 64)) for _ in range(4)])
    finally:
        torch.set_num_threads(before)
    assert all(same(one, alone) for thread in found for one in thread)


def test_each_thread_has_its_own_choice_of_backend() -> None:
    """``use_backend`` is a choice of the thread that made it."""

    def work(i: int) -> bool:
        name = ("cpu", "reference")[i % 2]
        for _ in range(200):
            with backends.use_backend(name):
                if backends._chosen.get() != name:
                    return False
        return backends._chosen.get() is None

    assert all(at_once(work))


def _child(queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put({op: [t.contiguous().view(torch.uint8).flatten().tolist() for t in results(op)] for op in OPS})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method: str) -> None:
    """A child that was forked after the library worked, and one that starts anew."""
    want = {op: [t.contiguous().view(torch.uint8).flatten().tolist() for t in results(op)] for op in OPS}
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    found = queue.get(timeout=120)
    process.join(30)
    assert process.exitcode == 0
    assert found == want


def test_import_in_a_thread_and_beside_a_fork() -> None:
    """The package can be imported first in a thread, and first in a forked child."""
    code = """
import os, threading, torch
def use():
    import mustdrop_kernels as mk
    keep, counts = torch.tensor([[1]]), torch.tensor([1], dtype=torch.int32)
    assert mk.gather_tokens(torch.arange(4.0).view(1, 2, 2), keep, counts).tolist() == [[[2.0, 3.0]]]
child = os.fork()
if child == 0:
    use()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
errors = []
def run():
    try:
        use()
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=run) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not errors, errors
"""
    root = Path(mk.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
