# SPDX-License-Identifier: Apache-2.0
"""A step in which prompts with images begin: stage 2 layer by layer, and stage 3 at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...config import MustDropConfig
from .batch import Batch
from .pages import Pages, Paging, Turner, cache_views, without_leading
from .prompts import Prompts, survivors
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
    ) -> tuple[Tensor, Prompts]:
        """The final hidden states (rows, C), zero where a row was dropped, and what became of the prompts."""
        self._looking = True
        try:
            return self._run(batch, placeholders, marks, hidden, positions, pages)
        finally:
            self._looking, self._looked = False, None

    def _run(
        self, batch: Batch, placeholders: Tensor, marks: Marks | None, hidden: Tensor, positions: Tensor, pages: Turner
    ) -> tuple[Tensor, Prompts]:
        prompts = Prompts(batch, placeholders, None if marks is None else marks.key, self._config)
        residual: Tensor | None = None
        if marks is not None and self._config.merge:
            hidden, _, positions = self._take(prompts.leave_out(marks.empty), hidden, None, positions)
        pages.to(self._pages(prompts))
        held = []
        for index, layer in enumerate(self._model.layers):
            hidden, residual = layer(positions, hidden, residual)
            held.append(prompts.rows)
            if index in self._config.pruning_layers:
                chosen = prompts.prune(*self._attended(layer.self_attn.attn), layer.self_attn.attn.impl.scale)
                hidden, residual, positions = self._take(chosen, hidden, residual, positions)
                pages.to(self._pages(prompts))
        hidden, _ = self._model.norm(hidden, residual)
        self._compact(prompts, held)
        full = hidden.new_zeros(batch.rows, hidden.shape[1])
        return full.index_copy_(0, prompts.rows, hidden), prompts

    def _attended(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Queries (live, Hq, D) and keys (live, Hk, D) of the layer that has just run."""
        looked, self._looked = self._looked, None
        assert looked is not None
        query, key = looked
        return query.unflatten(-1, (-1, attention.head_size)), key.unflatten(-1, (-1, attention.head_size))

    def _take(
        self, chosen: Tensor, hidden: Tensor, residual: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The chosen rows (left) of what goes from layer to layer."""
        count = torch.tensor([len(chosen)], dtype=torch.int32, device=chosen.device)

        def gather(x: Tensor) -> Tensor:
            return ops.gather_tokens(x[None], chosen[None], count, backend=self._config.backend)[0]

        return gather(hidden), None if residual is None else gather(residual), gather(positions)

    def _pages(self, prompts: Prompts) -> Pages:
        """Until nothing more goes, what is left of a prompt stands at the front of its own blocks.

        After that it stands where it will stay, with the leading blocks empty.
        """
        batch = prompts.batch
        lengths = [length - lost for length, lost in zip(batch.lengths, prompts.lost, strict=True)]
        lost = prompts.lost if prompts.final else batch.lost
        return self._paging.lay_out(batch.metadata, prompts.counts, lengths, lost)

    def _compact(self, prompts: Prompts, held: Sequence[Tensor]) -> None:
        """Stage 3: brings the survivors of all layers to where the last layers have them."""
        moving = [i for i, rows in enumerate(held) if rows is not prompts.rows]
        lost = [prompts.lost[i] for i in prompts.members]
        if not moving or not any(lost):
            return
        keep, counts = survivors(prompts, [held[i] for i in moving])
        attention = [self._model.layers[i].self_attn.attn for i in moving]
        keys, values = zip(*(cache_views(layer.kv_cache) for layer in attention), strict=True)
        table = prompts.batch.metadata.block_table[prompts.members]
        lengths = counts + torch.tensor(lost, device=counts.device).int()
        backend, shared = self._config.backend, [counts] * len(moving)
        ops.compact_paged_kv_(
            keys, values, table, keep, shared, seq_lens=lengths, align_end=True, backend=backend
        )
        # They stand at the end of the prompt now. Where the drop was no whole number of blocks, they move on to the
        # beginning of the first block that they need.
        slots = self._paging.block_slots
        gap = torch.tensor([n % slots for n in lost], device=table.device)
        if not gap.any():
            return
        blocks = torch.tensor([n // slots for n in lost], device=table.device)
        place = torch.arange(keep[0].shape[1], device=table.device) + gap[:, None]
        place = place.masked_fill(place >= counts[:, None] + gap[:, None], -1)
        ops.compact_paged_kv_(keys, values, without_leading(table, blocks), [place], [counts], backend=backend)
