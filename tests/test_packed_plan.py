# SPDX-License-Identifier: Apache-2.0
"""PackedDropPlan in a minimal paged engine that mirrors its cache in a dictionary."""

from __future__ import annotations

import pytest
import torch

from mustdrop_kernels import ops
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.ops import TokenType
from mustdrop_kernels.plans import PackedDropPlan, skip_leading_blocks

LAYERS, HQ, HK, D = 5, 4, 2, 8
CONFIGS = {
    "budgets": dict(pruning_layers=(1, 3), budgets=(12, 5)),
    "thresholds": dict(pruning_layers=(0, 2), global_threshold=0.02, individual_threshold=0.03),
    "last layer": dict(pruning_layers=(4,), budgets=(3,)),
    "nothing is pruned": dict(pruning_layers=()),
}
# Cache layouts of engines: vLLM on a GPU (NHD, HND), vLLM's CPU attention (keys transposed), SGLang's pool.
LAYOUTS = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "transposed": (0, 2, 3, 1)}
BATCH = [  # past tokens; text before the image, patches, text after it
    (0, (3, 30, 6)),
    (17, (1, 0, 0)),  # decode
    (0, (9, 0, 0)),  # a prompt without an image
    (0, (0, 41, 4)),
    (0, (5, 20, 0)),  # no text query
    (4, (3, 0, 0)),  # chunked prefill
]
MEMBERS = [0, 3, 4]


def strided(shape, order, seed):
    """Random numbers stored in another order of the dimensions."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn([shape[d] for d in order], generator=generator)
    return stored.permute([order.index(d) for d in range(4)])


class Engine:
    """Pages for the batch, from blocks in random order, and their expected contents."""

    def __init__(self, slots, layout):
        self.slots = slots
        self.new = [sum(parts) for _, parts in BATCH]
        lengths = [past + new for (past, _), new in zip(BATCH, self.new, strict=True)]
        columns = max(-(-length // slots) for length in lengths)
        self.blocks = len(BATCH) * columns + 3
        order = torch.randperm(self.blocks, generator=torch.Generator().manual_seed(1))
        self.table = order[: len(BATCH) * columns].view(len(BATCH), columns).int()
        shape = (self.blocks, slots, HK, D)
        self.caches = [
            (strided(shape, LAYOUTS[layout], 2 * i), strided(shape, LAYOUTS["NHD"], 2 * i + 1)) for i in range(LAYERS)
        ]
        self.before = [(keys.clone(), values.clone()) for keys, values in self.caches]
        # By layer: key and value of every row.
        rows = (LAYERS, 2, sum(self.new), HK, D)
        self.content = torch.randn(rows, generator=torch.Generator().manual_seed(99))

    def write(self, layer, plan):
        """Write the live rows of each request to the slots described in docs/engines.md."""
        live = plan.rows.split(plan.counts)
        for request, (past, _) in enumerate(BATCH):
            lost = plan.dropped[request] if plan.final else 0
            self._write(layer, request, lost, past, live[request])

    def _write(self, layer, request, lost, begin, rows):
        table = skip_leading_blocks(self.table, torch.full((len(BATCH),), lost // self.slots))[request]
        place = begin + torch.arange(len(rows))
        for cache, content in zip(self.caches[layer], self.content[layer], strict=True):
            cache[table[place // self.slots].long(), place % self.slots] = content[rows]

    def read(self, layer, request, lost, begin, count):
        table = skip_leading_blocks(self.table, torch.full((len(BATCH),), lost // self.slots))[request]
        place = begin + torch.arange(count)
        return [cache[table[place // self.slots].long(), place % self.slots] for cache in self.caches[layer]]


def placeholders():
    pieces = [[False] * before + [True] * patches + [False] * after for _, (before, patches, after) in BATCH]
    return torch.tensor([flag for piece in pieces for flag in piece])


def expected_rows(plan, config, stage, query, key, scale, protected):
    """Remaining rows of each request, scored and selected alone with the dense operators."""
    kept = []
    for request, rows in enumerate(plan.rows.split(plan.counts)):
        if request not in MEMBERS:
            kept.append(rows)
            continue
        vision = placeholders()[rows]
        last = int(torch.nonzero(vision).max()) if vision.any() else len(rows)
        text = torch.where(torch.arange(len(rows)) > last, int(TokenType.QUERY), int(TokenType.TEXT))
        types = torch.where(vision, int(TokenType.VISION), text).to(torch.uint8)[None]
        begin = sum(plan.counts[:request])
        own = slice(begin, begin + len(rows))
        q, k = (x[own].transpose(0, 1)[None] for x in (query, key))
        if not (types == TokenType.QUERY).any():
            kept.append(rows)
            continue
        if config.budgets is None:
            thresholds = (config.global_threshold, config.individual_threshold)
            found = ops.dual_attention_select(q, k, types, scale, *thresholds, protected=protected[rows][None])
        else:
            budget = config.budgets[stage]
            found = ops.topk_attention_select(q, k, types, scale, budget, protected=protected[rows][None])
        kept.append(rows[found.keep[0, : int(found.counts)]])
    return torch.cat(kept)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("empty", [False, True], ids=["whole", "merged"])
@pytest.mark.parametrize(("slots", "layout"), [(16, "NHD"), (8, "HND"), (16, "transposed"), (1, "NHD")])
def test_cache_holds_the_survivors(slots, layout, empty, name):
    config = MustDropConfig(**CONFIGS[name])
    generator = torch.Generator().manual_seed(7)
    engine, vision = Engine(slots, layout), placeholders()
    protected = vision & (torch.rand(len(vision), generator=generator) < 0.05)
    plan = PackedDropPlan(engine.new, MEMBERS, vision, config, is_key_token=protected)
    if empty:
        empty_slots = vision & ~protected & (torch.rand(len(vision), generator=generator) < 0.3)
        remaining = plan.drop_empty(empty_slots)
        assert torch.equal(remaining, torch.nonzero(~empty_slots)[:, 0])
    hidden = plan.rows.float()[:, None].clone()
    stage = 0
    for layer in range(LAYERS):
        plan.begin_layer()
        engine.write(layer, plan)
        if layer in config.pruning_layers:
            query = torch.randn(len(plan.rows), HQ, D, generator=generator)
            key = torch.randn(len(plan.rows), HK, D, generator=generator)
            expected = expected_rows(plan, config, stage, query, key, 0.8, protected)
            hidden = plan.take(hidden, plan.prune(query, key, 0.8))
            assert torch.equal(plan.rows, expected)
            stage += 1
    assert plan.final
    assert torch.equal(hidden[:, 0], plan.rows.float())
    assert plan.rows[protected[plan.rows]].tolist() == torch.nonzero(protected)[:, 0].tolist()
    assert any(plan.dropped) == (empty or bool(config.pruning_layers))
    written = [(keys.clone(), values.clone()) for keys, values in engine.caches]
    plan.compact_caches(*zip(*engine.caches, strict=True), engine.table)
    check_pages(engine, plan)
    check_nothing_else_moved(engine, written)


def check_pages(engine, plan):
    live = plan.rows.split(plan.counts)
    for layer in range(LAYERS):
        for request, (past, _) in enumerate(BATCH):
            lost = plan.dropped[request]
            found = engine.read(layer, request, lost, past, plan.counts[request])
            for cache, content in zip(found, engine.content[layer], strict=True):
                assert torch.equal(cache, content[live[request]])
            # Tokens of earlier chunks are unchanged.
            for cache, before in zip(engine.read(layer, request, 0, 0, past), range(2), strict=True):
                place = torch.arange(past)
                block = engine.table[request, place // engine.slots].long()
                assert torch.equal(cache, engine.before[layer][before][block, place % engine.slots])


def check_nothing_else_moved(engine, written):
    """Commit changes no blocks other than those of the requests."""
    others = torch.ones(engine.blocks, dtype=torch.bool)
    others[engine.table[MEMBERS].long()] = False
    for now, then in zip(engine.caches, written, strict=True):
        for cache, before in zip(now, then, strict=True):
            assert torch.equal(cache[others], before[others])


def test_cases_include_drops_of_partial_blocks():
    config = MustDropConfig(**CONFIGS["budgets"])
    plan = PackedDropPlan([sum(parts) for _, parts in BATCH], MEMBERS, placeholders(), config)
    for _ in config.pruning_layers:
        plan.prune(torch.randn(len(plan.rows), HQ, D), torch.randn(len(plan.rows), HK, D), 1.0)
    assert [plan.dropped[i] for i in MEMBERS] == [25, 36, 0]


def test_table_without_leading_blocks():
    table = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int32)
    assert skip_leading_blocks(table, torch.tensor([0, 3])).tolist() == [[1, 2, 3, 4], [8, 8, 8, 8]]


def row_lse(plan, query, key, scale):  # (Hq, live)
    """Normalizer of each live row over its visible keys."""
    pieces = []
    for q, k in zip(query.split(plan.counts), key.split(plan.counts), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        pieces.append(scores.masked_fill(hidden, -torch.inf).logsumexp(-1))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", ["budgets", "thresholds"])
def test_the_lse_of_the_attention_is_used(name):
    config, engine = MustDropConfig(**CONFIGS[name]), Engine(16, "NHD")
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(sum(engine.new), heads, D, generator=generator) for heads in (HQ, HK))

    def rows(lse):
        plan = PackedDropPlan(engine.new, MEMBERS, placeholders(), config)
        plan.begin_layer()
        given = None if lse is None else lse(plan, query, key, 0.8)
        plan.prune(query, key, 0.8, lse=given)
        return plan.rows.tolist()

    assert rows(row_lse) == rows(None)
    nothing_is_seen = rows(lambda *given: torch.full_like(row_lse(*given), torch.inf))
    assert nothing_is_seen != rows(None)
