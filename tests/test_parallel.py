# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: two ranks with half of the heads each drop the same tokens as one process with all heads."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_packed_plan import row_lse

from mustdrop_kernels import ops, stages
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.ops import TokenType
from mustdrop_kernels.parallel import scores_over_ranks
from mustdrop_kernels.plans import PackedDropPlan

PADDING, TEXT, VISION, QUERY = TokenType
RANKS, HQ, HK, D = 2, 8, 4, 16
PACKED = [(5, 60, 9), (1, 0, 0), (2, 33, 4)]  # text before the image, patches, text after it
CONFIGS = {
    "budgets": dict(pruning_layers=(0, 1), budgets=(20, 7)),
    "thresholds": dict(pruning_layers=(0, 1), global_threshold=0.015, individual_threshold=0.03),
}

KEYS = MustDropConfig(key_rate=0.2)


def dense():
    """Two sequences, one padded: queries, keys, types."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, HQ, 50, D, generator=generator)
    key = torch.randn(2, HK, 50, D, generator=generator)
    rows = [[TEXT] * 4 + [VISION] * 36 + [QUERY] * 10, [PADDING] * 11 + [VISION] * 30 + [TEXT] * 6 + [QUERY] * 3]
    types = torch.tensor(rows, dtype=torch.uint8)
    return query, key, types


def shard(x, dim, rank):
    return x.chunk(RANKS, dim)[rank].contiguous()


def tower():
    """Three images, one shorter: CLS queries and keys of a vision tower, tokens with CLS."""
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(3, HQ, D, generator=generator), torch.randn(3, HQ, 37, D, generator=generator)
    return query, key, torch.tensor([37, 25, 37], dtype=torch.int32)


def packed_rows(config, rank=None, *, with_lse=False):
    """The remaining rows after two pruning layers; `with_lse`: with the lse of each rank's rows."""
    generator = torch.Generator().manual_seed(1)
    vision = torch.tensor([flag for a, b, c in PACKED for flag in [False] * a + [True] * b + [False] * c])
    group = None if rank is None else dist.group.WORLD
    plan = PackedDropPlan([sum(parts) for parts in PACKED], [0, 2], vision, config, group=group)
    for _ in config.pruning_layers:
        query = torch.randn(len(vision), HQ, D, generator=generator)[plan.rows]
        key = torch.randn(len(vision), HK, D, generator=generator)[plan.rows]
        if rank is not None:
            query, key = shard(query, 1, rank), shard(key, 1, rank)
        plan.prune(query, key, 0.7, lse=row_lse(plan, query, key, 0.7) if with_lse else None)
    return plan.rows


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    query, key, types = dense()
    scores = scores_over_ranks(shard(query, 1, rank), shard(key, 1, rank), types, 0.4, 10)
    no_queries = scores_over_ranks(shard(query, 1, rank), shard(key, 1, rank), types.clamp(max=VISION), 0.4, 0)
    rows = {name: packed_rows(MustDropConfig(**config), rank) for name, config in CONFIGS.items()}
    with_lse = {name: packed_rows(MustDropConfig(**config), rank, with_lse=True) for name, config in CONFIGS.items()}
    cls, patches, counts = tower()
    halves = shard(cls, 1, rank), shard(patches, 1, rank)
    keys = stages.key_tokens(*halves, 0.3, KEYS, counts=counts, group=dist.group.WORLD)
    found = {"scores": tuple(scores), "no_queries": tuple(no_queries), "rows": rows, "with_lse": with_lse, "keys": keys}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def test_scores_are_those_of_all_heads(found):
    query, key, types = dense()
    expected = ops.text_vision_scores(query, key, types, 0.4)
    for rank in found:
        for scores, wanted in zip(rank["scores"], expected, strict=True):
            torch.testing.assert_close(scores, wanted, atol=1e-6, rtol=1e-5)
    # The scores of half of the heads differ.
    half = ops.text_vision_scores(shard(query, 1, 0), shard(key, 1, 0), types, 0.4)
    assert not torch.allclose(half.peak, expected.peak, atol=1e-3)


def test_all_ranks_have_the_same_bits(found):
    for a, b in zip(found[0]["scores"], found[1]["scores"], strict=True):
        assert torch.equal(a, b)


def test_no_text_queries(found):
    for rank in found:
        assert all(scores.count_nonzero() == 0 and scores.shape == (2, 50) for scores in rank["no_queries"])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_prompts_lose_the_same_tokens(found, name):
    expected = packed_rows(MustDropConfig(**CONFIGS[name]))
    assert len(expected) < sum(map(sum, PACKED))
    for rank in found:
        assert torch.equal(rank["rows"][name], expected)
        assert torch.equal(rank["with_lse"][name], expected)


def test_key_tokens_are_those_of_all_heads(found):
    query, key, counts = tower()
    expected = stages.key_tokens(query, key, 0.3, KEYS, counts=counts)
    assert expected.sum(1).tolist() == [8, 5, 8]
    for rank in found:
        assert torch.equal(rank["keys"], expected)
    half = stages.key_tokens(shard(query, 1, 0), shard(key, 1, 0), 0.3, KEYS, counts=counts)
    assert not torch.equal(half, expected)
