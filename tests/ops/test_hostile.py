# SPDX-License-Identifier: Apache-2.0
"""Every row of hostile.py on every backend, and the overlap test against the addresses of all bytes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mustdrop_kernels as mk
from mustdrop_kernels.ops import overlap

from . import hostile


@pytest.mark.parametrize("row", hostile.TABLE, ids=[row.check.__name__ for row in hostile.TABLE])
def test_row(backend, row):
    if backend.device != "cpu":
        pytest.skip("the rows are made of CPU tensors")
    with warnings.catch_warnings():
        row.check(backend)


# ---------------------------------------------------------------------------------------------- overlap

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def views(draw):
    """A view of one byte buffer: shape, strides in elements, offset in bytes, bytes of an element."""
    shape = draw(SHAPES)
    strides = [draw(st.integers(1, 30)) for _ in shape]
    return shape, strides, draw(st.integers(0, 40)), draw(st.sampled_from([1, 2, 4]))


def addresses(view) -> np.ndarray:
    """Addresses of every byte of every element."""
    shape, strides, offset, element = view
    places = np.array(offset)
    for n, s in zip(shape, strides, strict=True):
        places = places[..., None] + np.arange(n) * s * element
    return (places[..., None] + np.arange(element)).ravel()


def form_of(view) -> overlap.Form:
    return overlap.form(tuple(view[0]), tuple(view[1]), view[3])


@settings(max_examples=400)
@given(views(), views())
def test_overlap_is_exact(first, second):
    a, b = addresses(first), addresses(second)
    assert overlap.overlaps_itself(form_of(first)) == (len(set(a)) < len(a))
    shared = bool(set(a) & set(b))
    assert overlap.share_memory(form_of(first), form_of(second), second[2] - first[2]) == shared
    assert overlap.share_memory(form_of(second), form_of(first), first[2] - second[2]) == shared


@settings(max_examples=150)
@given(st.data())
def test_overlap_in_the_operator(backend, data):
    """Two 4-D views of one buffer raise an error if and only if they share a byte, on every backend."""
    if backend.device != "cpu":
        pytest.skip("the same check of addresses")
    shape = [data.draw(st.integers(1, 3)) for _ in range(3)]
    buffer = torch.zeros(600, dtype=torch.uint8)

    def view():
        dim = data.draw(st.integers(1, 4))
        strides = [data.draw(st.integers(1, 40)) for _ in range(3)]
        return ([*shape, dim], [*strides, 1], data.draw(st.integers(0, 60)), 1)

    first, second = view(), view()
    a, b = addresses(first), addresses(second)
    legal = len(set(a)) == len(a) and len(set(b)) == len(b) and not set(a) & set(b)
    key, value = (buffer.as_strided(v[0], v[1], v[2]) for v in (first, second))
    keep, counts = torch.zeros(shape[0], 1, dtype=torch.int64), torch.ones(shape[0], dtype=torch.int32)
    if legal:
        backend.compact_kv_([key], [value], [keep], [counts])
    else:
        with pytest.raises(RuntimeError, match=r"compact_kv_: (keys|values)\[0\] must"):
            backend.compact_kv_([key], [value], [keep], [counts])


@pytest.mark.parametrize("layers", [1, 40])
def test_layers_between_each_other(layers):
    """Keys and values of all layers interleaved in one buffer block by block: no overlap."""
    buffer = torch.zeros(6, layers, 2, 4, 2, 8)
    keys, values = ([buffer[:, i, part] for i in range(layers)] for part in (0, 1))
    table, keep = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64)
    for backend in ("cpu", "reference"):
        mk.compact_paged_kv_(keys, values, table, [keep], [torch.ones(1, dtype=torch.int32)], backend=backend)
