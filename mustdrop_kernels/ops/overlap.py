# SPDX-License-Identifier: Apache-2.0
"""Exact overlap test of strided tensors. csrc/common/overlap.h is the same in C++."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from torch import Tensor

_MOST_STEPS = 1 << 16

Shape = tuple[int, ...]
# (contiguous bytes, ((size, stride in bytes), ...) of the other dimensions by descending stride)
Form = tuple[int, tuple[tuple[int, int], ...]]


def has_address(t: Tensor) -> bool:
    """True if a tensor has memory; fake and meta tensors and wrapper subclasses have none."""
    return type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and t.device.type != "meta"


@functools.lru_cache(maxsize=1024)
def form(shape: Shape, strides: Shape, element: int) -> Form:
    """Byte layout of a view, relative to its first byte. Dimensions of stride 0 are left out."""
    kept = sorted((s * element, n) for n, s in zip(shape, strides, strict=True) if n != 1 and s != 0)
    run, inner = element, 0
    while inner < len(kept) and kept[inner][0] == run:
        run *= kept[inner][1]
        inner += 1
    return run, tuple((n, s) for s, n in reversed(kept[inner:]))


def extent(view: Form) -> int:
    """Bytes from a view's first byte to past its last."""
    run, dims = view
    return run + sum((n - 1) * s for n, s in dims)


@functools.lru_cache(maxsize=1024)
def overlaps_itself(view: Form) -> bool:
    """True if two elements of the view share a byte."""
    inner, dims = view
    if len({s for _, s in dims}) < len(dims):
        return True
    nested = True
    for n, s in reversed(dims):
        nested = nested and s >= inner
        inner += (n - 1) * s
    return not nested and _reach(view, view, 0, trivial=False)


@functools.lru_cache(maxsize=16384)
def share_memory(first: Form, second: Form, distance: int) -> bool:
    """True if two views share a byte; `distance`: from the first view's first byte to the second's."""
    if distance >= extent(first) or -distance >= extent(second):
        return False
    return _reach(first, second, distance, trivial=True)


def _reach(first: Form, second: Form, target: int, *, trivial: bool) -> bool:
    """True if sum(i_d * stride_d) + byte of the first minus the same of the second can equal `target`.

    `trivial`: whether the solution with all indices equal counts. Layouts that are not decided within _MOST_STEPS steps
    (none in use) count as shared.
    """
    ranges: dict[int, tuple[int, int]] = {}
    for n, s in first[1]:
        low, high = ranges.get(s, (0, 0))
        ranges[s] = low, high + n - 1
    for n, s in second[1]:
        low, high = ranges.get(s, (0, 0))
        ranges[s] = low - (n - 1), high
    terms = [(s, *ranges[s]) for s in sorted(ranges, reverse=True)]
    bytes_low, bytes_high = 1 - second[0], first[0] - 1
    least, most = [bytes_low], [bytes_high]  # bounds of the sum of the terms after each
    for s, low, high in reversed(terms):
        least.insert(0, least[0] + s * low)
        most.insert(0, most[0] + s * high)
    steps = 0

    def search(k: int, rest: int, counts: bool) -> bool:
        nonlocal steps
        steps += 1
        if steps > _MOST_STEPS:
            return True
        if k == len(terms):
            return counts and bytes_low <= rest <= bytes_high
        s, low, high = terms[k]
        numbers = range(max(low, -((most[k + 1] - rest) // s)), min(high, (rest - least[k + 1]) // s) + 1)
        return any(search(k + 1, rest - c * s, counts or c != 0) for c in numbers)

    return search(0, target, trivial)


Claim = tuple[str, Tensor, bool]
"""(argument name, tensor, whether it is written)."""


class Layout:
    """Memory layout of the tensors of a call, without their addresses."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        """Tensors without elements are ignored."""
        numbered = [(i, claim) for i, claim in enumerate(claims) if claim[1].numel()]
        self.numbers = [i for i, _ in numbered]
        self.names = [name for _, (name, _, _) in numbered]
        self.writes = [writes for _, (_, _, writes) in numbered]
        self.forms = [form(tuple(t.shape), t.stride(), t.element_size()) for _, (_, t, _) in numbered]
        self.extents = [extent(view) for view in self.forms]

    def shared(self, addresses: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Pairs of tensors (indices into ``names``, ascending) that share a byte and of which one is written.

        `addresses`: data pointer of each tensor of the call.
        """
        placed = sorted((addresses[number], i) for i, number in enumerate(self.numbers))
        for i, (begin, one) in enumerate(placed):
            end = begin + self.extents[one]
            for other_begin, other in placed[i + 1 :]:
                if other_begin >= end:
                    break
                if (self.writes[one] or self.writes[other]) and share_memory(
                    self.forms[one], self.forms[other], other_begin - begin
                ):
                    yield min(one, other), max(one, other)

    def disjoint(self, tensors: Sequence[Tensor]) -> bool:
        """True if tensors of this layout share no memory that is written."""
        return next(self.shared([t.data_ptr() for t in tensors]), None) is None


def conflicts(claims: Sequence[Claim]) -> Iterator[tuple[str, str]]:
    """Pairs (argument, message) for overlaps of written tensors with themselves and with others."""
    layout = Layout(claims)
    for i, view in enumerate(layout.forms):
        if layout.writes[i] and overlaps_itself(view):
            strides = claims[layout.numbers[i]][1].stride()
            yield layout.names[i], f"must have each element at an address of its own, got strides {strides}"
    for first, second in layout.shared([t.data_ptr() for _, t, _ in claims]):
        yield layout.names[second], f"must not share memory with {layout.names[first]}"
