# SPDX-License-Identifier: Apache-2.0
"""Paths of the launchers that only large inputs take, on devices of several sizes, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import cuda_emulation
from mustdrop_kernels import TokenType, backends

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

emulated = cuda_emulation.emulated().implementation
reference = backends.registered()["reference"].implementation


@pytest.fixture(params=[80, 90, 120])
def device(request) -> int:
    cuda_emulation.configure(request.param, request.param)
    return request.param


def groups(batch: int, height: int, width: int, channels: int) -> torch.Tensor:
    """Pairs of neighbors in a row with random degrees of similarity."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch, height * width // 2, 1, channels, generator=generator)
    noise = torch.randn(batch, height * width // 2, 2, channels, generator=generator)
    x = base + noise * torch.rand(batch, height * width // 2, 1, 1, generator=generator) * 2
    return x.reshape(batch, height * width, channels)


@pytest.mark.parametrize(
    "options",
    [{}, {"merged_first": True}, {"uniform": True}, {"uniform": True, "merged_first": True}, {"budget": 300}],
    ids=str,
)
def test_more_windows_than_a_block_ranks(device, options):
    x = groups(2, 33, 32, 8)
    asked = {"budget": None, "uniform": False, "num_prefix_tokens": 0, "sizes": None, "merged_first": False} | options
    got = emulated("spatial_merge")(x, [33, 32], [1, 2], 0.8, **asked)
    want = reference("spatial_merge")(x, [33, 32], [1, 2], 0.8, **asked)
    assert 500 < want[1].min() < 1000
    for name, a, b in zip(("tokens", "counts", "assignment", "sizes"), got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


def test_more_patches_than_each_block_assigns(device):
    x = groups(1, 65, 64, 4)
    asked = {"budget": None, "uniform": False, "num_prefix_tokens": 0, "sizes": None, "merged_first": False}
    got = emulated("spatial_merge")(x, [65, 64], [5, 64], 0.01, **asked)
    want = reference("spatial_merge")(x, [65, 64], [5, 64], 0.01, **asked)
    assert torch.equal(got[2], want[2])
    assert torch.allclose(got[0], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [30_000, 45_001])
def test_long_rows(device, length):
    """With a cluster, with keys that fit into a block's shared memory, with keys that do not."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, length, generator=generator).round(decimals=3)  # with ties
    types = torch.randint(0, 4, (1, length), generator=generator, dtype=torch.uint8)
    options = {"budgets": None, "protected": None, "capacity": None, "drop_multiple": 16}
    got = emulated("select_topk")(scores, types, 700, **options)
    want = reference("select_topk")(scores, types, 700, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_long_rows_without_a_search(device):
    """Nothing to rank: the blocks of a cluster exchange one sum right after the other."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 22_000, generator=generator)
    types = torch.randint(0, 4, (1, 22_000), generator=generator, dtype=torch.uint8)
    options = {"protected": None, "capacity": None, "drop_multiple": 1}
    got = emulated("select_dual")(scores, scores, types, 0.5, 0.5, **options)
    want = reference("select_dual")(scores, scores, types, 0.5, 0.5, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("align_end", [False, True])
def test_long_caches(device, align_end):
    """More moves than a block computes together."""
    generator = torch.Generator().manual_seed(2)
    length, counts = 3000, torch.tensor([2400], dtype=torch.int32)
    keep = torch.randperm(length, generator=generator)[:2400].sort().values[None]
    caches = [torch.randn(1, 1, length, 16, generator=generator) for _ in range(2)]
    mine = [cache.clone() for cache in caches]
    emulated("compact_kv_")(mine[:1], mine[1:], [keep], [counts], align_end=align_end)
    for before, after in zip(caches, mine, strict=True):
        kept = after[:, :, -2400:] if align_end else after[:, :, :2400]
        assert torch.equal(kept, before[:, :, keep[0]])


# Rows of up to 256 pieces of 16, 4 and 1 bytes: 8 moves per chunk, and enough chunks for a block per chunk.
ROWS = [(torch.float64, 512), (torch.float32, 255), (torch.uint8, 255)]
PATTERNS = {
    "kept": lambda n, length: torch.arange(n),
    "one dropped": lambda n, length: torch.arange(n) + 1,
    "some chunks dropped": lambda n, length: torch.arange(n) + 29,
    "every second": lambda n, length: torch.arange(n) * 2,
    "last": lambda n, length: torch.arange(length - n, length),
    "drawn": lambda n, length: torch.randperm(length, generator=torch.Generator().manual_seed(n))[:n].sort().values,
}
CAPACITY, LENGTH = 283, 600


@pytest.fixture
def idle() -> Iterator[Callable[[int], None]]:
    """Configures a device that one block per stream would leave idle, so that blocks execute chunks of moves."""
    yield lambda seed: cuda_emulation.configure(seed, (80, 90, 120)[seed % 3], multiprocessors=1024)
    cuda_emulation.configure(0)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).to(dtype)


def moved(cache: torch.Tensor, keep: torch.Tensor, counts: torch.Tensor, ends: list[int] | None) -> torch.Tensor:
    """A copy of `cache` (B, Hk, L, D) after the moves of `keep` (B, Hk, K); to the front, or to these ends."""
    after = cache.clone()
    for b in range(cache.shape[0]):
        for h in range(cache.shape[1]):
            n = int(counts[b, h])
            start = 0 if ends is None else ends[b] - n
            after[b, h, start : start + n] = cache[b, h, keep[b, h, :n]]
    return after


@pytest.mark.parametrize("align_end", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunks_of_long_caches(idle, pattern, align_end):
    """Blocks wait for the preceding blocks that read what they overwrite, for every pattern of dropped positions."""
    keep = PATTERNS[pattern](CAPACITY, LENGTH)[None]
    counts = torch.tensor([CAPACITY], dtype=torch.int32)
    ends = [LENGTH] if align_end else None
    for seed, (dtype, dim) in enumerate(ROWS):
        idle(seed)
        caches = [filled((1, 1, LENGTH, dim), dtype, i) for i in range(2)]
        want = [moved(cache, keep[:, None], counts[:, None], ends) for cache in caches]
        emulated("compact_kv_")(caches[:1], caches[1:], [keep], [counts], align_end=align_end)
        assert all(map(torch.equal, caches, want))


@pytest.mark.parametrize("align_end", [False, True])
def test_chunks_of_sets_per_head(idle, align_end):
    """Two layers of different lengths and heads: a set that ends early, an empty one, one with -1 past the kept."""
    idle(4)
    lengths, heads, names = (LENGTH, LENGTH + 40), (2, 1), list(PATTERNS)
    keys = [filled((2, heads[i], lengths[i], 255), torch.uint8, i) for i in range(2)]
    values = [filled((2, heads[i], lengths[i], 201), torch.uint8, i + 2) for i in range(2)]
    counts = [torch.tensor([[CAPACITY, 130], [0, 270]]).int(), torch.tensor([[CAPACITY], [CAPACITY]]).int()]
    keeps = []
    for i in range(2):
        sets = [PATTERNS[names[1 + i + j]](CAPACITY, lengths[i]) for j in range(2 * heads[i])]
        keeps.append(torch.stack(sets).reshape(2, heads[i], CAPACITY))
    want = []
    for i, cache in enumerate((*keys, *values)):
        want.append(moved(cache, keeps[i % 2], counts[i % 2], [lengths[i % 2]] * 2 if align_end else None))
    keeps[1][1, 0, -41:] = -1  # not a multiple of 8: a chunk of -1 and of others
    for i, cache in enumerate((keys[1], values[1])):  # as they are, where nothing comes from -1
        end = lengths[1] if align_end else CAPACITY
        want[2 * i + 1][1, 0, end - 41 : end] = cache[1, 0, end - 41 : end]
    emulated("compact_kv_")(keys, values, keeps, counts, align_end=align_end)
    assert all(map(torch.equal, (*keys, *values), want))


@pytest.mark.parametrize("align_end", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunks_of_paged_caches(idle, pattern, align_end):
    """Positions are in order, the blocks that hold them are not."""
    idle(6)
    page_size, per_sequence, lengths = 16, 40, torch.tensor([LENGTH, 635], dtype=torch.int32)
    table = torch.randperm(2 * per_sequence + 3, generator=torch.Generator().manual_seed(3))[: 2 * per_sequence]
    table = table.int().reshape(2, per_sequence)
    pools = [filled((2 * per_sequence + 3, page_size, 1, 4096), torch.uint8, i) for i in range(2)]
    keep = torch.stack([PATTERNS[pattern](CAPACITY, int(length)) for length in lengths])
    counts = torch.tensor([CAPACITY, 261], dtype=torch.int32)
    want = []
    for pool in pools:
        dense = pool[table.long()].reshape(2, 1, per_sequence * page_size, 4096)
        dense = moved(dense, keep[:, None], counts[:, None], lengths.tolist() if align_end else None)
        want.append(pool.clone())
        want[-1][table.long()] = dense.reshape(2, per_sequence, page_size, 1, 4096)
    options = {"seq_lens": lengths if align_end else None, "align_end": align_end}
    emulated("compact_paged_kv_")(pools[:1], pools[1:], table, [keep], [counts], **options)
    assert all(map(torch.equal, pools, want))


@pytest.mark.parametrize("align_end", [False, True])
def test_chunks_of_positions_in_no_order(idle, align_end):
    """The contents of the slots are unspecified; no block waits forever, and nothing outside changes."""
    idle(8)
    keep = torch.randint(-(2**62), 2**62, (1, CAPACITY), generator=torch.Generator().manual_seed(4))
    counts = torch.tensor([2**31 - 1], dtype=torch.int32)
    memory = [filled((1, 1, LENGTH + 2, 4096), torch.uint8, i) for i in range(2)]
    before = [m.clone() for m in memory]
    emulated("compact_kv_")([memory[0][:, :, 1:-1]], [memory[1][:, :, 1:-1]], [keep], [counts], align_end=align_end)
    assert all(map(torch.equal, memory, before))  # every position is outside


def sparse_types(length: int, rows: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """Text with some query rows and vision tokens."""
    types = torch.full((1, length), TokenType.TEXT, dtype=torch.uint8)
    types[0, vision] = TokenType.VISION
    types[0, rows] = TokenType.QUERY
    return types


def check_scores(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, vision: torch.Tensor, given: bool) -> None:
    """Scores of one sequence with one key head against softmaxes in float64."""
    heads, length = q.shape[1:3]
    scores = q[0, :, rows].double() @ k[0].double().mT * 0.25
    scores.masked_fill_(torch.arange(length) > rows[:, None], -torch.inf)
    lse = torch.zeros(1, heads, length)
    lse[0, :, rows] = scores.logsumexp(-1).float()
    mean = scores.softmax(-1).mean(0)[:, vision]  # (rows, vision tokens)
    got = emulated("text_vision_scores")(q, k, sparse_types(length, rows, vision), 0.25, lse=lse if given else None)
    for found, wanted in zip(got, (mean.sum(0), mean.amax(0)), strict=True):
        assert torch.allclose(found[0, vision].double(), wanted, rtol=2e-5, atol=0)
        assert found.count_nonzero() == len(vision)


@pytest.mark.parametrize(("multiprocessors", "given"), [(3, False), (132, True)])
def test_scores_of_long_prompts(device, given, multiprocessors):
    """Query rows on both sides of a pass of the search, and more than a tile of them; few and many blocks."""
    cuda_emulation.configure(device, device, multiprocessors)
    generator = torch.Generator().manual_seed(5)
    rows = torch.cat([torch.arange(700, 720), torch.arange(16_340, 16_400), torch.arange(16_600, 16_690)])
    vision = torch.cat([torch.arange(100, 180), torch.arange(16_300, 16_330), torch.arange(16_450, 16_500)])
    q = torch.randn(1, 2, 16_700, 16, generator=generator).to(torch.bfloat16)
    k = torch.randn(1, 1, 16_700, 16, generator=generator).to(torch.bfloat16)
    check_scores(q, k, rows, vision, given)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_scores_of_several_tiles_of_rows(device, heads, given):
    """A tile of rows before the vision tokens, two after them; a block with all heads, and several."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.cat([torch.arange(150), torch.arange(400, 560)])
    q = torch.randn(1, heads, 600, 16, generator=generator)
    k = torch.randn(1, 1, 600, 16, generator=generator)
    check_scores(q, k, rows, torch.arange(160, 290), given)
