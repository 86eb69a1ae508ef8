# SPDX-License-Identifier: Apache-2.0
"""Host code of a call: it does not synchronize with the device, and its allocations depend on shapes only.

Kernels are not launched. Tensors are fakes on a CUDA device, so reading their contents raises. A call without such
reads can be captured in a CUDA graph once its kernels are compiled.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mustdrop_kernels import backends
from mustdrop_kernels.backends import triton as backend

if backend.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ops.sample_calls import sample

from mustdrop_kernels.backends.triton import configs, launch
from mustdrop_kernels.ops import checks

TRITON = backends.registered()["triton"]
SERVED = [op for op in backends.OPS if backend.defined(op) or TRITON.composes(op)]
aten = torch.ops.aten
# Allocations of sizes known to the host, views, and the only write without a kernel of this package.
HARMLESS = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.zeros.default, aten.zero_.default,
    aten.view.default, aten.view.dtype, aten.select.int, aten.unbind.int, aten.as_strided.default,
    aten.view_as_real.default, aten.slice.Tensor, torch.ops.prim.device.default,
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Records the torch operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, tuple[int, ...] | None]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, tuple(result.shape) if isinstance(result, torch.Tensor) else None))
        return result


@contextmanager
def no_launches():
    """Disable launches; yields the pointers of each launch that would have been made."""
    made: list[tuple] = []
    launch.Plans.forget_all()
    with (
        mock.patch.object(launch.Launch, "__call__", lambda self, *pointers: made.append((self, pointers))),
        mock.patch.object(configs, "architecture", return_value="sm90"),
        mock.patch.object(configs, "processors", return_value=132),
    ):
        yield made
    launch.Plans.forget_all()


def _address(tensor: torch.Tensor) -> int:
    """Addresses of fake tensors are invented."""
    return id(tensor)


def _on_gpu(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


@pytest.mark.parametrize("op", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_step_on_the_host(op, dtype):
    arguments = sample(op, dtype=dtype)
    with no_launches() as made, FakeTensorMode(), mock.patch.object(torch.Tensor, "data_ptr", _address):
        on_gpu = tree_map(_on_gpu, arguments)
        seen = []
        for _ in range(3):
            with Watch() as watch:
                TRITON.implementation(op)(**on_gpu)
            assert {function for function, _ in watch.calls} <= HARMLESS
            seen.append(watch.calls)
        assert seen[1] == seen[2], "a call with the same shapes repeats the same operators"
    assert made
    assert all(p.device.type == "cuda" for _, pointers in made for p in pointers if isinstance(p, torch.Tensor))


@pytest.mark.parametrize("op", SERVED)
def test_a_plan_is_made_once(op):
    """The second call with the same signature makes no checks and no plan: same launches, same objects."""
    with no_launches() as made:
        arguments = sample(op)
        TRITON.implementation(op)(**arguments)
        first = [id(one) for one, _ in made]
        made.clear()
        with mock.patch.object(checks.Checker, "tensor", side_effect=AssertionError("checked again")):
            TRITON.implementation(op)(**arguments)
        assert [id(one) for one, _ in made] == first


def test_contents_do_not_choose_sizes():
    """Different contents of the same shapes: the same allocations in the same order."""
    with no_launches():
        seen = []
        for value in (0, 3):
            arguments = sample("topk_attention_select")
            arguments["token_types"].fill_(value)
            arguments["budgets"].fill_(value)
            with Watch() as watch:
                TRITON.implementation("topk_attention_select")(**arguments)
            seen.append(watch.calls)
        assert seen[0] == seen[1]
