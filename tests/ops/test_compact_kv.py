# SPDX-License-Identifier: Apache-2.0
"""compact_kv_ against the oracle: in place, all layers in one call, no writes outside the caches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import MOVABLE, Watch, as_bytes, bits_in_buffer, dtype_id, generator, in_buffer, random_bits, same_bits
from .changes import CACHE_KEYS, CACHE_VALUES, COUNTS, KEEP, in_first, in_last, to_shape, with_gaps


def ascending(lead: Sequence[int], length: int, capacity: int, counts: Tensor, seed: int, fill: int = -1) -> Tensor:
    """keep (*lead, capacity) for counts of shape `lead`: ascending positions, `fill` past the counts."""
    keep = torch.full((*lead, capacity), fill, dtype=torch.int64)
    flat, numbers = keep.view(-1, capacity), counts.reshape(-1).tolist()
    for i, count in enumerate(numbers):
        n = max(0, min(count, capacity, length))
        keep_row = torch.randperm(length, generator=generator(seed + i))[:n].sort().values
        flat[i, :n] = keep_row
    return keep


def counts_of(lead: Sequence[int], top: int, seed: int) -> Tensor:
    """Counts between 0 and top, the first one top."""
    counts = torch.randint(0, top + 1, tuple(lead), generator=generator(seed), dtype=torch.int32)
    if counts.numel():
        counts.view(-1)[0] = top
    return counts


def verify(before: list, after: list, keeps: list, counts: list, align_end: bool) -> None:
    """Compare every specified slot bit for bit."""
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        keep = keeps[layer if len(keeps) > 1 else 0].cpu().numpy()
        count = counts[layer if len(counts) > 1 else 0].cpu().numpy()
        want, told = oracle.compact_kv(old, keep, count, align_end)
        assert (as_bytes(new) == want)[told].all(), f"layer {layer}"


def check(backend, keys: list, values: list, keeps: list, counts: list, align_end: bool = False) -> None:
    keeps, counts = ([t.to(backend.device) for t in tensors] for tensors in (keeps, counts))
    everything = [*keys, *values]
    old = [as_bytes(t).copy() for t in everything]
    caches, inputs = Watch(*everything), Watch(*keeps, *counts)
    assert backend.compact_kv_(keys, values, keeps, counts, align_end=align_end) is None
    assert inputs.nothing_changed()
    assert caches.outside_unchanged(), "a byte outside the caches was written"
    verify(old[: len(keys)], keys, keeps, counts, align_end)
    verify(old[len(keys) :], values, keeps, counts, align_end)


def caches(layers: int, shape: Sequence[int], dtype, device, seed: int = 0, order=(0, 1, 2, 3)) -> tuple[list, list]:
    """Keys and values of each layer, each a view inside its own buffer of random bits."""
    tensors = [bits_in_buffer(shape, order, seed + i, dtype, device) for i in range(2 * layers)]
    return tensors[::2], tensors[1::2]


@pytest.mark.parametrize("dtype", MOVABLE, ids=dtype_id)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["bhld", "blhd"])
def test_element_types(backend, dtype, order, align_end):
    keys, values = caches(3, (2, 3, 20, 8), dtype, backend.device, order=order)
    counts = counts_of((2,), 13, 1)
    keep = ascending((2,), 20, 15, counts, 2)
    check(backend, keys, values, [keep], [counts], align_end)


@pytest.mark.parametrize("dim", [1, 3, 7, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 200])
def test_sizes(backend, length, dim, align_end):
    keys, values = caches(2, (1, 2, length, dim), torch.bfloat16, backend.device)
    for top in {0, 1, length // 2, length}:
        counts = counts_of((1,), top, 1)
        keep = ascending((1,), length, length, counts, top)
        check(backend, keys, values, [keep], [counts], align_end)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_keep_forms(backend, per_layer, per_head, align_end):
    """One set for all layers or one per layer, (B, K) or (B, Hk, K)."""
    layers, batch, heads, length = 4, 3, 2, 40
    keys, values = caches(layers, (batch, heads, length, 16), torch.float16, backend.device)
    lead = (batch, heads) if per_head else (batch,)
    keeps, counts = [], []
    for i in range(layers if per_layer else 1):
        count = counts_of(lead, 10 + 8 * i, i)
        keeps.append(ascending(lead, length, 36 + i, count, 10 * i))
        counts.append(count)
    check(backend, keys, values, keeps, counts, align_end)


def test_mixed_forms(backend, align_end):
    """Layers may mix sets per head and sets for all heads."""
    keys, values = caches(2, (2, 3, 20, 8), torch.float32, backend.device)
    counts = [counts_of((2,), 9, 1), counts_of((2, 3), 12, 2)]
    keeps = [ascending((2,), 20, 12, counts[0], 1), ascending((2, 3), 20, 14, counts[1], 5)]
    check(backend, keys, values, keeps, counts, align_end)


def test_layers_differ(backend, align_end):
    """Layers may differ in length, in heads (sets for all heads), and values from keys in head_dim."""
    shapes = [((2, 3, 20, 8), 8), ((2, 1, 33, 16), 4), ((2, 2, 11, 5), 9)]
    keys, values, keeps, counts = [], [], [], []
    for i, (shape, value_dim) in enumerate(shapes):
        (k,), _ = caches(1, shape, torch.float16, backend.device, seed=10 * i)
        _, (v,) = caches(1, (*shape[:3], value_dim), torch.float16, backend.device, seed=10 * i + 5)
        keys.append(k)
        values.append(v)
        counts.append(counts_of((2,), shape[2] - 2, i))
        keeps.append(ascending((2,), shape[2], 40, counts[-1], i))
    check(backend, keys, values, keeps, counts, align_end)
    # One set for layers of different length: indices past a shorter layer's end are skipped there.
    shared = torch.tensor([9, 12], dtype=torch.int32)
    keep = ascending((2,), 15, 12, shared, 3)
    check(backend, keys, values, [keep], [shared])


@pytest.mark.parametrize("axis", ["layer", "batch", "slot", "element"])
def test_interleaved_keys_and_values(backend, axis, align_end):
    """K and V as disjoint interleaved views of one buffer."""
    batch, heads, length, dim, device = 2, 3, 20, 8, backend.device
    if axis == "layer":
        pool = random_bits((2, 3, batch, heads, length, dim), 1, torch.bfloat16, device)
        keys, values = list(pool[0]), list(pool[1])
    elif axis == "batch":
        pool = random_bits((3, batch, 2, heads, length, dim), 1, torch.bfloat16, device)
        keys, values = [p[:, 0] for p in pool], [p[:, 1] for p in pool]
    elif axis == "slot":
        pool = random_bits((3, batch, heads, length, 2, dim), 1, torch.bfloat16, device)
        keys, values = [p[..., 0, :] for p in pool], [p[..., 1, :] for p in pool]
    else:
        pool = random_bits((3, batch, length, heads, 2 * dim), 1, torch.bfloat16, device).transpose(2, 3)
        keys, values = [p[..., :dim] for p in pool], [p[..., dim:] for p in pool]
    counts = counts_of((batch,), 14, 1)
    keep = ascending((batch,), length, 16, counts, 2)
    check(backend, keys, values, [keep], [counts], align_end)


def test_keep_views(backend, align_end):
    keys, values = caches(2, (2, 3, 20, 8), torch.float32, backend.device)
    counts = counts_of((2,), 9, 1).to(backend.device)
    keep = ascending((2,), 20, 12, counts, 1).to(backend.device)
    check(backend, keys, values, [in_buffer(keep)], [counts.repeat_interleave(2)[::2]], align_end)
    one = keep[:1].expand(2, -1)  # the same set for every sequence
    check(backend, keys, values, [one], [counts[:1].expand(2)], align_end)
    per_head = keep[:, None].expand(-1, 3, -1)
    check(backend, keys, values, [per_head], [counts[:, None].expand(-1, 3)], align_end)


@pytest.mark.parametrize(
    "pattern", ["all", "none", "first", "last", "all but first", "all but last", "even", "odd", "runs"]
)
def test_patterns(backend, pattern, align_end):
    length = 70
    positions = {
        "all": range(length),
        "none": [],
        "first": [0],
        "last": [length - 1],
        "all but first": range(1, length),
        "all but last": range(length - 1),
        "even": range(0, length, 2),
        "odd": range(1, length, 2),
        "runs": [p for p in range(length) if p % 20 < 13],
    }[pattern]
    keys, values = caches(2, (1, 2, length, 16), torch.float16, backend.device)
    n = len(positions)
    keep = torch.full((1, length), -1, dtype=torch.int64)
    keep[0, :n] = torch.tensor(list(positions), dtype=torch.int64)
    old = [t.clone() for t in (*keys, *values)]
    check(backend, keys, values, [keep], [torch.tensor([n], dtype=torch.int32)], align_end)
    if pattern == "all":
        assert all(same_bits(a, b) for a, b in zip(old, (*keys, *values), strict=True))


@pytest.mark.parametrize("counts", [[99, -4], [2**31 - 1, -(2**31)], [6, 0]], ids=str)
def test_counts_out_of_range(backend, counts, align_end):
    """counts is clamped to [0, capacity]."""
    keys, values = caches(2, (2, 2, 20, 8), torch.float32, backend.device)
    keep = ascending((2,), 20, 6, torch.tensor(counts), 1)
    numbers = torch.tensor(counts, dtype=torch.int32, device=backend.device)
    check(backend, keys, values, [keep], [numbers], align_end)


@pytest.mark.parametrize("bad", [20, 2**62, -1])
def test_moves_from_outside_are_skipped(backend, bad, align_end):
    """An index outside the sequence is skipped; the moves before it are made."""
    keys, values = caches(2, (1, 2, 20, 8), torch.float32, backend.device)
    keep = torch.tensor([[1, 4, 5, 9, bad, bad]], device=backend.device)
    counts = torch.tensor([6], dtype=torch.int32, device=backend.device)
    check(backend, keys, values, [keep], [counts], align_end)


def test_capacity_above_length(backend, align_end):
    """A `keep` longer than the cache: no writes outside."""
    keys, values = caches(2, (1, 2, 6, 8), torch.float32, backend.device)
    keep = torch.arange(12, device=backend.device)[None]
    for count in (5, 6, 9, 12):
        everything = Watch(*keys, *values)
        counts = torch.tensor([count], dtype=torch.int32, device=backend.device)
        backend.compact_kv_(keys, values, [keep], [counts], align_end=align_end)
        assert everything.outside_unchanged()


@pytest.mark.parametrize("seed", range(5))
def test_garbage_on_the_device(backend, seed, align_end):
    """Any indices in any order, any counts: the contents are unspecified, nothing outside changes."""
    keys, values = caches(2, (2, 3, 20, 8), torch.bfloat16, backend.device, order=(0, 2, 1, 3))
    keep = torch.randint(-(2**62), 2**62, (2, 30), generator=generator(seed))
    keep[:, ::2] = torch.randint(-30, 50, (2, 15), generator=generator(seed + 50))
    counts = torch.randint(-(2**31), 2**31 - 1, (2,), generator=generator(seed)).int()
    counts[0] = 30
    watch = Watch(*keys, *values)
    inputs = Watch(keep, counts)
    backend.compact_kv_(keys, values, [keep.to(backend.device)], [counts.to(backend.device)], align_end=align_end)
    assert watch.outside_unchanged()
    assert inputs.nothing_changed()


def test_only_listed_sequences_change(backend):
    """A sequence with a count of zero is unchanged by the moves of its neighbors."""
    keys, values = caches(1, (3, 2, 20, 8), torch.float32, backend.device)
    counts = torch.tensor([4, 0, 4], dtype=torch.int32)
    keep = ascending((3,), 20, 4, counts, 1)
    check(backend, keys, values, [keep], [counts])


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0)], ids=str)
def test_empty(backend, shape):
    for align_end in (False, True):
        keys = [torch.zeros(shape, device=backend.device)]
        values = [torch.zeros(shape, device=backend.device)]
        keep = torch.zeros(shape[0], 3, dtype=torch.int64, device=backend.device)
        counts = torch.full((shape[0],), 1, dtype=torch.int32, device=backend.device)
        check(backend, keys, values, [keep], [counts], align_end)
        check(backend, keys, values, [keep[:, :0].contiguous()], [counts], align_end)


def test_many_layers(backend):
    """As many layers as models have, each with its own keep set."""
    layers = 48
    keys, values = caches(layers, (1, 2, 30, 8), torch.bfloat16, backend.device)
    counts = [counts_of((1,), 5 + i % 20, i) for i in range(layers)]
    keeps = [ascending((1,), 30, 25, counts[i], i) for i in range(layers)]
    check(backend, keys, values, keeps, counts)
    check(backend, keys, values, keeps, counts, True)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["bhld", "blhd"])
def test_large(backend, order, align_end):
    keys, values = caches(4, (2, 8, 2980, 128), torch.float16, backend.device, order=order)
    counts = torch.tensor([640, 2500], dtype=torch.int32)
    keep = ascending((2,), 2980, 2600, counts, 1)
    check(backend, keys, values, [keep], [counts], align_end)


def test_align_end_is_left_padding(backend):
    """The kept tokens end at the last slot, as a left-padded batch requires."""
    cache = torch.arange(6, dtype=torch.float32, device=backend.device).reshape(1, 1, 6, 1)
    keys, values = [cache.clone()], [cache.clone() + 100]
    keep = torch.tensor([[0, 2, 5]], device=backend.device)
    counts = torch.tensor([3], dtype=torch.int32, device=backend.device)
    backend.compact_kv_(keys, values, [keep], [counts], align_end=True)
    assert keys[0].flatten().tolist()[3:] == [0, 2, 5]
    assert values[0].flatten().tolist()[3:] == [100, 102, 105]


def test_same_bits_every_run(backend, check_same_bits, align_end):
    device = backend.device
    counts = counts_of((2,), 150, 1)
    keep = ascending((2,), 257, 200, counts, 1).to(device)

    def specified() -> list[Tensor]:
        keys, values = caches(3, (2, 2, 257, 64), torch.float16, device)
        backend.compact_kv_(keys, values, [keep], [counts.to(device)], align_end=align_end)
        slots = [slice(257 - n, 257) if align_end else slice(0, n) for n in counts.tolist()]
        return [t[b, :, slots[b]] for t in (*keys, *values) for b in range(2)]

    check_same_bits(specified)


def test_nan_payloads_move(backend):
    cache = torch.zeros(1, 1, 3, 2, device=backend.device)
    cache.view(torch.int32)[0, 0, 2] = torch.tensor([0x7FA12345, -(2**31)], dtype=torch.int32)
    keys, values = [cache.clone()], [cache.clone()]
    keep = torch.tensor([[2]], device=backend.device)
    backend.compact_kv_(keys, values, [keep], [torch.ones(1, dtype=torch.int32, device=backend.device)])
    assert math.isnan(float(keys[0][0, 0, 0, 0]))
    assert same_bits(keys[0][0, 0, 0], cache[0, 0, 2])


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "compact_kv_": {
        "keys": {**CACHE_KEYS, "last dimension with gaps": in_first(with_gaps)},
        "values": {
            **CACHE_VALUES,
            "another length": in_last(to_shape(2, 3, 9, 4)),
            "other heads": in_first(to_shape(2, 2, 10, 4)),
            "last dimension with gaps": in_first(with_gaps),
        },
        "keep": KEEP,
        "counts": COUNTS,
    },
}
REFUSED_TOGETHER = [
    ("compact_kv_", "keys", {"keys": in_last(to_shape(3, 3, 10, 8)), "values": in_last(to_shape(3, 3, 10, 4))}),
]
