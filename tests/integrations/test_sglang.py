# SPDX-License-Identifier: Apache-2.0
"""The token table at page size 1: an engine with SGLang's pools serves the tokens that transformers gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from prompts import make_inputs
from token_pool_engine import Allocator, Engine, Kv, Pools

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.sglang import TokenTable
from mustdrop_kernels.integrations.transformers import drop_tokens
from mustdrop_kernels.plans import PackedDropPlan

COMMON = dict(merge=False, key_rate=0.0, pruning_layers=(1, 3, 5), evict_from=0)
CONFIGS = {
    "budgets": MustDropConfig(**COMMON, budgets=(70, 40, 20)),
    "thresholds": MustDropConfig(**COMMON, global_threshold=0.01, individual_threshold=0.02),
    "last layer": MustDropConfig(**{**COMMON, "pruning_layers": (7,)}, budgets=(9,)),
}
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def asks(processor):
    """Prompts with one, two and no image: ids (L) and pixels."""
    batch = make_inputs(processor, "different numbers")
    real, count = batch["attention_mask"].bool(), (1, 2, 0)
    pixels = batch["pixel_values"].split(count)
    return [(ids[row], image) for ids, row, image in zip(batch["input_ids"], real, pixels, strict=True)]


@torch.no_grad()
def features(model, pixels):
    output = model.model.get_image_features(pixel_values=pixels)
    return torch.cat(list(getattr(output, "pooler_output", output)))


def alone(model, config, ids, pixels):
    """Tokens that transformers generates."""
    inputs = {"pixel_values": pixels} if len(pixels) else {}
    with drop_tokens(model, config):
        output = model.generate(input_ids=ids[None], **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0, len(ids) :].tolist()


def real_pools():
    """SGLang's own classes, and its attention backend for a CPU."""
    pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import ReqKvInfo
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

    class RealPools:
        Kv = ReqKvInfo

        def __init__(self, size, heads, head_dim, layers):
            self.rows = ReqToTokenPool(8, 400, "cpu", enable_memory_saver=False)
            self.buffers = MHATokenToKVPool(size, 1, torch.float32, heads, head_dim, layers, "cpu", False)
            self.allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", self.buffers, need_sort=False)
            pools = SimpleNamespace(device="cpu", req_to_token_pool=self.rows, token_to_kv_pool=self.buffers)
            self.backend = TorchNativeAttnBackend(pools)

        def attend(self, layer, scale, query, key, value, step):
            module = RadixAttention(query.shape[1], query.shape[2], scale, key.shape[1], layer)
            batch = SimpleNamespace(
                req_pool_indices=step.req_pool_indices,
                seq_lens=step.seq_lens,
                extend_seq_lens=step.extend_seq_lens,
                extend_prefix_lens=step.extend_prefix_lens,
                out_cache_loc=step.out_cache_loc,
                encoder_lens=None,
            )
            self.backend.init_forward_metadata(batch)
            decode = bool((step.extend_seq_lens == 1).all())
            forward = self.backend.forward_decode if decode else self.backend.forward_extend
            return forward(query.flatten(1), key, value, module, batch).view_as(query)

    return RealPools


@pytest.mark.parametrize("pools", [lambda: Pools, real_pools], ids=["shaped", "real"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers(name, pools, sdpa, asks):
    """Requests that join a running batch, in a pool that would not hold their full prompts."""
    config = CONFIGS[name]
    lengths = [len(ids) for ids, _ in asks]
    size = sum(lengths) - 40
    engine = Engine(sdpa, config, size, pools())
    running, waiting, done = [], sorted(enumerate(asks), key=lambda item: -len(item[1][0])), {}
    together = 0
    while waiting or running:
        if waiting and len(waiting[0][1][0]) + len(running) + 1 <= engine.allocator.available_size():
            number, (ids, pixels) = waiting.pop(0)
            running.append((number, engine.add(ids, features(sdpa, pixels) if len(pixels) else None)))
        together = max(together, len(running))
        engine.step([request for _, request in running])
        for number, request in list(running):
            if len(request.output) == NEW_TOKENS:
                engine.finish(request)
                running.remove((number, request))
                done[number] = request
    assert together == len(asks)
    for number, (ids, pixels) in enumerate(asks):
        assert done[number].output == alone(sdpa, config, ids, pixels)
        assert (done[number].lost > 0) == (len(pixels) > 0)
    assert engine.allocator.free_pages.sort().values.tolist() == list(range(1, size + 1))  # each slot once


def batch():
    """Three requests of one step, the second of which begins with an image; and the slots of their new tokens."""
    requests = [Request(Kv(5, 0, 12, 12)), Request(Kv(2, 0, 8, 8)), Request(Kv(7, 0, 3, 3))]
    vision = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]).bool()
    return requests, vision, torch.tensor([40, 9, 3, 30, 31, 8, 22, 4, 17, 50, 51, 52])


class Request:
    def __init__(self, kv):
        self.kv = kv


def test_rows_slots_and_records():
    """Only the member's row changes, in front; the slots of what went are free, once."""
    requests, vision, slots = batch()
    plan = PackedDropPlan([1, 8, 3], [1], vision, MustDropConfig(pruning_layers=(0,), budgets=(2,)))
    table = torch.randint(1000, 2000, (9, 20), dtype=torch.int32)
    before, allocator = table.clone(), Allocator(0)
    tokens = TokenTable(plan, requests, table, slots)
    plan.begin_layer()
    plan.prune(torch.randn(12, 4, 8), torch.randn(12, 2, 8), 1.0)
    live = tokens.update_rows()
    assert live.tolist() == slots[plan.rows].tolist()
    assert table[2, :5].tolist() == live[1:6].tolist()
    before[2, :5] = table[2, :5]
    assert torch.equal(table, before)
    assert len(allocator.free_pages) == 0  # not before the layers have run
    tokens.free_dropped_slots(allocator)
    assert sorted(allocator.free_pages.tolist() + live.tolist()) == sorted(slots.tolist())
    assert [(r.kv.kv_allocated_len, r.kv.kv_committed_len) for r in requests] == [(12, 12), (5, 5), (3, 3)]
    assert plan.lost.tolist() == plan.dropped == [0, 3, 0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cache_protected_len": 3}, "request 1: its first 3 tokens belong to the prefix cache"),
        ({"kv_allocated_len": 20, "kv_committed_len": 20}, "8 of its 20 tokens are in this one"),
        ({"kv_allocated_len": 9}, "8 of its 9 tokens"),
    ],
)
def test_what_cannot_lose_tokens_is_refused(changes, sentence):
    requests, vision, slots = batch()
    plan = PackedDropPlan([1, 8, 3], [1], vision, MustDropConfig(pruning_layers=(0,), budgets=(2,)))
    for name, value in changes.items():
        setattr(requests[1].kv, name, value)
    with pytest.raises(ValueError, match=sentence):
        TokenTable(plan, requests, torch.zeros(9, 20, dtype=torch.int32), slots)
