# SPDX-License-Identifier: Apache-2.0
"""Steps in which prompts with images begin: stage 2 layer by layer, and stage 3 at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tp_group

from ...plans import PackedDropPlan
from .adapters import set_adapters
from .attention import AttentionBackend
from .eager_kernels import EagerKernels
from .layout import MetadataSwap, remaining_rows
from .step import Step
from .vision import PlaceholderFlags


class Prefill:
    """Runs the layers of a Llama-like language model one by one, with fewer rows after each pruning layer."""

    def __init__(self, model: Any, attention: AttentionBackend) -> None:  # vLLM's LlamaModel
        self._model, self._attention, self._kernels = model, attention, EagerKernels(model)
        self._query_key: tuple[Tensor, Tensor] | None = None  # of the pruning layer that is running

    def run(
        self,
        step: Step,
        flags: PlaceholderFlags | None,  # of stage 1; None: it has not run
        hidden: Tensor,  # (rows, C)
        positions: Tensor,  # (rows) int64
        swap: MetadataSwap,
        block_size: int,
        lora_manager: Any = None,  # vLLM's
    ) -> tuple[Tensor, PackedDropPlan]:
        """The final hidden states (rows, C), zero in dropped rows, and the plan after the last layer."""
        is_key_token = None if flags is None else flags.is_key_token
        ranks = get_tp_group()
        group = ranks.device_group if ranks.world_size > 1 else None
        placeholders = step.placeholders(hidden.device)
        plan = PackedDropPlan(
            step.new, step.beginning, placeholders, step.config, is_key_token=is_key_token, group=group
        )
        if flags is not None and step.config.merge:
            rows = plan.drop_empty(flags.empty)
            hidden, positions = plan.take(hidden, rows), plan.take(positions, rows)

        def lay_out() -> None:  # attention metadata and adapters of the live rows
            common = remaining_rows(step, plan, block_size)
            swap.use(self._attention.build(step.groups, common), common.slot_mapping)
            if lora_manager is not None:
                set_adapters(lora_manager, [request.adapter for request in step.requests], plan.counts)

        with self._recording(step.config.pruning_layers), self._kernels.enabled():
            hidden = self._run_layers(plan, hidden, positions, lay_out)
        plan.compact_caches(*self._attention.caches(), step.block_table)
        return hidden.new_zeros(step.rows, hidden.shape[1]).index_copy_(0, plan.rows, hidden), plan

    @contextlib.contextmanager
    def _recording(self, layers: tuple[int, ...]) -> Iterator[None]:
        """Records queries and keys of these layers, after RoPE."""

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._query_key = (args[0], args[1])

        hooks = [self._attention.layers[index].register_forward_pre_hook(record) for index in layers]
        try:
            yield
        finally:
            self._query_key = None
            for hook in hooks:
                hook.remove()

    def _run_layers(
        self, plan: PackedDropPlan, hidden: Tensor, positions: Tensor, lay_out: Callable[[], None]
    ) -> Tensor:
        residual: Tensor | None = None
        lay_out()
        for index, layer in enumerate(self._model.layers):
            plan.begin_layer()
            hidden, residual = layer(positions, hidden, residual)
            if index in plan.config.pruning_layers:
                attention = self._attention.layers[index]
                rows = plan.prune(*self._pop_query_key(attention), attention.impl.scale)
                hidden, residual, positions = (plan.take(x, rows) for x in (hidden, residual, positions))
                lay_out()
        return self._model.norm(hidden, residual)[0]

    def _pop_query_key(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Queries (live, Hq, D) and keys (live, Hk, D) of the layer that has just run."""
        recorded, self._query_key = self._query_key, None
        assert recorded is not None
        query, key = recorded
        return query.unflatten(-1, (-1, attention.head_size)), key.unflatten(-1, (-1, attention.head_size))
