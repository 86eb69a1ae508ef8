# SPDX-License-Identifier: Apache-2.0
"""text_vision_scores and text_vision_attention, dense, against the float64 oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from . import oracle
from .cases import (
    PADDING,
    QUERY,
    TEXT,
    VISION,
    Attention,
    Watch,
    attention,
    f64,
    in_buffer,
    prompt,
    same_bits,
    types_tensor,
)
from .changes import DENSE, set_to
from .tolerance import assert_probabilities, assert_scores


def check(backend, case: Attention, lse=None) -> tuple[np.ndarray, np.ndarray]:
    watch = Watch(case.q, case.k, case.types, lse)
    got = backend.text_vision_scores(*case.arguments, lse=lse)
    assert watch.nothing_changed()
    total, peak = case.oracle_scores(lse)
    assert_scores(got, total, peak)
    assert got.total.device == got.peak.device == case.q.device
    return total, peak


def query_rows(case: Attention) -> int:
    """Maximum number of query rows of a sequence within the rows of q."""
    rows = case.q.shape[2]
    return int((case.types[:, case.types.shape[1] - rows :] == QUERY).sum(1).max()) if len(case.q) else 0


@pytest.mark.parametrize(
    ("heads", "length", "dim"),
    [
        ((1, 1), 2, 1),
        ((2, 1), 3, 7),
        ((4, 1), 63, 64),
        ((4, 4), 65, 80),
        ((7, 1), 40, 128),
        ((14, 2), 33, 32),
        ((4, 2), 130, 256),
    ],
)
def test_shapes(backend, heads, length, dim, dtype, with_lse):
    case = attention(2, heads, None, length, dim, dtype=dtype, device=backend.device, seed=length)
    total, _ = check(backend, case, case.lse() if with_lse else None)
    assert (total > 0).any()


def test_llava_size(backend, dtype):
    types = [prompt(671, queries=60, images=1)]
    case = attention(1, (4, 4), None, 671, 128, dtype=dtype, device=backend.device, types=types)
    check(backend, case)
    check(backend, case, case.lse())


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(8, 8), (28, 4)])
def test_long(backend, dtype, heads):
    types = [prompt(2980, queries=100, images=3)]
    case = attention(1, heads, 300, 2980, 128, dtype=dtype, device=backend.device, types=types)
    check(backend, case)
    check(backend, case, case.lse())


@pytest.mark.slow
def test_many_query_rows(backend):
    """More query rows than fit into any tile."""
    types = [prompt(700, queries=400), prompt(700, queries=129, pad=50, side="right")]
    case = attention(2, (4, 2), None, 700, 64, device=backend.device, types=types)
    check(backend, case)
    check(backend, case, case.lse())


@pytest.mark.parametrize("layout", ["window", "blhd"])
def test_views(backend, dtype, layout):
    """The values around every view are NaN, so that reading one shows in the result."""
    case = attention(2, (4, 2), 15, 20, 24, dtype=dtype, device=backend.device, layout=layout)
    check(backend, case)
    check(backend, case, in_buffer(case.lse(), (2, 0, 1)))


def test_views_of_one_projection(backend):
    """q and k as slices of one packed [B, L, Hq + 2 Hk, D] projection; an expanded batch."""
    qkv = torch.randn(2, 18, 8, 16, generator=torch.Generator().manual_seed(1)).to(backend.device)
    types = types_tensor([prompt(18), prompt(18, pad=4)], backend.device)
    q, k = qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:6].transpose(1, 2)
    check(backend, Attention(q, k, types, 0.25))
    check(backend, Attention(q[:1].expand(3, -1, -1, -1), k[:1].expand(3, -1, -1, -1), types[:1].expand(3, -1), 0.25))


def test_head_dim_one_with_any_stride(backend):
    """A last dimension of one element is contiguous with any stride."""
    case = attention(1, (2, 2), None, 9, 1, device=backend.device)
    q = torch.empty_strided(case.q.shape, (99, 33, 3, 7), device=backend.device).copy_(case.q)
    k = torch.empty_strided(case.k.shape, (99, 1, 5, 13), device=backend.device).copy_(case.k)
    check(backend, Attention(q, k, case.types, 1.0))


@pytest.mark.parametrize("rows", [1, 2, 9, 23])
def test_last_rows_only(backend, rows, with_lse):
    """Lq < Lk: the position of row i is Lk - Lq + i, and query rows before q are ignored."""
    types = [prompt(24, images=2, queries=4), prompt(24, queries=20), prompt(24, queries=3, pad=2, side="right")]
    case = attention(3, (4, 2), rows, 24, 16, device=backend.device, types=types)
    check(backend, case, case.lse() if with_lse else None)


def test_no_rows(backend):
    case = attention(2, (4, 2), 0, 12, 16, device=backend.device)
    total, peak = check(backend, case)
    assert not total.any()
    assert not peak.any()


@pytest.mark.parametrize("pieces", [[24], [10, 14], [1] * 24, [7, 16, 1]], ids=str)
def test_scoring_in_parts(backend, pieces):
    """A prompt in chunks: totals add, peaks take the maximum."""
    types = [prompt(24, images=2, queries=6), prompt(24, pad=5, queries=3)]
    whole = attention(2, (4, 2), None, 24, 16, device=backend.device, types=types)
    total, peak = torch.zeros(2, 24, device=backend.device), torch.zeros(2, 24, device=backend.device)
    end = 0
    for piece in pieces:
        start, end = end, end + piece
        part = backend.text_vision_scores(
            whole.q[:, :, start:end], whole.k[:, :, :end], whole.types[:, :end], whole.scale
        )
        total[:, :end] += part.total
        peak[:, :end] = torch.maximum(peak[:, :end], part.peak)
    want_total, want_peak = whole.oracle_scores()
    assert_probabilities(total, want_total, "total of the parts")
    assert_probabilities(peak, want_peak, "peak of the parts")


ODD_TYPES = {
    "one query": [QUERY],
    "one vision": [VISION],
    "one padding": [PADDING],
    "all vision": [VISION] * 9,
    "all query": [QUERY] * 9,
    "all padding": [PADDING] * 9,
    "all text": [TEXT] * 9,
    "vision after the queries": [TEXT, QUERY, QUERY, VISION, VISION, VISION, TEXT],
    "query between": [VISION, VISION, QUERY, VISION, VISION, QUERY, VISION],
    "padding inside": [TEXT, VISION, PADDING, VISION, QUERY, PADDING, VISION, QUERY],
    "padding both sides": [PADDING, PADDING, VISION, VISION, QUERY, QUERY, PADDING],
    "query first": [QUERY, VISION, VISION, QUERY],
    "unknown types are text": [4, VISION, 255, VISION, QUERY, 128, 77],
    "last token as query": [TEXT, VISION, VISION, VISION, TEXT, TEXT, QUERY],
}


@pytest.mark.parametrize("name", ODD_TYPES)
def test_token_types(backend, name, with_lse):
    types = ODD_TYPES[name]
    case = attention(1, (4, 2), None, len(types), 8, device=backend.device, types=[types])
    total, peak = check(backend, case, case.lse() if with_lse else None)
    if VISION not in types or QUERY not in types:
        assert not total.any()
        assert not peak.any()


def test_batch_rows_are_independent(backend):
    """Different token types per sequence, one of them without query rows and one without vision."""
    types = [prompt(20), [TEXT] * 20, [VISION] * 20, [PADDING] * 20, prompt(20, images=3, pad=6, side="right")]
    check(backend, attention(5, (4, 2), None, 20, 16, device=backend.device, types=types))


def test_empty(backend):
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        case = attention(batch, (4, 2), None, length, 8, device=backend.device, types=[[QUERY] * length] * batch)
        check(backend, case)
        check(backend, case, torch.zeros(batch, 4, length, device=backend.device))


@pytest.mark.parametrize("scale", [0.0, -0.6, 2.5])
def test_scales(backend, scale):
    case = attention(1, (2, 1), None, 20, 16, device=backend.device, gain=0.7)
    check(backend, Attention(case.q, case.k, case.types, scale))


def test_sharp_attention(backend):
    """Scores far beyond exp's range: one column gets all of the attention."""
    case = attention(2, (4, 2), None, 30, 16, device=backend.device, gain=60.0)
    got = backend.text_vision_scores(*case.arguments)
    assert got.total.isfinite().all()
    assert got.peak.isfinite().all()
    assert float(got.peak.max()) <= 1 + 1e-6
    total, _ = case.oracle_scores()
    # Scores of thousands have an error of a few 1e-4: compare loosely, and exactly where the margin is large.
    np.testing.assert_allclose(f64(got.total), total, rtol=5e-3, atol=5e-3)


def test_equal_scores(backend):
    """q = 0: uniform attention over the visible keys."""
    case = attention(1, (4, 2), None, 16, 8, device=backend.device, types=[prompt(16, queries=1)])
    got = backend.text_vision_scores(torch.zeros_like(case.q), case.k, case.types, case.scale)
    vision = case.types[0] == VISION
    even = torch.full_like(got.total[0, vision], 1 / 16)
    torch.testing.assert_close(got.total[0, vision], even, rtol=1e-6, atol=0)
    assert torch.equal(got.total, got.peak), "one query row: total and peak are the same numbers"


def test_padding_is_not_read(backend):
    """Values in padding, in rows other than query rows and after the last query row have no effect."""
    types = [[PADDING] * 3 + [TEXT, VISION, VISION, TEXT, QUERY, QUERY, VISION, TEXT]]
    case = attention(1, (4, 2), None, 11, 8, device=backend.device, types=types)
    clean = backend.text_vision_scores(*case.arguments)
    case.k[:, :, :3] = math.nan
    case.k[:, :, 9:] = math.nan
    case.q[:, :, :7] = math.nan
    case.q[:, :, 9:] = math.nan
    check(backend, case)
    dirty = backend.text_vision_scores(*case.arguments)
    assert same_bits(clean.total, dirty.total)
    assert same_bits(clean.peak, dirty.peak)


@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_spreads_as_in_the_formula(backend, where):
    """A NaN propagates to all keys visible to its row, and through peak as in amax."""
    types = [[TEXT, VISION, VISION, TEXT, QUERY, VISION, QUERY], prompt(7)]
    case = attention(2, (4, 2), None, 7, 8, device=backend.device, types=types)
    if where == "q":
        case.q[0, 1, 4, 0] = math.nan  # the first query row, which does not attend to the last image token
    else:
        case.k[0, 1, 2, 0] = math.nan
    total, peak = check(backend, case)
    assert np.isnan(total[0, [1, 2]]).all()
    assert np.isnan(peak[0, [1, 2]]).all()
    assert np.isnan(total[0, 5]) == (where == "k")
    assert np.isfinite(total[1]).all()


def test_nan_with_lse(backend):
    """With a given normalizer, a NaN key affects only its own column."""
    case = attention(1, (4, 2), None, 9, 8, device=backend.device, types=[prompt(9, queries=3)])
    lse = case.lse()
    case.k[0, 1, 3, 0] = math.nan
    total, _ = check(backend, case, lse)
    assert np.isnan(total[0]).sum() == 1


def test_minus_infinity(backend):
    """A key with score -inf in every head gets zero; a row of -inf only gives zeros."""
    case = attention(2, (4, 2), None, 12, 8, device=backend.device, types=[prompt(12, queries=3)] * 2)
    case.q[..., 0] = 1.0
    case.k[0, :, 4, 0] = -math.inf
    case.k[1, ..., 0] = -math.inf
    total, peak = check(backend, case)
    assert total[0, 4] == 0
    assert total[0].any()
    assert not total[1].any()
    assert not peak[1].any()


def test_lse_of_minus_infinity(backend):
    """A row with a normalizer of -inf gives zeros; normalizers of rows other than query rows are not used."""
    case = attention(1, (4, 2), None, 12, 8, device=backend.device, types=[prompt(12, queries=3)])
    lse = case.lse().clone()
    lse[:, :, :9] = math.nan
    lse[:, 1, 10] = -math.inf
    check(backend, case, lse)
    lse[:, :, 9:] = -math.inf
    total, _ = check(backend, case, lse.clone())
    assert not total.any()


def test_lse_is_taken_as_given(backend):
    """A given normalizer is not recomputed: a shifted one scales the probabilities."""
    case = attention(1, (4, 2), None, 12, 8, device=backend.device, types=[prompt(12, queries=3)])
    shifted = case.lse() - 1.0
    check(backend, case, shifted)


def test_lse_with_any_strides(backend):
    case = attention(2, (4, 2), 12, 14, 8, device=backend.device)
    lse = case.lse()
    for view in (
        lse.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lse.repeat_interleave(3, dim=2)[..., ::3],
        in_buffer(lse),
    ):
        case._cache.clear()
        check(backend, case, view)
    zero = torch.zeros(1, device=backend.device).expand(2, 4, 12)
    case._cache.clear()
    check(backend, case, zero)


# ---------------------------------------------------------------------------------------------- the map


def check_map(backend, case: Attention, max_query: int, lse=None) -> np.ndarray:
    watch = Watch(case.q, case.k, case.types, lse)
    got = backend.text_vision_attention(*case.arguments, max_query, lse=lse)
    assert watch.nothing_changed()
    want = oracle.text_vision_attention(
        f64(case.q), f64(case.k), case.types.cpu().numpy(), case.scale, max_query, None if lse is None else f64(lse)
    )
    assert_probabilities(got, want, "text_vision_attention")
    return want


@pytest.mark.parametrize(("heads", "length", "dim"), [((2, 1), 3, 7), ((4, 4), 65, 80), ((14, 2), 40, 64)])
@pytest.mark.parametrize("layout", ["plain", "window", "blhd"])
def test_map_shapes(backend, heads, length, dim, dtype, layout):
    case = attention(2, heads, None, length, dim, dtype=dtype, device=backend.device, layout=layout)
    check_map(backend, case, query_rows(case))
    check_map(backend, case, query_rows(case), case.lse())


@pytest.mark.parametrize("max_query", [0, 1, 2, 5, 40])
def test_map_capacity(backend, max_query):
    """Query rows past max_query are left out, unused rows are zero."""
    types = [prompt(20, queries=5), prompt(20, queries=2, images=2), [TEXT] * 20, prompt(20, queries=3, pad=4)]
    case = attention(4, (4, 2), 12, 20, 8, device=backend.device, types=types)
    check_map(backend, case, max_query)


@pytest.mark.parametrize("name", ODD_TYPES)
def test_map_token_types(backend, name):
    types = ODD_TYPES[name]
    check_map(backend, attention(1, (4, 2), None, len(types), 8, device=backend.device, types=[types]), 4)


def test_map_gives_total_and_peak(backend):
    """Sum and maximum over the map's rows are total and peak, also of the average over groups of heads."""
    case = attention(2, (8, 4), None, 40, 16, device=backend.device)
    rows = query_rows(case)
    whole = backend.text_vision_attention(*case.arguments, rows)
    total, peak = case.oracle_scores()
    assert_probabilities(whole.sum(1), total, "sum of the map")
    assert_probabilities(whole.amax(1), peak, "maximum of the map")
    halves = [
        backend.text_vision_attention(
            case.q[:, 4 * r : 4 * r + 4], case.k[:, 2 * r : 2 * r + 2], case.types, case.scale, rows
        )
        for r in range(2)
    ]
    average = (halves[0] + halves[1]) / 2
    assert_probabilities(average.sum(1), total, "sum of the averaged maps")
    assert_probabilities(average.amax(1), peak, "maximum of the averaged maps")


def test_map_empty(backend):
    for batch, length in ((0, 5), (2, 0)):
        case = attention(batch, (4, 2), None, length, 8, device=backend.device, types=[[QUERY] * length] * batch)
        check_map(backend, case, 3)


def test_map_nan(backend):
    types = [[TEXT, VISION, VISION, TEXT, QUERY, VISION, QUERY]]
    case = attention(1, (4, 2), None, 7, 8, device=backend.device, types=types)
    case.q[0, 1, 4, 0] = math.nan
    want = check_map(backend, case, 3)
    assert np.isnan(want[0, 0, 1])
    assert np.isfinite(want[0, 1]).all()


def test_same_bits_every_run(backend, check_same_bits, dtype, with_lse):
    types = [prompt(150, queries=40, images=2), prompt(150, queries=20, pad=11)]
    case = attention(2, (6, 2), None, 150, 64, dtype=dtype, device=backend.device, types=types)
    lse = case.lse() if with_lse else None
    check_same_bits(lambda: backend.text_vision_scores(*case.arguments, lse=lse))
    check_same_bits(lambda: [backend.text_vision_attention(*case.arguments, 40, lse=lse)])


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "text_vision_scores": DENSE,
    "text_vision_attention": {**DENSE, "max_query": {"negative": set_to(-1)}},
}
