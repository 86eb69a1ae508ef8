# SPDX-License-Identifier: Apache-2.0
"""Concurrent threads, and forked and spawned processes: the same bits as in a single thread."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_emulation import nvrtc
from ops.cases import as_bytes, same_bits
from ops.sample_calls import sample
from ops.schemas import OPS
from processes import output_of_python, python_path
from torch import Tensor

import mustdrop_kernels as mk
from mustdrop_kernels import backends
from mustdrop_kernels.ops import registry

THREADS, ROUNDS = 8, 12
IN_PLACE = ("compact_kv_", "compact_paged_kv_")


def results(op: str, backend: str | None = None) -> list[Tensor]:
    """Results of a call; of an in-place operator, its caches."""
    given = sample(op)
    found = getattr(mk, op)(**given, backend=backend)
    if op in IN_PLACE:
        return [*given["keys"], *given["values"]]
    return [found] if isinstance(found, Tensor) else list(found)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def all_bytes() -> dict[str, list]:
    """Bytes of the results of every operator."""
    return {op: [as_bytes(t).tolist() for t in results(op)] for op in OPS}


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """Run work(0) .. work(THREADS - 1) in threads that start together."""
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
    """Each thread calls the operators in a different order."""
    alone = {op: results(op, backend) for op in OPS}

    def work(i: int) -> list[str]:
        return [
            op for turn in range(ROUNDS) for op in (*OPS[(i + turn) % len(OPS) :], *OPS[: (i + turn) % len(OPS)])
            if not same(results(op, backend), alone[op])
        ]  # fmt: skip

    assert at_once(work) == [[]] * THREADS


def sized_call(op: str, i: int, device: str) -> dict[str, Any]:
    """A call whose CUDA kernel takes more than 48 KiB of dynamic shared memory; the size depends on ``i``."""
    generator = torch.Generator().manual_seed(i)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    if op == "spatial_merge":
        return {"x": draw(1, 36, 640 + 64 * i), "grid": [6, 6], "window": [2, 2], "num_prefix_tokens": 0}
    if op == "cls_attention":
        return {"q": draw(1, 1, 8), "k": draw(1, 1, 7000 + 500 * i, 8), "scale": 0.3}
    length = 14_000 + 600 * i
    types = torch.full((1, length), 2, dtype=torch.uint8, device=device)
    return {"scores": draw(1, length), "token_types": types, "k": 100 + i}


def backends_and_devices() -> list[tuple[str, str]]:
    """Backends and their devices, the CUDA kernels emulated where there is no GPU."""
    found = [("cpu", "cpu"), ("reference", "cpu")]
    if torch.cuda.is_available():
        return [*found, ("cuda", "cuda"), ("triton", "cuda"), ("cupy", "cuda")]
    return found if cuda_emulation.why_not() else [*found, (cuda_emulation.NAME, "cpu"), (nvrtc.NAME, "cpu")]


@pytest.fixture
def with_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    if not torch.cuda.is_available() and cuda_emulation.why_not() is None:
        backends.register_backend(cuda_emulation.emulated(), replace=True)
        backends.register_backend(nvrtc.emulated(), replace=True)
        cuda_emulation.configure(seed=1, capability=90)


@pytest.mark.usefixtures("with_emulation")
@pytest.mark.parametrize(
    ("backend", "device"), [pytest.param(*pair, id="-".join(pair)) for pair in backends_and_devices()]
)
def test_shapes_that_differ_from_thread_to_thread(backend: str, device: str) -> None:
    """Launches of one kernel from several threads do not change each other's amount of shared memory."""
    if reason := backends.registered()[backend].why_not("select_topk", device):
        pytest.skip(f"{backend} does not serve {device}: {reason}")
    ops = ("spatial_merge", "cls_attention", "select_topk")

    def work(i: int) -> list[Tensor]:
        found: list[Tensor] = []
        for op in (*ops[i % 3 :], *ops[: i % 3]):
            result = getattr(mk, op)(**sized_call(op, i, device), backend=backend)
            found += [result] if isinstance(result, Tensor) else result
        return found

    for i, found in enumerate(at_once(work)):
        assert same(found, work(i)), f"thread {i}"


def test_larger_work_from_many_threads() -> None:
    """Inputs large enough for torch's thread pool, which the calls share."""
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
    """``use_backend`` is local to its thread."""

    def work(i: int) -> bool:
        name = ("cpu", "reference")[i % 2]
        for _ in range(200):
            with backends.use_backend(name):
                if registry._chosen.get() != name:
                    return False
        return registry._chosen.get() is None

    assert all(at_once(work))


def _child(queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(all_bytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method: str) -> None:
    """A child forked after the library was used, and a spawned one."""
    want = all_bytes()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    found = queue.get(timeout=120)
    process.join(30)
    assert process.exitcode == 0
    assert found == want


def test_import_in_a_thread_and_beside_a_fork() -> None:
    """The first import may be in a thread or in a forked child."""
    code = """
import os, threading, torch
def use():
    import mustdrop_kernels as mk
    from mustdrop_kernels.ops.samples import sample
    found, expected = (mk.spatial_merge(**sample("spatial_merge"), backend=name) for name in (None, "reference"))
    assert torch.equal(found.assignment, expected.assignment)
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
    output_of_python("-c", code, PYTHONPATH=python_path(Path(mk.__file__).parents[1]))
