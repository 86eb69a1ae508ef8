# SPDX-License-Identifier: Apache-2.0
"""spatial_merge against the float64 oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from . import oracle
from .cases import Watch, dtype_id, f64, in_buffer, normal, pictures, same_bits
from .changes import DOUBLE, HALF, INT, set_to, to_shape, with_gaps
from .tolerance import assert_rounded_once


def check(backend, x, grid, window, **options) -> oracle.Merge:
    """Run the op, compare all results, and return the oracle's."""
    sizes = options.get("sizes")
    watch = Watch(x, sizes)
    got = backend.spatial_merge(x, grid, window, **options)
    assert watch.nothing_changed()
    numbers = {**options, "sizes": None if sizes is None else f64(sizes)}
    want = oracle.spatial_merge(f64(x), grid, window, **numbers)
    tokens, counts, assignment, out_sizes = got

    assert tokens.dtype == x.dtype
    assert (counts.dtype, assignment.dtype, out_sizes.dtype) == (torch.int32, torch.int64, torch.float32)
    assert all(t.device == x.device for t in got)
    assert tuple(tokens.shape) == want.tokens.shape
    assert counts.cpu().tolist() == want.counts.tolist()
    assert assignment.cpu().tolist() == want.assignment.tolist()
    np.testing.assert_allclose(f64(out_sizes), want.sizes, rtol=1e-6, atol=0)
    check_rows(tokens, x, want, None if sizes is None else f64(sizes))
    return want


def check_rows(tokens, x, want: oracle.Merge, sizes) -> None:
    """Unmerged rows bit for bit, merged rows rounded once, zero past the counts."""
    length = x.shape[1]
    weight = np.ones((len(x), length)) if sizes is None else sizes
    for b in range(len(x)):
        row = want.assignment[b]
        alone = np.bincount(row, minlength=tokens.shape[1])[row] == 1
        kept = torch.from_numpy(np.flatnonzero(alone)).to(x.device)
        target = torch.from_numpy(row[alone]).to(x.device)
        assert same_bits(tokens[b, target], x[b, kept])
        merged = np.unique(row[~alone])
        absolute = np.abs(f64(x[b]))
        size = np.array([weight[b, row == m].sum() for m in merged]).reshape(-1, 1)
        magnitude = [(weight[b, row == m, None] * absolute[row == m]).sum(0) for m in merged]
        magnitude = np.array(magnitude).reshape(len(merged), x.shape[2]) / np.maximum(size, 1e-30)
        assert_rounded_once(tokens[b, merged], want.tokens[b, merged], magnitude, "tokens")
        assert not f64(tokens[b, int(want.counts[b]) :]).any(), "tokens past counts must be zero"


@pytest.mark.parametrize("merged_first", [False, True])
@pytest.mark.parametrize("mode", ["threshold", "uniform", "budget"])
def test_modes(backend, dtype, merged_first, mode):
    x = pictures(3, [6, 9], [3, 3], 20, dtype=dtype, device=backend.device)
    options = {"uniform": {"uniform": True}, "budget": {"budget": 3}, "threshold": {}}[mode]
    want = check(backend, x, [6, 9], [3, 3], merged_first=merged_first, **options)
    assert any(want.merged), "the case must merge something"
    assert not all(len(m) == 6 for m in want.merged), "and not everything"


@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ([1, 1], [1, 1]),
        ([1, 1], [3, 3]),
        ([1, 2], [1, 2]),
        ([5, 7], [2, 3]),
        ([7, 7], [3, 3]),
        ([4, 4], [1, 1]),
        ([2, 3], [5, 5]),
        ([5, 4], [1, 4]),
        ([2, 4, 6], [2, 2, 2]),
        ([3, 5, 4], [2, 2, 3]),
        ([1, 6, 6], [1, 3, 3]),
        ([4, 2, 2], [4, 1, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("uniform", [False, True])
def test_grids(backend, grid, window, uniform):
    x = pictures(2, grid, window, 12, seed=3, device=backend.device)
    check(backend, x, grid, window, uniform=uniform)
    check(backend, x, grid, window, uniform=uniform, merged_first=True)


@pytest.mark.parametrize("grid_and_window", [([6, 6], [3, 3]), ([2, 4, 4], [2, 2, 2])], ids=str)
@pytest.mark.parametrize("budget", [0, 1, 2, 4])
def test_budget(backend, grid_and_window, budget):
    grid, window = grid_and_window
    x = pictures(2, grid, window, 8, seed=5, device=backend.device)
    want = check(backend, x, grid, window, budget=budget, threshold=2.0)
    assert want.tokens.shape[1] == x.shape[1] - budget * (math.prod(window) - 1) == want.counts[0]


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("merged_first", [False, True])
def test_prefix_tokens(backend, prefix, merged_first):
    x = pictures(2, [4, 6], [2, 3], 10, prefix=prefix, device=backend.device)
    check(backend, x, [4, 6], [2, 3], num_prefix_tokens=prefix, merged_first=merged_first)


@pytest.mark.parametrize("channels", [1, 2, 7, 33, 64, 129, 1024])
def test_channels(backend, channels, dtype):
    # One channel has cosines of 1 and -1 only: many windows tie, and the lower index wins.
    if channels == 1:
        x = normal((2, 1 + 24, 1), 4, dtype, backend.device)
        check(backend, x, [4, 6], [1, 2], threshold=0.5)
        return
    x = pictures(2, [4, 6], [2, 2], channels, dtype=dtype, device=backend.device)
    check(backend, x, [4, 6], [2, 2])


def test_clip_size(backend, dtype):
    x = pictures(1, [24, 24], [3, 3], 48, seed=1, dtype=dtype, device=backend.device)
    want = check(backend, x, [24, 24], [3, 3])
    assert 20 < len(want.merged[0]) < 60


@pytest.mark.parametrize("window", [[5, 100], [500, 700]], ids=str)
@pytest.mark.parametrize("uniform", [False, True])
def test_windows_larger_than_the_grid(backend, window, uniform):
    """They are cut at the border; no memory is allocated beyond the grid."""
    x = pictures(2, [5, 4], [5, 4], 8, device=backend.device)
    check(backend, x, [5, 4], window, uniform=uniform, threshold=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("mode", [{}, {"uniform": True}, {"budget": 40}], ids=str)
def test_clip_large(backend, batch, mode, dtype):
    x = pictures(batch, [24, 24], [3, 3], 1024, seed=2, dtype=dtype, device=backend.device)
    check(backend, x, [24, 24], [3, 3], **mode)
    check(backend, x, [24, 24], [3, 3], merged_first=True, **mode)


@pytest.mark.parametrize("channels", [1023, 1024])
@pytest.mark.parametrize("budget", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_batch_equals_single_images(backend, channels, budget, dtype):
    """The same bits, also if the result exceeds the CPU caches and is written with streaming stores."""
    if backend.name not in ("cpu", "cuda"):
        pytest.skip("large")
    one = pictures(1, [24, 24], [3, 3], channels, seed=2, dtype=dtype, device=backend.device)
    x = torch.cat([one * 2.0**i for i in range(10)])  # the similarities are unchanged
    whole = backend.spatial_merge(x, [24, 24], [3, 3], budget=budget)
    assert whole[0].nbytes > 8 << 20
    for b in range(len(x)):
        single = backend.spatial_merge(x[b : b + 1], [24, 24], [3, 3], budget=budget)
        for of_batch, alone in zip(whole, single, strict=True):
            assert same_bits(of_batch[b : b + 1], alone)


@pytest.mark.parametrize("mode", [{}, {"uniform": True}, {"budget": 2}], ids=str)
def test_sizes(backend, dtype, mode):
    x = pictures(2, [4, 6], [2, 2], 16, dtype=dtype, device=backend.device)
    sizes = torch.randint(1, 10, x.shape[:2], generator=torch.Generator().manual_seed(2)).float()
    sizes[0, 5] = 0.0
    sizes[:, 0] = 3.0  # the prefix has sizes too
    check(backend, x, [4, 6], [2, 2], sizes=sizes.to(backend.device), **mode)


def test_sizes_chain(backend):
    """Repeated merging gives the mean over the original tokens, in any order of merging."""
    x = normal((1, 16, 6), 1, device=backend.device)
    tokens, counts, _, sizes = backend.spatial_merge(x, [4, 4], [2, 2], -1.0, num_prefix_tokens=0)
    assert counts.tolist() == [4]
    rest = backend.spatial_merge(
        tokens[:, :4], [2, 2], [2, 2], -1.0, num_prefix_tokens=0, sizes=sizes[:, :4].contiguous()
    )
    torch.testing.assert_close(rest.tokens[0, 0].cpu(), x[0].mean(0).cpu(), rtol=1e-5, atol=1e-6)
    assert rest.sizes[0].tolist() == [16.0, 0.0, 0.0, 0.0]


def test_all_sizes_zero(backend):
    """The quotient of a window of size zero follows IEEE; its neighbors are unaffected."""
    x = pictures(1, [2, 4], [2, 2], 6, prefix=0, device=backend.device)
    sizes = torch.tensor([[0.0, 0.0, 1, 1, 0.0, 0.0, 1, 1]], device=backend.device)
    tokens, counts, assignment, out_sizes = backend.spatial_merge(
        x, [2, 4], [2, 2], -1.0, num_prefix_tokens=0, sizes=sizes
    )
    assert counts.tolist() == [2]
    assert assignment.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]
    assert out_sizes[0, :2].tolist() == [0.0, 4.0]
    assert tokens[0, 0].isnan().all()
    torch.testing.assert_close(tokens[0, 1], x[0, [2, 3, 6, 7]].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [{}, {"uniform": True}, {"budget": 0}, {"budget": 6}], ids=str)
@pytest.mark.parametrize("merged_first", [False, True])
def test_identical_windows_tie(backend, mode, merged_first):
    """Identical windows of similarity 1: ties go to the lower index."""
    x = normal((1, 1, 8), 3, device=backend.device).expand(2, 1 + 24, 8).contiguous()
    check(backend, x, [4, 6], [2, 2], merged_first=merged_first, threshold=0.99, **mode)
    if "budget" not in mode:
        check(backend, x, [4, 6], [2, 2], merged_first=merged_first, threshold=1.01, **mode)


@pytest.mark.parametrize("merged_first", [False, True])
def test_exact_ties_at_the_budget(backend, merged_first):
    """Copies of one window tie exactly; a budget that splits them merges those with the lower indices."""
    x = pictures(1, [4, 8], [2, 2], 8, prefix=0, seed=4, device=backend.device)
    members, _ = oracle.window_members([4, 8], [2, 2])
    best = int(np.argmax(oracle.spatial_merge(f64(x), [4, 8], [2, 2], num_prefix_tokens=0).similarity[0]))
    for w in (1, 3, 6, 7):
        x[0, members[w]] = x[0, members[best]]
    for budget in (1, 2, 3, 4):
        check(backend, x, [4, 8], [2, 2], budget=budget, num_prefix_tokens=0, merged_first=merged_first)


def test_threshold_is_inclusive(backend):
    """Similarity exactly 0 (orthogonal pairs) and exactly 1 (equal unit vectors) merge at thresholds 0 and 1, and at
    those that float32 rounds to 0 and 1."""
    axis = torch.eye(4, device=backend.device)
    orthogonal = torch.stack([axis[0], axis[1], axis[2], axis[2]])[None]  # two windows of [1, 2]
    for threshold, merged in ((0.0, 2), (1e-60, 2), (1e-3, 1), (1.0, 1), (1 + 1e-9, 1), (1.001, 0)):
        got = backend.spatial_merge(orthogonal, [1, 4], [1, 2], threshold, num_prefix_tokens=0)
        assert got.counts.tolist() == [4 - merged], threshold


@pytest.mark.parametrize("mode", [{}, {"uniform": True}, {"budget": 5}], ids=str)
@pytest.mark.parametrize("merged_first", [False, True])
def test_zero_vectors(backend, mode, merged_first):
    """A zero vector has cosine 0 with every vector, so that the similarity of its window stays defined."""
    x = pictures(2, [4, 6], [2, 2], 8, seed=6, device=backend.device)
    x[0, 1] = 0
    x[1, [1, 2, 7, 8]] = 0  # one whole window
    want = check(backend, x, [4, 6], [2, 2], merged_first=merged_first, **mode)
    assert want.similarity[1, 0] == 0
    check(backend, torch.zeros_like(x), [4, 6], [2, 2], merged_first=merged_first, **mode)


def test_tiny_and_huge_vectors(backend):
    """Norms have no effect down to 1e-8, where they are clamped."""
    x = pictures(1, [4, 6], [2, 2], 8, seed=7, device=backend.device)
    check(backend, x * 1e-4, [4, 6], [2, 2])
    check(backend, x * 1e6, [4, 6], [2, 2])
    tiny = torch.full((1, 4, 4), 1e-10, device=backend.device)
    got = backend.spatial_merge(tiny, [2, 2], [2, 2], 0.01, num_prefix_tokens=0)
    assert got.counts.tolist() == [4], "vectors below 1e-8 are not similar"


@pytest.mark.parametrize("where", [1, 9, 24])
def test_nan_never_merges_by_threshold(backend, where):
    x = pictures(1, [4, 6], [2, 2], 8, seed=8, device=backend.device)
    x[0, where, 3] = math.nan
    got = backend.spatial_merge(x, [4, 6], [2, 2], -2.0)
    assert got.counts.tolist() == [25 - 3 * 5], "five of six windows merge"
    row = int(got.assignment[0, where])
    assert (got.assignment[0] == row).sum() == 1
    assert same_bits(got.tokens[0, row], x[0, where])
    assert int(got.tokens.isnan().sum()) == 1


@pytest.mark.parametrize("merged_first", [False, True])
def test_nan_ranks_lowest(backend, merged_first):
    x = pictures(2, [4, 6], [2, 2], 8, seed=8, device=backend.device)
    x[0, 1] = math.nan
    got = backend.spatial_merge(x, [4, 6], [2, 2], budget=5, merged_first=merged_first)
    assert len(set(got.assignment[0, [1, 2, 7, 8]].tolist())) == 4, "the window with NaN does not merge"
    everything = backend.spatial_merge(x, [4, 6], [2, 2], budget=6, merged_first=merged_first)
    row = int(everything.assignment[0, 1])
    assert everything.tokens[0, row].isnan().all()
    assert row == (6 if merged_first else 1)
    uniform = backend.spatial_merge(x, [4, 6], [2, 2], -2.0, uniform=True, merged_first=merged_first)
    assert uniform.counts.tolist() == [25 - 15, 25 - 15], "a window with NaN does not count"


def test_uniform_takes_the_smallest_count(backend):
    x = pictures(3, [6, 6], [3, 3], 8, seed=9, device=backend.device)
    x[1] = normal((37, 8), 5, device=backend.device)  # no similar windows in one image: none merge in the others
    want = check(backend, x, [6, 6], [3, 3], uniform=True)
    assert want.counts.tolist() == [37, 37, 37]


def test_cut_windows(backend):
    """Smaller windows at the border merge by threshold, not with `uniform`."""
    x = torch.ones(1, 25, 4, device=backend.device)
    by_threshold = backend.spatial_merge(x, [5, 5], [2, 2], num_prefix_tokens=0)
    assert by_threshold.counts.tolist() == [9], "four whole windows, four cut ones, one corner of one token"
    assert by_threshold.sizes[0, :9].tolist() == [4, 4, 2, 4, 4, 2, 2, 2, 1]
    uniform = backend.spatial_merge(x, [5, 5], [2, 2], num_prefix_tokens=0, uniform=True)
    assert uniform.counts.tolist() == [25 - 4 * 3]


@pytest.mark.parametrize("patch", [0, 12, 24])
@pytest.mark.parametrize("uniform", [False, True])
def test_nan_with_cut_windows(backend, patch, uniform):
    """A NaN affects only its own window."""
    x = torch.ones(2, 25, 4, device=backend.device)
    x[0, patch, 1] = math.nan
    check(backend, x, [5, 5], [2, 2], num_prefix_tokens=0, uniform=uniform)


@pytest.mark.parametrize("mode", [{}, {"uniform": True}, {"budget": 0}], ids=str)
def test_empty(backend, mode):
    for batch, prefix, grid in ((0, 1, [4, 6]), (2, 1, [0, 4]), (2, 0, [0, 0]), (0, 0, [2, 2, 2])):
        x = normal((batch, prefix + math.prod(grid), 8), 1, device=backend.device)
        check(backend, x, grid, [2] * len(grid), num_prefix_tokens=prefix, **mode)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)], ids=str)
def test_views(backend, dtype, order):
    x = pictures(2, [4, 6], [2, 2], 15, dtype=dtype, device=backend.device)
    sizes = torch.rand(2, 25, generator=torch.Generator().manual_seed(1)).to(backend.device) + 0.5
    check(backend, in_buffer(x, order), [4, 6], [2, 2], sizes=in_buffer(sizes))
    check(backend, x[:1].expand(3, -1, -1), [4, 6], [2, 2], sizes=sizes[:1].expand(3, -1))


def test_result_is_no_view(backend):
    x = normal((1, 5, 4), 1, device=backend.device)
    got = backend.spatial_merge(x, [2, 2], [2, 2], 2.0)
    assert got.tokens.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    sizes = torch.ones(1, 5, device=backend.device)
    got = backend.spatial_merge(x, [2, 2], [2, 2], 2.0, sizes=sizes)
    assert got.sizes.untyped_storage().data_ptr() != sizes.untyped_storage().data_ptr()


@pytest.mark.parametrize("mode", [{}, {"uniform": True}, {"budget": 9}], ids=str)
def test_same_bits_every_run(backend, check_same_bits, dtype, mode):
    x = pictures(3, [12, 12], [3, 3], 64, seed=3, dtype=dtype, device=backend.device)
    check_same_bits(lambda: backend.spatial_merge(x, [12, 12], [3, 3], **mode))


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "spatial_merge": {
        "x": {
            "rank 2": to_shape(25, 8),
            "rank 4": to_shape(2, 1, 25, 8),
            "integers": INT,
            "float64": DOUBLE,
            "one token too few": to_shape(2, 24, 8),
            "one token too many": to_shape(2, 26, 8),
            "last dimension with gaps": with_gaps,
        },
        "grid": {
            "empty": set_to([]),
            "one entry": set_to([24]),
            "four entries": set_to([1, 1, 4, 6]),
            "negative": set_to([-4, -6]),
        },
        "window": {
            "empty": set_to([]),
            "one entry": set_to([2]),
            "three entries for two": set_to([1, 2, 2]),
            "zero": set_to([0, 2]),
            "negative": set_to([2, -2]),
        },
        "num_prefix_tokens": {"negative": set_to(-1)},
        "sizes": {
            "rank 1": to_shape(25),
            "another length": to_shape(2, 24),
            "another batch": to_shape(1, 25),
            "float16": HALF,
            "float64": DOUBLE,
            "last dimension with gaps": with_gaps,
        },
        "budget": {"negative": set_to(-1), "above the number of windows": set_to(7)},
    },
}
REFUSED_TOGETHER = [
    ("spatial_merge", "uniform", {"budget": 1, "uniform": True}),
    ("spatial_merge", "window", {"budget": 1, "window": [3, 3]}),
    ("spatial_merge", "window", {"budget": 0, "window": [2, 4]}),
    ("spatial_merge", "budget", {"budget": 1, "window": [1, 1]}),
    ("spatial_merge", "x", {"grid": [4, 5]}),
    ("spatial_merge", "x", {"num_prefix_tokens": 2}),
]
