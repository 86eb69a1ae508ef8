# SPDX-License-Identifier: Apache-2.0
"""Property tests against the oracle: arbitrary shapes, token types and values.

A decision that depends on a sum is near if its value is within 1e-4 (relative) of the threshold. Differences from the
oracle are allowed for near decisions only, whose number is limited.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from . import oracle
from .cases import (
    FLOATS,
    VISION,
    Attention,
    Watch,
    as_bytes,
    f64,
    generator,
    in_buffer,
    normal,
    random_bits,
    relative_gap,
    types_tensor,
)
from .test_compact_kv import caches
from .test_compact_kv import check as check_compact
from .test_compact_paged_kv import LAYOUTS, chosen, pool
from .test_compact_paged_kv import check as check_compact_paged
from .test_gather import check as check_gather
from .test_select import check_topk, compare
from .tolerance import assert_probabilities

SEED = st.integers(0, 2**20)
NEAR = 1e-4


def assert_only_near(differ: set, near: set, among: int) -> None:
    assert differ <= near, f"differs from the oracle without being near: {sorted(differ - near)}"
    assert len(near) <= 2 + 0.02 * among, f"{len(near)} of {among} are near a threshold: too many for a conclusive test"


@st.composite
def token_types(draw, batch: int, length: int) -> torch.Tensor:
    """Any mixture of types, with one-sided padding in some sequences."""
    kinds = st.sampled_from([0, 1, 2, 2, 2, 3, 3, 9])
    rows = [draw(st.lists(kinds, min_size=length, max_size=length)) for _ in range(batch)]
    return types_tensor(rows).reshape(batch, length)


@given(data=st.data(), seed=SEED, dtype=st.sampled_from(FLOATS))
def test_merge(backend, data, seed, dtype):
    axes = data.draw(st.integers(2, 3))
    grid = data.draw(st.lists(st.integers(1, 7), min_size=axes, max_size=axes))
    window = data.draw(st.lists(st.integers(1, 4), min_size=axes, max_size=axes))
    batch, prefix, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2)), data.draw(st.integers(2, 20))
    threshold = data.draw(st.floats(-0.5, 1.0))
    x = normal((batch, prefix + math.prod(grid), channels), seed, dtype)
    x[:, prefix:] += data.draw(st.floats(0, 2)) * x[:, prefix : prefix + 1]
    got = backend.spatial_merge(in_buffer(x.to(backend.device)), grid, window, threshold, num_prefix_tokens=prefix)
    want = oracle.spatial_merge(f64(x), grid, window, threshold, num_prefix_tokens=prefix)

    members, _ = oracle.window_members(grid, window)
    assignment = got.assignment.cpu().numpy()
    differ, near = set(), set()
    for b in range(batch):
        for w, tokens in enumerate(members):
            merged = len(tokens) > 1 and len({assignment[b, prefix + t] for t in tokens}) == 1
            gap = abs(want.similarity[b, w] - float(np.float32(threshold)))
            if gap <= NEAR * max(abs(threshold), 1e-2):
                near.add((b, w))
            if merged != (w in want.merged[b]):
                differ.add((b, w))
    assert_only_near(differ, near, batch * len(members))
    sizes, counts = f64(got.sizes), got.counts.tolist()
    for b in range(batch):
        assert sorted(set(assignment[b])) == list(range(counts[b])), "every row has a source"
        np.testing.assert_array_equal(sizes[b], np.bincount(assignment[b], minlength=sizes.shape[1]))
        # The sum of tokens weighted by their sizes equals the sum of the input.
        weighed = (f64(got.tokens)[b] * sizes[b][:, None]).sum(0)
        slack = 2 * torch.finfo(dtype).eps * np.abs(f64(x)[b]).sum()
        np.testing.assert_allclose(weighed, f64(x)[b].sum(0), rtol=0, atol=slack + 1e-5)


@st.composite
def attention_cases(draw) -> tuple[Attention, bool]:
    batch, groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    length, dim = draw(st.integers(1, 40)), draw(st.integers(1, 33))
    rows = draw(st.integers(1, length))
    dtype, seed = draw(st.sampled_from(FLOATS)), draw(SEED)
    q = normal((batch, groups * group, rows, dim), seed, dtype, gain=1.5)
    k = normal((batch, groups, length, dim), seed + 1, dtype, gain=1.5)
    if draw(st.booleans()):
        q, k = in_buffer(q, (0, 2, 1, 3)), in_buffer(k, (2, 0, 1, 3))
    return Attention(q, k, draw(token_types(batch, length)), 1 / math.sqrt(dim)), draw(st.booleans())


def on(case: Attention, device: str) -> Attention:
    return (
        case if device == "cpu" else Attention(case.q.to(device), case.k.to(device), case.types.to(device), case.scale)
    )


@given(drawn=attention_cases(), max_query=st.integers(0, 20))
def test_scores(backend, drawn, max_query):
    case, with_lse = on(drawn[0], backend.device), drawn[1]
    lse = case.lse() if with_lse else None
    total, peak = case.oracle_scores(lse)
    got = backend.text_vision_scores(*case.arguments, lse=lse)
    assert_probabilities(got.total, total, "total")
    assert_probabilities(got.peak, peak, "peak")
    rows = backend.text_vision_attention(*case.arguments, max_query, lse=lse)
    numbers = f64(case.q), f64(case.k), case.types.cpu().numpy(), case.scale, max_query
    assert_probabilities(rows, oracle.text_vision_attention(*numbers, None if lse is None else f64(lse)), "map")


@given(drawn=attention_cases(), data=st.data())
def test_fused_dual(backend, drawn, data):
    case = on(drawn[0], backend.device)
    total, peak = case.oracle_scores()
    types = case.types.cpu().numpy()
    g, i = data.draw(st.floats(0, 0.3)), data.draw(st.floats(0, 0.3))
    multiple = data.draw(st.integers(1, 9))
    got = backend.dual_attention_select(*case.arguments, g, i)
    want = oracle.select_dual(total, peak, types, g, i)
    near, differ = set(), set()
    for b in range(len(total)):
        limit = float(np.float32(g)) * total[b].sum()
        for j in np.flatnonzero(types[b] == VISION):
            # Without query rows, or with a threshold of zero, both sides are exactly zero: not near.
            if 0 < relative_gap(total[b, j], limit) < NEAR or 0 < relative_gap(peak[b, j], float(np.float32(i))) < NEAR:
                near.add((b, int(j)))
        kept = got.keep[b, : int(got.counts[b])].tolist()
        differ |= {(b, j) for j in set(kept) ^ set(want[b])}
    assert_only_near(differ, near, int((types == VISION).sum()))
    fused = backend.dual_attention_select(*case.arguments, g, i, drop_multiple=multiple)
    separate = backend.select_dual(got.total, got.peak, case.types, g, i, drop_multiple=multiple)
    assert torch.equal(fused.keep, separate.keep)
    assert torch.equal(fused.counts, separate.counts)
    dropped = (case.types != 0).sum(1) - fused.counts
    assert not (dropped % multiple).any()


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 3e38, math.inf, -math.inf, math.nan]


@given(data=st.data(), dtype=st.sampled_from(FLOATS))
def test_topk(backend, data, dtype):
    """Comparisons only: exact for any values."""
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 60))
    numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(width=16), st.integers(-3, 3).map(float))
    row = st.lists(numbers, min_size=length, max_size=length)
    scores = torch.tensor([data.draw(row) for _ in range(batch)]).to(dtype).to(backend.device)
    types = data.draw(token_types(batch, length)).to(backend.device)
    protected = None
    if data.draw(st.booleans()):
        protected = (torch.rand(batch, length, generator=generator(data.draw(SEED))) < 0.3).to(backend.device)
    budgets = None
    if data.draw(st.booleans()):
        budgets = torch.tensor(
            data.draw(st.lists(st.integers(-2, 70), min_size=batch, max_size=batch)), dtype=torch.int32
        )
        budgets = budgets.to(backend.device)
    check_topk(
        backend,
        scores,
        types,
        data.draw(st.integers(0, 70)),
        budgets=budgets,
        protected=protected,
        capacity=data.draw(st.one_of(st.none(), st.integers(0, 70))),
        drop_multiple=data.draw(st.integers(1, 20)),
    )


@given(data=st.data(), dtype=st.sampled_from(FLOATS))
def test_dual(backend, data, dtype):
    """Small integers and dyadic thresholds: every product is exact, ties included."""
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 50))
    total, peak = (
        torch.randint(0, 9, (batch, length), generator=generator(data.draw(SEED))).to(dtype).to(backend.device)
        for _ in range(2)
    )
    types = data.draw(token_types(batch, length)).to(backend.device)
    thresholds = data.draw(st.integers(0, 64)) / 256, float(data.draw(st.integers(0, 10)))
    protected = (torch.rand(batch, length, generator=generator(data.draw(SEED))) < 0.2).to(backend.device)
    multiple, capacity = data.draw(st.integers(1, 20)), data.draw(st.one_of(st.none(), st.integers(0, 60)))
    got = backend.select_dual(
        total, peak, types, *thresholds, protected=protected, capacity=capacity, drop_multiple=multiple
    )
    want = oracle.select_dual(
        f64(total), f64(peak), types.cpu().numpy(), *thresholds, protected.cpu().numpy(), multiple
    )
    compare(got, want, length if capacity is None else capacity, total)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 5), st.integers(0, 9)),
    capacity=st.integers(0, 40),
    dtype=st.sampled_from([torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
    seed=SEED,
    align_end=st.booleans(),
    as_view=st.booleans(),
)
def test_gather(backend, shape, capacity, dtype, seed, align_end, as_view):
    """Any indices, any counts."""
    x = random_bits(shape, seed, dtype, backend.device)
    keep = torch.randint(-2, shape[1] + 2, (shape[0], capacity), generator=generator(seed + 1))
    counts = torch.randint(-3, capacity + 5, (shape[0],), generator=generator(seed + 2), dtype=torch.int32)
    x = in_buffer(x, (1, 0, 2, 3)) if as_view else x
    check_gather(backend, x, keep.to(backend.device), counts.to(backend.device), align_end)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 70),
    dim=st.integers(1, 40),
    layers=st.integers(1, 3),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
    order=st.permutations([0, 1, 2]),
    forms=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=SEED,
)
def test_compact(backend, batch, heads, length, dim, layers, dtype, order, forms, seed):
    per_layer, per_head, align_end = forms
    keys, values = caches(layers, (batch, heads, length, dim), dtype, backend.device, seed, (*order, 3))
    lead = (batch, heads) if per_head else (batch,)
    keeps, counts = [], []
    for i in range(layers if per_layer else 1):
        g = generator(seed + i)
        capacity = int(torch.randint(0, length + 4, (1,), generator=g))
        keep = torch.full((*lead, capacity), -1, dtype=torch.int64)
        count = torch.zeros(lead, dtype=torch.int32)
        for place in np.ndindex(*lead):
            n = int(torch.randint(0, min(capacity, length) + 1, (1,), generator=g))
            keep[place][:n] = torch.randperm(length, generator=g)[:n].sort().values
            count[place] = n
        keeps.append(keep.to(backend.device))
        counts.append(count.to(backend.device))
    check_compact(backend, keys, values, keeps, counts, align_end)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    slots=st.integers(1, 9),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    share=st.floats(0, 1),
    forms=st.tuples(st.booleans(), st.booleans()),
    seed=SEED,
)
def test_compact_paged(backend, lengths, slots, heads, dims, layout, share, forms, seed):
    per_head, align_end = forms
    p = pool(lengths, slots, heads, dims, device=backend.device, layout=layout, seed=seed)
    lead = (len(lengths), heads) if per_head else (len(lengths),)
    keep, counts = chosen(p, lead, share, seed)
    check_compact_paged(backend, p, [keep], [counts], align_end)


@given(drawn=attention_cases(), slots=st.integers(1, 5), seed=SEED)
def test_dense_varlen_and_paged_agree(backend, drawn, slots, seed):
    """Packed and paged forms of the same sequences give the results of the dense form."""
    case = on(drawn[0], backend.device)
    batch, heads, rows, dim = case.q.shape
    length = case.types.shape[1]
    total, peak = case.oracle_scores()
    device = backend.device
    q = case.q.transpose(1, 2).reshape(-1, heads, dim)
    k = case.k.transpose(1, 2).reshape(batch * length, -1, dim)
    cu_q = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
    cu_k = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    flat = backend.text_vision_scores_varlen(q, k, case.types.reshape(-1), cu_q, cu_k, rows, length, case.scale)
    assert_probabilities(flat.total.view(batch, length), total, "packed total")
    assert_probabilities(flat.peak.view(batch, length), peak, "packed peak")
    blocks = -(-length // slots)
    table = torch.randperm(batch * blocks, generator=generator(seed)).view(batch, blocks)
    cache = torch.full((batch * blocks, slots, *k.shape[1:]), math.nan, dtype=k.dtype, device=device)
    positions = torch.arange(length)
    cache[table[:, positions // slots].to(device), (positions % slots).to(device)] = k.view(batch, length, *k.shape[1:])
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    pages = backend.text_vision_scores_paged(
        q, cache, table.int().to(device), lengths, case.types, cu_q, rows, case.scale
    )
    assert_probabilities(pages.total, total, "paged total")
    assert_probabilities(pages.peak, peak, "paged peak")


@given(data=st.data(), seed=SEED)
def test_compact_is_gather_in_place(backend, data, seed):
    """The first slots after compaction equal the result of gather_tokens."""
    batch, heads, length, dim = (data.draw(st.integers(1, n)) for n in (3, 3, 40, 20))
    cache = random_bits((batch, heads, length, dim), seed, torch.float16, backend.device)
    types = data.draw(token_types(batch, length)).to(backend.device)
    scores = torch.randn(batch, length, generator=generator(seed)).to(backend.device)
    keep, counts = backend.select_topk(scores, types, data.draw(st.integers(0, length)))
    copied = backend.gather_tokens(cache.transpose(1, 2), keep, counts)
    before = Watch(copied)
    backend.compact_kv_([cache], [cache.clone()], [keep], [counts])
    for b, n in enumerate(counts.tolist()):
        assert (as_bytes(cache[b, :, :n].transpose(0, 1)) == as_bytes(copied[b, :n])).all()
    assert before.nothing_changed()
