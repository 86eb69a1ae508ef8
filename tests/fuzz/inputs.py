# SPDX-License-Identifier: Apache-2.0
"""Tensors built from descriptions, and the strategies that generate descriptions.

NumPy's generators are used, because their streams do not depend on the machine or on torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ops.cases import in_buffer, prompt
from torch import Tensor

Case = dict[str, Any]

SEEDS = st.integers(0, 2**16)
FLOATS = st.sampled_from(["float32", "float16", "bfloat16"])
MOVABLE = st.sampled_from(
    ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "float8_e4m3fn", "complex64"]
)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 3e38, math.inf, -math.inf, math.nan)


def sizes(least: int, *edges: int) -> st.SearchStrategy[int]:
    """Sizes that are mostly small and sometimes around the tile sizes of kernels.

    A single draw from an ascending list, so that hypothesis can shrink any size.
    """
    return st.sampled_from(sorted([*range(least, 10), *range(least, 41), *edges]))


LENGTHS = sizes(0, 63, 64, 65, 127, 129)
WIDTHS = sizes(0, 64, 80, 128, 129)
HEAD_DIMS = sizes(0, 64, 128)


def dtype_of(name: str) -> torch.dtype:
    """ "float32" -> torch.float32."""
    return getattr(torch, name)


def numbers(*seed: int) -> np.random.Generator:
    """A generator per seed."""
    return np.random.Generator(np.random.PCG64(list(seed)))


def normal(shape: Sequence[int], seed: int, dtype: str, gain: float = 1.0) -> Tensor:
    """Gaussian values, rounded to the dtype."""
    return torch.from_numpy(gain * numbers(seed).standard_normal(tuple(shape), dtype=np.float32)).to(dtype_of(dtype))


def random_bits(shape: Sequence[int], seed: int, dtype: str) -> Tensor:
    """Random bit patterns of the element type."""
    if dtype == "bool":
        return torch.from_numpy(numbers(seed).integers(0, 2, tuple(shape), dtype=np.uint8)).bool()
    if 0 in shape:
        return torch.empty(tuple(shape), dtype=dtype_of(dtype))
    size = dtype_of(dtype).itemsize
    raw = numbers(seed).integers(0, 256, (*shape[:-1], shape[-1] * size), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype_of(dtype))


def integers(values: Any, dtype: torch.dtype = torch.int32, shape: Sequence[int] | None = None) -> Tensor:
    """An integer tensor; `shape` for empty lists, which do not determine it."""
    t = torch.tensor(values, dtype=dtype)
    return t if shape is None else t.reshape(tuple(shape))


# ---------------------------------------------------------------------------------------------- layouts


@st.composite
def layouts(draw: st.DrawFn, axes: int, last: bool = True) -> Case | None:
    """Memory layout of a tensor: None for contiguous; else permuted axes, inside a larger buffer, at an odd offset.

    `last`: the last axis stays the innermost.
    """
    if draw(st.integers(0, 2)) == 0:
        return None
    free = axes - 1 if last else axes
    orders = list(itertools.permutations(range(free)))
    order = list(orders[draw(st.integers(0, len(orders) - 1))]) + ([axes - 1] if last else [])
    layout: Case = {"order": order, "margin": draw(st.sampled_from([1, 2, 3, 8, 0]))}
    if free and draw(st.integers(0, 9)) == 0:
        layout = {"expand": draw(st.integers(0, free - 1))}
    return layout


def laid(t: Tensor, layout: Case | None) -> Tensor:
    """The tensor in this layout. An expanded one repeats its first entry along that axis."""
    if layout is None:
        return t
    if "expand" in layout:
        axis = layout["expand"]
        return t.narrow(axis, 0, 1).expand_as(t) if t.shape[axis] else t
    return in_buffer(t, layout["order"], layout["margin"])


def laid_in_place(shape: Sequence[int], seed: int, dtype: str, layout: Case | None) -> Tensor:
    """A cache inside a buffer of random bits, without overlapping elements."""
    if layout is None or "expand" in layout:
        return random_bits(shape, seed, dtype)
    order, margin = layout["order"], layout["margin"]
    view = random_bits([shape[a] + 2 * margin for a in order], seed, dtype)
    for axis, a in enumerate(order):
        view = view.narrow(axis, margin, shape[a])
    return view.permute([order.index(a) for a in range(len(shape))])


# ---------------------------------------------------------------------------------------------- token types


@st.composite
def type_styles(draw: st.DrawFn) -> Case:
    """Distribution of the token types."""
    return {"style": draw(st.sampled_from(["mixed", "prompt", "padded", "same"])), "seed": draw(SEEDS)}


def token_types(batch: int, length: int, described: Case) -> Tensor:
    """(batch, length) uint8."""
    rows = [_type_row(length, described["style"], described["seed"], b) for b in range(batch)]
    return torch.tensor(rows, dtype=torch.uint8).reshape(batch, length)


def _type_row(length: int, style: str, seed: int, row: int) -> list[int]:
    rng = numbers(seed, row)
    if style == "same":
        return [int(rng.integers(0, 4))] * length
    if style == "prompt":
        pad = int(rng.integers(0, length // 3 + 1))
        queries, images = int(rng.integers(0, 5)), int(rng.integers(1, 4))
        return prompt(length, queries=queries, images=images, pad=pad, side=("left", "right")[seed % 2])
    kinds = rng.choice([0, 1, 2, 2, 2, 3, 3, 9], length)
    if style == "padded":
        kinds[kinds == 0] = 2
        pad = int(rng.integers(0, length + 1))
        kinds[: pad if seed % 2 else length - pad] = 0
    return [int(kind) for kind in kinds]


# ---------------------------------------------------------------------------------------------- values of a row


@st.composite
def value_styles(draw: st.DrawFn) -> Case:
    """Distribution of scores: continuous, a few values with many ties, or special floats."""
    style = draw(st.sampled_from(["normal", "steps", "special", "positive"]))
    return {"style": style, "steps": draw(st.integers(1, 9)), "seed": draw(SEEDS)}


def values(shape: Sequence[int], described: Case, dtype: str) -> Tensor:
    """Scores as described, rounded to the dtype."""
    rng = numbers(described["seed"])
    if described["style"] == "steps":
        drawn = rng.integers(0, described["steps"], tuple(shape)).astype(np.float64)
    elif described["style"] == "special":
        drawn = rng.choice(np.array(SPECIAL), tuple(shape))
    else:
        drawn = rng.standard_normal(tuple(shape))
        drawn = np.abs(drawn) if described["style"] == "positive" else drawn
    return torch.from_numpy(drawn).to(dtype_of(dtype))


def protected_of(batch: int, length: int, seed: int | None) -> Tensor | None:
    """(batch, length) bool, about a quarter of it true, for tokens of every type."""
    return None if seed is None else torch.from_numpy(numbers(seed).random((batch, length)) < 0.25)
