# SPDX-License-Identifier: Apache-2.0
"""Stages 2 and 3 of one batch inside an inference engine; described in docs/engines.md.

Plan once per batch, run per layer, compact the caches after prefill::

    plan = PackedDropPlan(new_tokens, members, placeholders, config)
    for index, layer in enumerate(layers):
        plan.begin_layer()
        hidden = layer(hidden, positions, metadata(plan.counts))
        if index in config.pruning_layers:
            chosen = plan.prune(query, key, scale)
            hidden, positions = plan.take(hidden, chosen), plan.take(positions, chosen)
    plan.compact_caches(keys, values, block_table)

``DropPlan`` is the protocol. ``PackedDropPlan`` implements it for packed batches with paged caches (vLLM),
``PaddedDropPlan`` for padded batches with dense caches (transformers). No engine is imported here. A plan ends with
its batch; the engine stores how many tokens each request has lost.
"""

from __future__ import annotations

from .packed import PackedDropPlan, skip_leading_blocks
from .padded import PaddedDropPlan
from .plan import DropPlan

__all__ = ["DropPlan", "PackedDropPlan", "PaddedDropPlan", "skip_leading_blocks"]
