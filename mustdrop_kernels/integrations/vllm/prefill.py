# SPDX-License-Identifier: Apache-2.0
"""Steps in which prompts with images begin: stage 2 layer by layer, and stage 3 at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tp_group

from ...config import MustDropConfig
from ...plans import PackedDropPlan
from .adapters import set_adapters
from .batch import Batch
from .metadata import MetadataBuilder, MetadataSwap, StepMetadata, cache_views
from .vision import PlaceholderFlags


class Prefill:
    """Runs the layers of a Llama-like language model one by one, with fewer rows after each pruning layer."""

    def __init__(self, model: Any, config: MustDropConfig, metadata: MetadataBuilder) -> None:  # vLLM's LlamaModel
        self._model, self._config, self._metadata = model, config, metadata
        self._query_key: tuple[Tensor, Tensor] | None = None  # of the pruning layer that is running
        self._recording = False
        for index in config.pruning_layers:
            model.layers[index].self_attn.attn.register_forward_pre_hook(self._record_query_key)

    def _record_query_key(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._recording:
            self._query_key = (args[0], args[1])

    def run(
        self,
        batch: Batch,
        flags: PlaceholderFlags | None,  # of stage 1; None: it has not run
        hidden: Tensor,  # (rows, C)
        positions: Tensor,  # (rows) int64
        swap: MetadataSwap,
        lora_manager: Any = None,  # vLLM's
    ) -> tuple[Tensor, PackedDropPlan]:
        """The final hidden states (rows, C), zero in dropped rows, and the plan after the last layer."""
        is_key_token = None if flags is None else flags.is_key_token
        ranks = get_tp_group()
        group = ranks.device_group if ranks.world_size > 1 else None
        plan = PackedDropPlan(
            batch.new,
            batch.beginning,
            batch.placeholders(hidden.device),
            self._config,
            is_key_token=is_key_token,
            group=group,
        )
        if flags is not None and self._config.merge:
            rows = plan.drop_empty(flags.empty)
            hidden, positions = plan.take(hidden, rows), plan.take(positions, rows)
        self._recording = True
        try:
            hidden = self._run_layers(plan, hidden, positions, lambda: self._lay_out(batch, plan, swap, lora_manager))
        finally:
            self._recording, self._query_key = False, None
        keys, values = zip(*(cache_views(layer.self_attn.attn.kv_cache) for layer in self._model.layers), strict=True)
        plan.compact_caches(keys, values, batch.metadata.block_table)
        return hidden.new_zeros(batch.rows, hidden.shape[1]).index_copy_(0, plan.rows, hidden), plan

    def _run_layers(
        self, plan: PackedDropPlan, hidden: Tensor, positions: Tensor, lay_out: Callable[[], None]
    ) -> Tensor:
        residual: Tensor | None = None
        lay_out()
        for index, layer in enumerate(self._model.layers):
            plan.begin_layer()
            hidden, residual = layer(positions, hidden, residual)
            if index in self._config.pruning_layers:
                rows = plan.prune(*self._pop_query_key(layer.self_attn.attn), layer.self_attn.attn.impl.scale)
                hidden, residual, positions = (plan.take(x, rows) for x in (hidden, residual, positions))
                lay_out()
        return self._model.norm(hidden, residual)[0]

    def _pop_query_key(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Queries (live, Hq, D) and keys (live, Hk, D) of the layer that has just run."""
        recorded, self._query_key = self._query_key, None
        assert recorded is not None
        query, key = recorded
        return query.unflatten(-1, (-1, attention.head_size)), key.unflatten(-1, (-1, attention.head_size))

    def _lay_out(self, batch: Batch, plan: PackedDropPlan, swap: MetadataSwap, lora_manager: Any) -> None:
        """Attention metadata and adapters of the live rows."""
        swap.use(self._step_metadata(batch, plan))
        if lora_manager is not None:
            set_adapters(lora_manager, [request.adapter for request in batch.requests], plan.counts)

    def _step_metadata(self, batch: Batch, plan: PackedDropPlan) -> StepMetadata:
        """Before the last drop the remaining tokens of a prompt are in its first blocks.

        After it they are in their final place, with the leading blocks empty.
        """
        dropped = [before + now for before, now in zip(batch.dropped_before, plan.dropped, strict=True)]
        lengths = [length - count for length, count in zip(batch.lengths, dropped, strict=True)]
        skipped = dropped if plan.final else batch.dropped_before
        return self._metadata.build(batch.metadata, plan.counts, lengths, skipped)
