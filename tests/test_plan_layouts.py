# SPDX-License-Identifier: Apache-2.0
"""Agreement of the layouts: padded and packed batches of the same prompts drop the same tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mustdrop_kernels import stages
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.ops import TokenType
from mustdrop_kernels.plans import DropPlan, PackedDropPlan, PaddedDropPlan
from mustdrop_kernels.stages import Tokens

LAYERS, HQ, HK, D, PAGE_SIZE = 4, 4, 2, 8, 16
PROMPTS = [(3, 30, 6), (0, 41, 4), (5, 20, 2)]  # text before the image, patches, text after it
LENGTHS = [sum(parts) for parts in PROMPTS]
CONFIGS = {
    "budgets": dict(pruning_layers=(1, 2), budgets=(12, 5), evict_from=0),
    "thresholds": dict(pruning_layers=(0, 2), global_threshold=0.02, individual_threshold=0.03, evict_from=0),
}


def flags(value):
    """Flags of patches in the packed batch, `value` of their index."""
    return torch.cat([torch.tensor([False] * a + [value(i) for i in range(b)] + [False] * c) for a, b, c in PROMPTS])


VISION, KEY, EMPTY = flags(lambda i: True), flags(lambda i: i % 11 == 3), flags(lambda i: i % 4 == 1)


def pad(packed):
    """(rows, ...) -> (B, L, ...), on the left."""
    out = packed.new_zeros(len(LENGTHS), max(LENGTHS), *packed.shape[1:])
    for row, own in zip(out, packed.split(LENGTHS), strict=True):
        row[len(row) - len(own) :] = own
    return out


def packed_plan(config):
    return PackedDropPlan(LENGTHS, [0, 1, 2], VISION, config, is_key_token=KEY)


def padded_plan(config):
    real, vision, key = (pad(x) for x in (torch.ones_like(VISION), VISION, KEY))
    types = stages.token_types(vision, real, config.text_queries)
    index = pad(torch.arange(len(VISION))).masked_fill(~real, -1)  # indices in the packed batch
    count = lambda x: tuple(x.sum(1).tolist())  # noqa: E731
    tokens = Tokens(
        types=types,
        index=index,
        positions=index,
        protected=key,
        counts=real.sum(1).int(),
        lengths=count(real),
        vision_token_counts=count(vision),
        key_token_counts=count(key),
    )
    return PaddedDropPlan(tokens, config, text_queries=count(types == TokenType.QUERY))


def rows_left(plan: DropPlan):
    """Remaining rows per prompt, from the common interface of the layouts."""
    return [row[row >= 0].tolist() for row in plan.tokens.index]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_agree(name, merged):
    """The same rows are dropped, and after commit both caches hold the same keys of the same tokens."""
    config = MustDropConfig(**CONFIGS[name])
    packed, padded = packed_plan(config), padded_plan(config)
    content = torch.randn(LAYERS, len(VISION), HK, D)  # a key per row and layer
    pages = torch.randn(LAYERS, 12, PAGE_SIZE, HK, D)
    table = torch.randperm(12).view(3, 4).int()
    dense = []
    if merged:
        packed.drop_empty(EMPTY)
        empty = pad(EMPTY)
        padded.drop_empty(empty, tuple(n - int(e.sum()) for n, e in zip(LENGTHS, empty, strict=True)))
    hidden = padded.tokens.index.float()[..., None]
    for layer in range(LAYERS):
        for plan in (packed, padded):
            plan.begin_layer()
        write(pages[layer], table, packed, content[layer])
        dense.append(content[layer][padded.tokens.index.clamp(min=0)].transpose(1, 2).contiguous())
        if layer in config.pruning_layers:
            query, key = torch.randn(len(VISION), HQ, D), content[layer]
            packed.prune(query[packed.rows], key[packed.rows], 0.8)
            place = padded.tokens.index.clamp(min=0)
            chosen = padded.prune(query[place].transpose(1, 2), key[place].transpose(1, 2), 0.8)
            hidden = padded.take(hidden, chosen)
        assert rows_left(packed) == rows_left(padded)
        assert torch.equal(packed.rows, torch.tensor([*itertools.chain(*rows_left(padded))]))
    assert packed.final
    assert padded.final
    assert hidden[..., 0][padded.tokens.types != TokenType.PADDING].tolist() == [*itertools.chain(*rows_left(padded))]
    assert sum(packed.counts) < len(VISION)

    packed.compact_caches(list(pages), [x.clone() for x in pages], table)
    layers = padded.layers_to_compact
    assert layers == list(range(config.pruning_layers[-1] + 1))
    cut = padded.compact_caches(*([dense[i].clone() for i in layers] for _ in "kv"))
    for i, (key, _) in zip(layers, cut, strict=True):
        dense[i] = key
    assert all(tokens is padded.tokens for tokens in padded.cached_tokens)
    for layer in range(LAYERS):
        for prompt, left in enumerate(rows_left(padded)):
            expected = content[layer][left]
            assert torch.equal(dense[layer][prompt].transpose(0, 1)[-len(left) :], expected)
            assert torch.equal(read(pages[layer], table, packed, prompt), expected)


def places(table, plan, prompt):
    skipped = plan.dropped[prompt] // PAGE_SIZE if plan.final else 0
    place = torch.arange(plan.counts[prompt])
    return table[prompt, skipped + place // PAGE_SIZE].long(), place % PAGE_SIZE


def write(pages, table, plan, content):
    for prompt, rows in enumerate(plan.rows.split(plan.counts)):
        pages[places(table, plan, prompt)] = content[rows]


def read(pages, table, plan, prompt):
    return pages[places(table, plan, prompt)]


# With budgets a step can be captured in a CUDA graph.


def run(plan: DropPlan, rows):
    """Run the layers with the drops after them; `rows()` is the shape of the batch."""
    for layer in range(LAYERS):
        plan.begin_layer()
        if layer in plan.config.pruning_layers:
            chosen = plan.prune(torch.randn(*rows(HQ)), torch.randn(*rows(HK)), 0.8)
            plan.take(torch.randn(*rows(HQ)), chosen)


def run_packed(config):
    plan = packed_plan(config)
    pages, table = [torch.randn(12, PAGE_SIZE, HK, D) for _ in range(2 * LAYERS)], torch.randperm(12).view(3, 4).int()

    def go():
        run(plan, lambda heads: (sum(plan.counts), heads, D))
        plan.compact_caches(pages[:LAYERS], pages[LAYERS:], table)

    return go


def run_padded(config):
    plan = padded_plan(config)

    def go():
        run(plan, lambda heads: (len(LENGTHS), heads, plan.tokens.length, D))
        caches = [torch.randn(len(LENGTHS), HK, plan.cached_tokens[i].length, D) for i in plan.layers_to_compact]
        plan.compact_caches(caches, [x.clone() for x in caches])

    return go


class FromHost(TorchDispatchMode):
    """Counts tensors created from Python numbers, which on a device are copies from the host."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.copies += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("planned", [run_packed, run_padded])
def test_budgets_need_nothing_from_the_host(planned):
    """A plan does not synchronize with the device or copy to it; with thresholds ``prune`` synchronizes."""
    budgets, thresholds, go = (
        planned(MustDropConfig(**CONFIGS[name])) for name in ("budgets", "thresholds", "budgets")
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        budgets()
        with pytest.raises(DataDependentOutputException):
            thresholds()
    with FromHost() as mode:
        torch.tensor([1])
        assert mode.copies == 1
        go()
        assert mode.copies == 1
