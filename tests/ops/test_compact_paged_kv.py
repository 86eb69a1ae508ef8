# SPDX-License-Identifier: Apache-2.0
"""compact_paged_kv_ against the oracle: in place, in any layout, no writes outside the listed blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import (
    MOVABLE,
    Watch,
    as_bytes,
    bits_in_buffer,
    dtype_id,
    expected,
    generator,
    in_buffer,
    random_bits,
    same_bits,
)
from .changes import CACHE_KEYS, CACHE_VALUES, COUNTS, INT, KEEP, in_first, in_last, set_to, to_shape
from .test_compact_kv import ascending, counts_of

LAYOUTS = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "transposed": (0, 2, 3, 1), "heads first": (2, 0, 1, 3)}


@dataclass
class Pool:
    keys: list  # each (blocks, slots, Hk, D)
    values: list
    table: Tensor  # (B, max_blocks)
    seq_lens: Tensor  # (B)
    blocks: int
    slots: int


def pool(
    lengths, slots=4, heads=2, dims=(8, 8), layers=2, dtype=torch.float16, device="cpu", layout="NHD", spare=3, seed=0
) -> Pool:
    """Shuffled blocks, some of them unlisted; the unused tail of the table holds out-of-range values."""
    needed = [-(-n // slots) for n in lengths]
    blocks = sum(needed) + spare
    order = torch.randperm(blocks, generator=generator(seed))
    table = torch.full((len(lengths), max(needed, default=0) + 1), -9, dtype=torch.int32)
    used = 0
    for b, n in enumerate(needed):
        table[b, :n] = order[used : used + n]
        used += n
    table[:, -1] = 10**6

    def caches(dim: int, seed: int) -> list[Tensor]:
        shape = (blocks, slots, heads, dim)
        return [bits_in_buffer(shape, LAYOUTS[layout], seed + 2 * i, dtype, device) for i in range(layers)]

    return Pool(
        caches(dims[0], seed),
        caches(dims[1], seed + 1),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        blocks,
        slots,
    )


def check(backend, p: Pool, keeps: list, counts: list, align_end: bool = False) -> None:
    everything = [*p.keys, *p.values]
    before = [as_bytes(t).copy() for t in everything]
    caches, inputs = Watch(*everything), Watch(p.table, p.seq_lens, *keeps, *counts)
    seq_lens = p.seq_lens if align_end else None
    result = backend.compact_paged_kv_(p.keys, p.values, p.table, keeps, counts, seq_lens=seq_lens, align_end=align_end)
    assert result is None
    assert inputs.nothing_changed()
    assert caches.outside_unchanged(), "a byte outside the caches was written"
    lengths = p.seq_lens.cpu().numpy()
    for i, (old, new) in enumerate(zip(before, everything, strict=True)):
        layer = i % len(p.keys)
        keep = keeps[layer if len(keeps) > 1 else 0].cpu().numpy()
        count = counts[layer if len(counts) > 1 else 0].cpu().numpy()
        want, told = oracle.compact_paged_kv(old, p.table.cpu().numpy(), keep, count, lengths, align_end)
        assert (as_bytes(new) == want)[told].all(), f"layer {layer}: specified slots, or unlisted blocks"


def chosen(p: Pool, lead, share: float, seed: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """A keep set for each sequence (or head) within the sequence's length."""
    lengths = p.seq_lens.cpu().tolist()
    width = max(lengths, default=0) if capacity is None else capacity
    keep = torch.full((*lead, width), -1, dtype=torch.int64)
    counts = torch.zeros(lead, dtype=torch.int32)
    for place in np.ndindex(*lead):
        n = min(int(share * lengths[place[0]]), width)
        counts[place] = n
        picked = torch.randperm(lengths[place[0]], generator=generator(seed + 31 * sum(place)))[:n]
        keep[place][:n] = picked.sort().values
    return keep.to(p.table.device), counts.to(p.table.device)


@pytest.mark.parametrize("dtype", MOVABLE, ids=dtype_id)
@pytest.mark.parametrize("slots", [1, 4])
def test_element_types(backend, dtype, slots, align_end):
    p = pool([20, 7, 0, 1], slots, dtype=dtype, device=backend.device)
    check(backend, p, *map(lambda t: [t], chosen(p, (4,), 0.6, 1)), align_end)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("dims", [(1, 1), (7, 5), (64, 64), (80, 128)], ids=str)
def test_layouts(backend, layout, slots, dims, align_end):
    p = pool([33, 16, 2], slots, dims=dims, device=backend.device, layout=layout)
    check(backend, p, *map(lambda t: [t], chosen(p, (3,), 0.5, 1)), align_end)


@pytest.mark.parametrize("dim", [16, 256])
def test_mixed_layouts(backend, dim, align_end):
    """Keys transposed, values not, as a CPU engine stores them."""
    p = pool([33, 16], 4, dims=(dim, dim), device=backend.device)
    p.keys = pool([33, 16], 4, dims=(dim, dim), device=backend.device, layout="transposed", seed=90).keys
    check(backend, p, *map(lambda t: [t], chosen(p, (2,), 0.5, 1)), align_end)


@pytest.mark.parametrize("axis", ["block", "slot", "head", "element"])
def test_interleaved_keys_and_values(backend, axis, align_end):
    """K and V as views of one buffer: [blocks, 2, ...], [..., 2, D] and similar."""
    p = pool([21, 9], 4, device=backend.device)
    n, device, dtype = p.blocks, backend.device, torch.bfloat16
    if axis == "block":
        buffers = [random_bits((n, 2, 4, 2, 8), i, dtype, device) for i in range(2)]
        p.keys, p.values = [b[:, 0] for b in buffers], [b[:, 1] for b in buffers]
    elif axis == "slot":
        buffers = [random_bits((n, 4, 2, 2, 8), i, dtype, device) for i in range(2)]
        p.keys, p.values = [b[:, :, 0] for b in buffers], [b[:, :, 1] for b in buffers]
    elif axis == "head":
        buffers = [random_bits((n, 2, 4, 16), i, dtype, device) for i in range(2)]
        p.keys = [b[..., :8].transpose(1, 2) for b in buffers]
        p.values = [b[..., 8:].transpose(1, 2) for b in buffers]
    else:
        buffers = [random_bits((n, 4, 2, 8, 2), i, dtype, device) for i in range(2)]
        p.keys, p.values = [b[..., 0] for b in buffers], [b[..., 1] for b in buffers]
    check(backend, p, *map(lambda t: [t], chosen(p, (2,), 0.6, 1)), align_end)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_keep_forms(backend, per_layer, per_head, align_end):
    p = pool([30, 17, 4], 4, heads=3, layers=3, device=backend.device)
    lead = (3, 3) if per_head else (3,)
    sets = [chosen(p, lead, 0.2 + 0.3 * i, i) for i in range(3 if per_layer else 1)]
    check(backend, p, [k for k, _ in sets], [c for _, c in sets], align_end)


def test_views_of_the_tables(backend, align_end):
    p = pool([30, 17], 4, device=backend.device)
    keep, counts = chosen(p, (2,), 0.5, 1)
    p.table = in_buffer(p.table)
    check(backend, p, [in_buffer(keep)], [counts.repeat_interleave(2)[::2]], align_end)


@pytest.mark.parametrize("share", [0.0, 0.99, 1.0])
def test_none_and_all(backend, share, align_end):
    p = pool([21, 8, 5], 4, device=backend.device)
    check(backend, p, *map(lambda t: [t], chosen(p, (3,), share, 1)), align_end)


def test_one_block_at_a_time_is_dense(backend):
    """A pool of one block per sequence holds what compact_kv_ leaves in a dense cache."""
    dense = random_bits((3, 20, 2, 8), 1, torch.float16, backend.device)
    counts = counts_of((3,), 12, 1).to(backend.device)
    keep = ascending((3,), 20, 12, counts.cpu(), 1).to(backend.device)
    table = torch.arange(3, dtype=torch.int32, device=backend.device)[:, None]
    paged = [dense.clone()], [dense.clone()]
    backend.compact_paged_kv_(*paged, table, [keep], [counts])
    plain = [dense.clone().transpose(1, 2)], [dense.clone().transpose(1, 2)]
    backend.compact_kv_(*plain, [keep], [counts])
    for b, n in enumerate(counts.tolist()):
        assert same_bits(paged[0][0][b, :n], plain[0][0][b, :, :n].transpose(0, 1))


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_aligned_end_frees_leading_blocks(backend, slots):
    """With `drop_multiple` = slots the leading blocks are free, and the shifted table addresses the kept tokens."""
    lengths = [48, 33, 64]
    p = pool(lengths, slots, device=backend.device)
    types = torch.zeros(3, 64, dtype=torch.uint8)
    for b, n in enumerate(lengths):
        types[b, :n] = 1
        types[b, 5 : n - 3] = 2
    scores = torch.randn(3, 64, generator=generator(1)).to(backend.device)
    keep, counts = backend.select_topk(scores, types.to(backend.device), 9, drop_multiple=slots)
    before = p.keys[0].clone()
    check(backend, p, [keep], [counts], True)
    for b, n in enumerate(lengths):
        kept, dropped = int(counts[b]), n - int(counts[b])
        assert dropped % slots == 0
        assert dropped > 0
        shifted = p.table[b, dropped // slots :]
        for i in range(kept):
            source = int(keep[b, i])
            old = before[int(p.table[b, source // slots]), source % slots]
            assert same_bits(p.keys[0][int(shifted[i // slots]), i % slots], old)


@pytest.mark.parametrize("bad_block", [-1, 10**6, -(2**31), 2**31 - 1])
def test_nonexistent_blocks(backend, bad_block, align_end):
    """A move from or to such a block is skipped, the others are made."""
    p = pool([20, 9], 4, device=backend.device)
    keep = torch.tensor([[1, 5, 8, 9, 13, 14, 19, -1, -1], [0, 1, 2, 3, 4, 5, 6, 7, 8]], device=backend.device)
    counts = torch.tensor([7, 9], dtype=torch.int32, device=backend.device)
    p.table[0, 2] = bad_block
    check(backend, p, [keep], [counts], align_end)


@pytest.mark.parametrize("counts", [[99, -4], [2**31 - 1, -(2**31)], [6, 0]], ids=str)
def test_counts_out_of_range(backend, counts, align_end):
    p = pool([20, 9], 4, device=backend.device)
    keep = ascending((2,), 9, 6, torch.tensor(counts), 1)
    numbers = torch.tensor(counts, dtype=torch.int32, device=backend.device)
    check(backend, p, [keep.to(backend.device)], [numbers], align_end)


@pytest.mark.parametrize("seed", range(6))
def test_garbage_on_the_device(backend, seed, align_end):
    """Arbitrary values in every device tensor: nothing outside the caches changes."""
    p = pool([20, 9], 4, device=backend.device, layout=["NHD", "HND", "transposed"][seed % 3])
    keep = torch.randint(-(2**62), 2**62, (2, 30), generator=generator(seed))
    keep[:, ::2] = torch.randint(-30, 50, (2, 15), generator=generator(seed + 50))
    counts = torch.tensor([30, 17 + seed], dtype=torch.int32)
    p.seq_lens = torch.randint(-(2**31), 2**31 - 1, (2,), generator=generator(seed)).int().to(backend.device)
    if seed % 2:
        p.seq_lens = torch.tensor([5, 200], dtype=torch.int32, device=backend.device)
    p.table = torch.randint(-3, p.blocks + 3, tuple(p.table.shape), generator=generator(seed)).int().to(backend.device)
    caches, inputs = Watch(*p.keys, *p.values), Watch(p.table, p.seq_lens)
    backend.compact_paged_kv_(
        p.keys, p.values, p.table, [keep.to(backend.device)], [counts.to(backend.device)],
        seq_lens=p.seq_lens, align_end=align_end,
    )  # fmt: skip
    assert caches.outside_unchanged()
    assert inputs.nothing_changed()


def test_seq_lens_without_align_end_changes_nothing(backend):
    """seq_lens is unused without align_end."""
    results = []
    for given in (False, True):
        p = pool([20, 9], 4, device=backend.device)
        keep, counts = chosen(p, (2,), 0.5, 1)
        wrong = torch.tensor([3, 4], dtype=torch.int32, device=backend.device)
        backend.compact_paged_kv_(p.keys, p.values, p.table, [keep], [counts], seq_lens=wrong if given else None)
        results.append([(p.keys[0][int(p.table[0, i // 4]), i % 4]).clone() for i in range(int(counts[0]))])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1]], ids=str)
def test_empty(backend, lengths):
    for align_end in (False, True):
        p = pool(lengths, 4, device=backend.device)
        check(backend, p, *map(lambda t: [t], chosen(p, (len(lengths),), 1.0, 1, capacity=3)), align_end)
    p = pool(lengths, 4, device=backend.device, spare=0)
    check(backend, p, *map(lambda t: [t], chosen(p, (len(lengths),), 1.0, 1, capacity=0)))


def test_no_blocks(backend):
    p = pool([0], 4, device=backend.device, spare=0)
    assert p.blocks == 0
    keep = torch.tensor([[0, 1]], device=backend.device)
    check(backend, p, [keep], [torch.tensor([2], dtype=torch.int32, device=backend.device)])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["NHD", "HND", "transposed"])
def test_large(backend, layout, align_end):
    p = pool([2980, 671], 16, heads=4, dims=(128, 128), device=backend.device, layout=layout)
    check(backend, p, *map(lambda t: [t], chosen(p, (2,), 0.3, 1)), align_end)


def test_same_bits_every_run(backend, check_same_bits, align_end):
    def specified() -> list[Tensor]:
        p = pool([257, 130], 16, dims=(64, 64), device=backend.device)
        keep, counts = chosen(p, (2,), 0.4, 1)
        backend.compact_paged_kv_(p.keys, p.values, p.table, [keep], [counts], seq_lens=p.seq_lens, align_end=align_end)
        ends = [(n - c, n) if align_end else (0, c) for n, c in zip(p.seq_lens.tolist(), counts.tolist(), strict=True)]
        slots = [(int(p.table[b, i // 16]), i % 16) for b in range(2) for i in range(*ends[b])]
        return [t[slot] for t in (*p.keys, *p.values) for slot in slots]

    check_same_bits(specified)


def test_slot_pool(backend):
    """A pool of single slots, as in SGLang, as a view of [slots, Hk, D]."""
    slots = random_bits((40, 2, 8), 1, torch.bfloat16, backend.device)
    table = torch.randperm(40, generator=generator(1))[:30].reshape(2, 15).int().to(backend.device)
    keys, values = [slots.clone()], [slots.clone()]
    keep = torch.tensor([[2, 3, 14], [0, 7, 8]], device=backend.device)
    counts = torch.tensor([3, 2], dtype=torch.int32, device=backend.device)
    backend.compact_paged_kv_([k.unsqueeze(1) for k in keys], [v.unsqueeze(1) for v in values], table, [keep], [counts])
    for b in range(2):
        for i in range(int(counts[b])):
            assert same_bits(keys[0][table[b, i].long()], slots[table[b, keep[b, i]].long()])
    untouched = sorted(set(range(40)) - set(table.flatten().tolist()))
    assert same_bits(values[0][untouched], slots[expected(np.array(untouched), backend.device)])


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "compact_paged_kv_": {
        "keys": CACHE_KEYS,
        "values": {
            **CACHE_VALUES,
            "another number of slots": in_last(to_shape(7, 5, 3, 4)),
            "other heads": in_first(to_shape(7, 4, 2, 4)),
        },
        "block_table": {"int64": INT, "rank 1": to_shape(3), "rank 3": to_shape(2, 3, 1)},
        "keep": KEEP,
        "counts": COUNTS,
        "seq_lens": {"int64": INT, "rank 2": to_shape(2, 1), "another batch": to_shape(3), "missing": set_to(None)},
    },
}
REFUSED_TOGETHER = [
    ("compact_paged_kv_", "keys", {"keys": in_last(to_shape(6, 4, 3, 8)), "values": in_last(to_shape(6, 4, 3, 4))}),
    ("compact_paged_kv_", "keys", {"keys": in_last(to_shape(7, 5, 3, 8)), "values": in_last(to_shape(7, 5, 3, 4))}),
]
