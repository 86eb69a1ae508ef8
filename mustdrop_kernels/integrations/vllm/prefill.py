# SPDX-License-Identifier: Apache-2.0
"""A step in which prompts with images begin: stage 2 layer by layer, and stage 3 at its end."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tp_group

from ...config import MustDropConfig
from ...plans import PackedDropPlan
from .batch import Batch
from .metadata import Pages, Paging, Turner, cache_views
from .vision import Marks


class Prefill:
    """Runs the layers of a Llama-like language model one by one, with fewer rows after each pruning layer."""

    def __init__(self, model: Any, config: MustDropConfig, paging: Paging) -> None:  # vLLM's LlamaModel
        self._model, self._config, self._paging = model, config, paging
        self._looked: tuple[Tensor, Tensor] | None = None  # queries and keys of the pruning layer that is running
        self._looking = False
        for index in config.pruning_layers:
            model.layers[index].self_attn.attn.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._looking:
            self._looked = (args[0], args[1])

    def run(
        self,
        batch: Batch,
        placeholders: Tensor,  # (rows) bool
        marks: Marks | None,  # what stage 1 has made of the placeholders; None: nothing
        hidden: Tensor,  # (rows, C)
        positions: Tensor,  # (rows) int64
        pages: Turner,
    ) -> tuple[Tensor, PackedDropPlan]:
        """The final hidden states (rows, C), zero where a row was dropped, and what became of the prompts."""
        key = None if marks is None else marks.key
        ranks = get_tp_group()
        group = ranks.device_group if ranks.world_size > 1 else None
        plan = PackedDropPlan(batch.new, batch.beginning, placeholders, self._config, is_key_token=key, group=group)
        if marks is not None and self._config.merge:
            rows = plan.drop_empty(marks.empty)
            hidden, positions = plan.take(hidden, rows), plan.take(positions, rows)
        self._looking = True
        try:
            hidden = self._run_layers(batch, plan, hidden, positions, pages)
        finally:
            self._looking, self._looked = False, None
        keys, values = zip(*(cache_views(layer.self_attn.attn.kv_cache) for layer in self._model.layers), strict=True)
        plan.compact_caches(keys, values, batch.metadata.block_table)
        return hidden.new_zeros(batch.rows, hidden.shape[1]).index_copy_(0, plan.rows, hidden), plan

    def _run_layers(
        self, batch: Batch, plan: PackedDropPlan, hidden: Tensor, positions: Tensor, pages: Turner
    ) -> Tensor:
        residual: Tensor | None = None
        pages.to(self._pages(batch, plan))
        for index, layer in enumerate(self._model.layers):
            plan.begin_layer()
            hidden, residual = layer(positions, hidden, residual)
            if index in self._config.pruning_layers:
                rows = plan.prune(*self._attended(layer.self_attn.attn), layer.self_attn.attn.impl.scale)
                hidden, residual, positions = (plan.take(x, rows) for x in (hidden, residual, positions))
                pages.to(self._pages(batch, plan))
        return self._model.norm(hidden, residual)[0]

    def _attended(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Queries (live, Hq, D) and keys (live, Hk, D) of the layer that has just run."""
        looked, self._looked = self._looked, None
        assert looked is not None
        query, key = looked
        return query.unflatten(-1, (-1, attention.head_size)), key.unflatten(-1, (-1, attention.head_size))

    def _pages(self, batch: Batch, plan: PackedDropPlan) -> Pages:
        """Until nothing more goes, what is left of a prompt stands at the front of its own blocks.

        After that it stands where it will stay, with the leading blocks empty.
        """
        lost = [before + now for before, now in zip(batch.lost, plan.dropped, strict=True)]
        lengths = [length - gone for length, gone in zip(batch.lengths, lost, strict=True)]
        return self._paging.lay_out(batch.metadata, plan.counts, lengths, lost if plan.final else batch.lost)
