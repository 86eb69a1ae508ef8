# SPDX-License-Identifier: Apache-2.0
"""Numbers of other kinds than Python's, with every backend: accepted and refused as by torch.ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mustdrop_kernels.ops.samples import outcome

from .cases import same_bits
from .sample_calls import sample
from .schemas import OPS

OF: dict[type, Callable[[Any], Any]] = {int: np.int64, float: np.float32, bool: np.bool_}
KINDS: dict[str, Callable[[Any], Any]] = {
    "NumPy scalars": lambda value: OF[type(value)](value),
    "NumPy int32 and float64": lambda value: {int: np.int32, float: np.float64, bool: np.bool_}[type(value)](value),
    "NumPy arrays of no dimension": np.array,
    "tensors of no dimension": torch.tensor,
}


def changed(given: dict[str, Any], kind: str) -> dict[str, Any]:
    """The arguments with every number of another kind; lists of numbers are arrays where the kind is NumPy's."""

    def other(value: Any) -> Any:
        if isinstance(value, list) and isinstance(value[0], int):
            return np.array(value) if kind.startswith("NumPy") else [KINDS[kind](v) for v in value]
        return KINDS[kind](value) if type(value) in OF else value

    return {name: other(value) for name, value in given.items()}


def with_numbers(op: str, device: str) -> dict[str, Any]:
    """The sample call with numbers that float32 holds, and options that are numbers."""
    given = sample(op, device)
    given = {name: 0.25 if isinstance(value, float) else value for name, value in given.items()}
    return {**given, "budget": 3, "num_prefix_tokens": 1} if op == "spatial_merge" else given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_other_numbers(backend, op, kind):
    plain, given = with_numbers(op, backend.device), changed(with_numbers(op, backend.device), kind)
    if not any(type(value) in OF for value in plain.values()):
        pytest.skip("no numbers")
    want, got = (outcome(op, each, getattr(backend, op)(**each)) for each in (plain, given))
    for name, value in want.items():
        assert same_bits(value, got[name]), name


@pytest.mark.parametrize("wrong", [2.5, "2", None, np.array([2, 3])], ids=repr)
@pytest.mark.parametrize(("op", "argument"), [("select_topk", "k"), ("text_vision_attention", "max_query")])
def test_no_integer(backend, op, argument, wrong):
    with pytest.raises(RuntimeError, match=rf"{op}\(\).*'int' for argument '{argument}'"):
        getattr(backend, op)(**{**sample(op, backend.device), argument: wrong})
