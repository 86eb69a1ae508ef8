# SPDX-License-Identifier: Apache-2.0
"""torch.library.opcheck: schema (what is mutated, what is aliased), fake, autograd registration, AOT dispatch."""

from __future__ import annotations

import pytest
import torch

from mustdrop_kernels.ops.contract import CONTRACTS

from .sample_calls import sample, tensors_in
from .schemas import OPS, SCHEMAS


def split(op: str, given: dict) -> tuple[tuple, dict]:
    arguments = torch._C.parse_schema(SCHEMAS[op]).arguments
    positional = tuple(given[a.name] for a in arguments if not a.kwarg_only and a.name in given)
    return positional, {a.name: given[a.name] for a in arguments if a.kwarg_only and a.name in given}


def check(op: str, given: dict) -> None:
    args, kwargs = split(op, given)
    result = torch.library.opcheck(getattr(torch.ops.mustdrop, op).default, args, kwargs)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(op, device, dtype):
    check(op, sample(op, device, dtype))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_without_options(op, device):
    """With default keywords; and merging with a budget, whose output has another shape."""
    given = sample(op, device)
    required = [a.name for a in torch._C.parse_schema(SCHEMAS[op]).arguments if not a.kwarg_only]
    check(op, {name: given[name] for name in required if name in given})
    if op == "spatial_merge":
        check(op, {**given, "budget": 3})
        check(op, {**given, "uniform": True, "merged_first": True})


@pytest.mark.parametrize("op", [op for op, contract in CONTRACTS.items() if contract.gradient])
def test_opcheck_with_gradient(op, device):
    given = sample(op, device)
    given["x"].requires_grad_()
    check(op, given)


@pytest.mark.parametrize("op", ["compact_kv_", "compact_paged_kv_"])
def test_in_place_ops_bump_versions(op, device):
    """In-place ops bump the version counters of keys and values, and of no other tensor."""
    given = sample(op, device)
    before = [t._version for t in tensors_in(given)]
    getattr(torch.ops.mustdrop, op)(**given)
    changed = {id(t) for name in ("keys", "values") for t in given[name]}
    for tensor, version in zip(tensors_in(given), before, strict=True):
        assert (tensor._version > version) == (id(tensor) in changed)


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_")])
def test_fake_agrees_with_real(op, device):
    """Fakes give the shape, dtype, device and strides of the real results."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = sample(op, device)
    real = getattr(torch.ops.mustdrop, op)(**given)
    with FakeTensorMode() as mode:
        fake = getattr(torch.ops.mustdrop, op)(
            **{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        )
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert a.device.type == b.device.type
