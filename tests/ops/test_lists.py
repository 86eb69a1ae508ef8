# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors: different lengths are refused with both lengths, and a call of empty lists has no effect."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mustdrop_kernels as mk
from mustdrop_kernels.ops.contract import CONTRACTS

from .cases import Watch
from .sample_calls import sample, tensors_in

IN_PLACE = [op for op, contract in CONTRACTS.items() if contract.writes]
LISTS = ("keys", "values", "keep", "counts")


def of_lengths(op: str, lengths: tuple[int, ...], device: str) -> dict:
    """The sample call with lists of these lengths."""
    given = sample(op, device)
    return {**given, **{name: (given[name] * n)[:n] for name, n in zip(LISTS, lengths, strict=True)}}


def wrong(keys: int, values: int, keep: int, counts: int) -> tuple[str, int, int] | None:
    """The argument that is refused, and the two lengths that the message names."""
    if values != keys:
        return "values", keys, values
    if keep not in (1, keys):
        return "keep", keys, keep
    return ("counts", keep, counts) if counts != keep else None


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("through", ["function", "torch.ops"])
@pytest.mark.parametrize("lengths", list(itertools.product((0, 1, 2), (0, 1, 2), (0, 1, 2), (0, 1))), ids=str)
def test_lengths(backend, op, through, lengths):
    call = getattr(backend, op) if through == "function" else getattr(torch.ops.mustdrop, op)
    given = of_lengths(op, lengths, backend.device)
    if lengths[0] == 2:  # two layers, not one twice
        for name in ("keys", "values"):
            given[name] = [t.clone() for t in given[name]]
    refused = wrong(*lengths)
    watch = Watch(*tensors_in(given))
    if refused is None:
        assert call(**given) is None
        assert watch.nothing_changed() == (lengths[0] == 0)
        return
    argument, required, got = refused
    with pytest.raises(RuntimeError, match=rf"mustdrop::{op}: {argument} .*\({required}\).*got {got}"):
        call(**given)
    assert watch.nothing_changed()


@pytest.mark.parametrize("op", IN_PLACE)
def test_empty_call(backend, op):
    """No layers: no effect through the function, ``use_backend``, torch.ops, on fake and meta tensors, compiled."""
    given = of_lengths(op, (0, 0, 0, 0), backend.device)
    compiled = torch.compile(
        lambda x: (getattr(mk, op)(**given, backend=backend.name), x + 1)[1], fullgraph=True, backend="eager"
    )
    with mk.use_backend(backend.name):
        assert getattr(mk, op)(**given) is None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert getattr(torch.ops.mustdrop, op)(**given) is None
    with torch.inference_mode():
        assert getattr(backend, op)(**given) is None
    assert compiled(torch.ones(1)) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("op", IN_PLACE)
def test_empty_call_of_no_backend(op):
    with pytest.raises(mk.backends.BackendError, match="no backend named 'none'"):
        getattr(mk, op)(**of_lengths(op, (0, 0, 0, 0), "cpu"), backend="none")
