# SPDX-License-Identifier: Apache-2.0
"""Changes that make an argument invalid, and the rows of arguments that several operators share.

``REFUSALS`` of an operator's test file: op -> argument -> {description: the change of the argument}.
``REFUSED_TOGETHER``: (op, the argument that the error names, {argument: a value or a change}).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Change = Callable[[Any], Any]


def to_dtype(dtype: torch.dtype) -> Change:
    return lambda t: t.to(dtype)


def to_shape(*sizes: int) -> Change:
    return lambda t: t.new_ones(sizes)


def set_to(v: Any) -> Change:
    return lambda _: v


def with_gaps(t: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous in the last dimension."""
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def in_first(change: Change) -> Change:
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


def in_last(change: Change) -> Change:
    return lambda tensors: [*tensors[:-1], change(tensors[-1])]


def expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:, :, :1].expand_as(t)


INT, DOUBLE, HALF = to_dtype(torch.int64), to_dtype(torch.float64), to_dtype(torch.float16)


def dtypes_but(*served: torch.dtype) -> dict[str, Change]:
    """A row for each other dtype of torch's stable ABI."""
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn]
    floats += [torch.float8_e5m2fnuz, torch.float8_e4m3fnuz]
    integers = [torch.int8, torch.int16, torch.int32, torch.int64]
    integers += [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
    every = [*floats, *integers, torch.complex32, torch.complex64, torch.complex128]
    return {str(dtype).removeprefix("torch."): to_dtype(dtype) for dtype in every if dtype not in served}


QUERY = {
    "rank 3": to_shape(2, 4, 8),
    "rank 5": to_shape(2, 4, 12, 8, 1),
    "integers": INT,
    "float64": DOUBLE,
    "more rows than keys": to_shape(2, 4, 15, 8),
    "last dimension with gaps": with_gaps,
}
KEY = {
    "rank 3": to_shape(2, 14, 8),
    "another batch": to_shape(3, 2, 14, 8),
    "another head_dim": to_shape(2, 2, 14, 9),
    "heads that do not divide": to_shape(2, 3, 14, 8),
    "more heads than the query": to_shape(2, 8, 14, 8),
    "no heads": to_shape(2, 0, 14, 8),
    "another dtype": HALF,
    "last dimension with gaps": with_gaps,
}
TYPES = {
    "rank 1": to_shape(14),
    "another length": to_shape(2, 13),
    "another batch": to_shape(1, 14),
    "int64": INT,
    "bool": to_dtype(torch.bool),
    "float32": to_dtype(torch.float32),
    "last dimension with gaps": with_gaps,
}
LSE = {
    "float64": DOUBLE,
    "float16": HALF,
    "rank 2": to_shape(2, 12),
    "heads of k": to_shape(2, 2, 12),
    "rows of k": to_shape(2, 4, 14),
}
DENSE = {"q": QUERY, "k": KEY, "token_types": TYPES, "lse": LSE}
OPTIONS = {
    "protected": {
        "uint8": to_dtype(torch.uint8),
        "float32": to_dtype(torch.float32),
        "rank 1": to_shape(14),
        "another length": to_shape(2, 13),
        "last dimension with gaps": with_gaps,
    },
    "capacity": {"negative": set_to(-1)},
    "drop_multiple": {"zero": set_to(0), "negative": set_to(-4)},
}
BUDGETS = {"int64": INT, "rank 2": to_shape(2, 1), "another batch": to_shape(3), "one for all": to_shape(1)}
VALUES = {
    "rank 1": to_shape(14),
    "rank 3": to_shape(2, 14, 1),
    "integers": INT,
    "float64": DOUBLE,
    "last dimension with gaps": with_gaps,
}
KEEP = {
    "int32": in_first(to_dtype(torch.int32)),
    "rank 1": in_first(to_shape(4)),
    "rank 4": in_first(to_shape(2, 3, 4, 1)),
    "another batch": in_first(to_shape(3, 4)),
    "another number of heads": in_first(to_shape(2, 2, 4)),
    "neither one nor one per layer": lambda k: k * 2,
    "none": set_to([]),
    "last dimension with gaps": in_first(with_gaps),
}
COUNTS = {
    "int64": in_first(INT),
    "float32": in_first(to_dtype(torch.float32)),
    "another batch": in_first(to_shape(3)),
    "rank 2 with a set for all heads": in_first(to_shape(2, 3)),
    "more than keep": lambda c: c * 3,
    "none": set_to([]),
}
CACHE = {
    "rank 3": in_first(to_shape(2, 3, 10)),
    "rank 5 in the last layer": in_last(to_shape(2, 3, 10, 8, 1)),
    "expanded over slots": in_first(expanded),
    "expanded in the last layer": in_last(expanded),
}
CACHE_KEYS = {**CACHE, "a layer twice": lambda k: [k[0], k[1], k[0]]}
CACHE_VALUES = {
    **CACHE,
    "one layer less": lambda v: v[:-1],
    "a layer twice": lambda v: [v[0], v[0], v[2]],
}
