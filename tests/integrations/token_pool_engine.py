# SPDX-License-Identifier: Apache-2.0
"""An engine in a few lines with pages of one token: packed batches, and pools shaped as SGLang's.

It runs the language model of a transformers LLaVA: prompts and decoding rows in one step, a token table, an allocator
that soon reuses freed slots.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mustdrop_kernels.integrations.sglang import TokenTable
from mustdrop_kernels.plans import PackedDropPlan


@dataclasses.dataclass
class Kv:
    """The fields of SGLang's ``ReqKvInfo`` that are used."""

    req_pool_idx: int | None = None
    cache_protected_len: int = 0
    kv_committed_len: int = 0
    kv_allocated_len: int = 0


class Allocator:
    """``TokenToKVPoolAllocator``: slots 1 .. size; slots freed last are allocated last."""

    def __init__(self, size):
        self.free_pages = torch.arange(1, size + 1)

    def available_size(self):
        return len(self.free_pages)

    def alloc(self, need_size):
        assert need_size <= len(self.free_pages), "the pool is full"
        slots, self.free_pages = self.free_pages[:need_size], self.free_pages[need_size:]
        return slots

    def free(self, free_index):
        self.free_pages = torch.cat([self.free_pages, free_index])


class Rows:
    """``ReqToTokenPool``."""

    def __init__(self, rows, context):
        self.req_to_token = torch.zeros(rows + 1, context, dtype=torch.int32)
        self.free_slots = list(range(1, rows + 1))

    def alloc(self, requests):
        for request in requests:
            request.kv.req_pool_idx = self.free_slots.pop()

    def free(self, request):
        self.free_slots.append(request.kv.req_pool_idx)


class Buffers:
    """``MHATokenToKVPool``."""

    def __init__(self, size, heads, head_dim, layers):
        self.k_buffer = [torch.zeros(size + 1, heads, head_dim) for _ in range(layers)]
        self.v_buffer = [torch.zeros(size + 1, heads, head_dim) for _ in range(layers)]


@dataclasses.dataclass
class Step:
    """Attention inputs of R requests, with SGLang's names."""

    req_pool_indices: torch.Tensor  # (R)
    seq_lens: torch.Tensor  # (R), with the rows of this step
    extend_seq_lens: torch.Tensor  # (R), those rows
    out_cache_loc: torch.Tensor  # (rows), their slots

    @property
    def extend_prefix_lens(self):
        return self.seq_lens - self.extend_seq_lens


class Pools:
    """SGLang's objects; a test may replace the classes."""

    Kv = Kv

    def __init__(self, size, heads, head_dim, layers, rows=8, context=400):
        self.rows, self.allocator = Rows(rows, context), Allocator(size)
        self.buffers = Buffers(size, heads, head_dim, layers)

    def attend(self, layer, scale, query, key, value, step):  # (rows, H, D) each
        """Writes keys and values to their slots, and attends by the table; (rows, Hq, D)."""
        keys, values = self.buffers.k_buffer[layer], self.buffers.v_buffer[layer]
        keys[step.out_cache_loc], values[step.out_cache_loc] = key, value
        mixed = []
        pieces = query.split(step.extend_seq_lens.tolist())
        for row, rows, length in zip(step.req_pool_indices, pieces, step.seq_lens.tolist(), strict=True):
            own = self.rows.req_to_token[row, :length].long()
            q, k, v = (y.transpose(0, 1) for y in (rows, keys[own], values[own]))
            mask = torch.ones(len(rows), length, dtype=torch.bool).tril(length - len(rows))
            attended = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
            mixed.append(attended.transpose(0, 1))
        return torch.cat(mixed)


class Request:
    def __init__(self, ids, features, kv):
        self.ids, self.features, self.kv = ids, features, kv
        self.output, self.lost = [], 0


class Engine:
    def __init__(self, model, config, size, pools=Pools):
        self.model, self.config = model, config
        text = model.config.text_config
        self.pools = pools(size, text.num_key_value_heads, text.head_dim, text.num_hidden_layers)
        self.allocator, self.req_to_token = self.pools.allocator, self.pools.rows.req_to_token
        self.k_buffer, self.v_buffer = self.pools.buffers.k_buffer, self.pools.buffers.v_buffer
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer.fill_(torch.nan)

    def add(self, ids, features=None):  # (L), (N, C)
        request = Request(ids, features, self.pools.Kv())
        self.pools.rows.alloc([request])
        return request

    def finish(self, request):
        kv = request.kv
        assert kv.kv_committed_len == kv.kv_allocated_len
        self.allocator.free(self.req_to_token[kv.req_pool_idx, : kv.kv_allocated_len].long())
        self.pools.rows.free(request)

    @torch.no_grad()
    def step(self, requests):
        """One more token for each; those that have none yet read their prompts."""
        new, rows, places = [], [], []
        for request in requests:
            ids = request.output[-1:] or request.ids
            past = request.kv.kv_committed_len
            new.append(len(ids))
            rows.append(torch.as_tensor(ids))
            places.append(past + request.lost + torch.arange(len(ids)))  # positions are the plain sequence's
        ids, positions = torch.cat(rows), torch.cat(places)
        slots = self._allocate(requests, new)
        image = ids == self.model.config.image_token_id
        hidden = self.model.get_input_embeddings()(ids)
        features = [request.features for request in requests if request.features is not None and not request.output]
        if features:
            hidden = hidden.masked_scatter(image[:, None], torch.cat(features))
        final, plan = self._run(requests, new, image, hidden, positions, slots)
        ends = torch.tensor(plan.counts if plan else new).cumsum(0) - 1
        for request, token in zip(requests, self.model.lm_head(final[ends]).argmax(-1).tolist(), strict=True):
            request.output.append(token)

    def _allocate(self, requests, new):
        slots = self.allocator.alloc(sum(new))
        for request, own in zip(requests, slots.split(new), strict=True):
            kv = request.kv
            self.req_to_token[kv.req_pool_idx, kv.kv_allocated_len : kv.kv_allocated_len + len(own)] = own.int()
            kv.kv_allocated_len += len(own)
            kv.kv_committed_len += len(own)
        return slots

    def _run(self, requests, new, image, hidden, positions, slots):
        members = [i for i, r in enumerate(requests) if r.features is not None and not r.output]
        seq_lens = torch.tensor([request.kv.kv_committed_len for request in requests])
        language = self.model.model.language_model
        if not members:
            for i, layer in enumerate(language.layers):
                hidden, _ = self._layer(i, layer, hidden, positions, slots, requests, new, seq_lens)
            return language.norm(hidden), None
        plan = PackedDropPlan(new, members, image, self.config)
        table = TokenTable(plan, requests, self.req_to_token, slots)
        for i, layer in enumerate(language.layers):
            plan.begin_layer()
            left = seq_lens - plan.lost
            hidden, (query, key) = self._layer(i, layer, hidden, positions, slots, requests, plan.counts, left)
            if i in self.config.pruning_layers:
                chosen = plan.prune(query, key, layer.self_attn.scaling)
                hidden, positions = plan.take(hidden, chosen), plan.take(positions, chosen)
                slots = table.update_rows()
        table.free_dropped_slots(self.allocator)
        for member in members:
            requests[member].lost = plan.dropped[member]
        return language.norm(hidden), plan

    def _layer(self, i, layer, hidden, positions, slots, requests, new, seq_lens):
        """The layer's output, and its queries and keys after RoPE, (rows, H, D)."""
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        heads = (-1, attention.head_dim)
        query, key, value = (f(x).unflatten(-1, heads) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        cos, sin = self.model.model.language_model.rotary_emb(hidden[None], positions[None])
        query, key = apply_rotary_pos_emb(query, key, cos[0], sin[0], unsqueeze_dim=1)
        rows = torch.tensor([request.kv.req_pool_idx for request in requests])
        step = Step(rows, seq_lens, torch.tensor(new), slots)
        mixed = self.pools.attend(i, attention.scaling, query, key, value, step)
        hidden = hidden + attention.o_proj(mixed.flatten(1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), (query, key)
