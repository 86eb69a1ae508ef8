# SPDX-License-Identifier: Apache-2.0
"""MustDrop inside an inference engine: stages 2 and 3 of one batch; docs/engines.md is the page.

Plan once per batch, run per layer, commit after prefill::

    plan = PackedDropPlan(new_tokens, members, placeholders, config)
    for index, layer in enumerate(layers):
        plan.begin_layer()
        hidden = layer(hidden, positions, metadata(plan.counts))
        if index in config.pruning_layers:
            chosen = plan.prune(query, key, scale)
            hidden, positions = plan.take(hidden, chosen), plan.take(positions, chosen)
    plan.compact_caches(keys, values, block_table)

``DropPlan`` is the protocol; how the rows of a batch lie makes two classes of it: ``PackedDropPlan``, with paged caches
(vLLM), and ``PaddedDropPlan``, with dense ones (transformers). No engine is imported here, and nothing outlives a batch:
what a request has lost is the engine's to remember.
"""

from __future__ import annotations

from .packed import PackedDropPlan, skip_leading_blocks
from .padded import PaddedDropPlan
from .plan import DropPlan

__all__ = ["DropPlan", "PackedDropPlan", "PaddedDropPlan", "skip_leading_blocks"]
