# SPDX-License-Identifier: Apache-2.0
"""What all models share: another way through the language model's layers where a prompt with images begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from . import settings, tower
from .batch import Batch, Ledger
from .metadata import Paging, turning
from .prefill import Prefill
from .vision import Marks, split


class Dropping:
    """Stands before one of vLLM's LLaVA models among a class's bases.

    Steps in which no token is dropped and none has been run through vLLM's own code.
    """

    requires_raw_input_tokens = True  # the placeholders show where the images are

    # What the model brings.
    config: Any
    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.drop_config = settings.read(self.config)
        self.ledger = Ledger()
        attention = self._attention_layers()
        self._names = [layer.layer_name for layer in attention]
        self._paging = Paging(attention[0])
        self._prefill = Prefill(self.language_model.model, self.drop_config, self._paging)
        self._vision = tower.build(self, vllm_config, prefix) if self.drop_config.needs_vision_stage else None
        self._marks: Marks | None = None  # of the step that is about to run

    def _attention_layers(self) -> list[Any]:
        """One attention layer per decoder layer, all alike."""
        layers = getattr(getattr(self.language_model, "model", None), "layers", None)
        found: list[Any] = [getattr(getattr(layer, "self_attn", None), "attn", None) for layer in layers or ()]
        if not found or any(layer is None for layer in found):
            raise ValueError(f"mustdrop: {type(self.language_model).__name__} is not built like Llama")
        for layer in found:
            impl = layer.impl
            if impl.sliding_window != -1 or impl.logits_soft_cap or impl.alibi_slopes is not None:
                raise ValueError("mustdrop: sliding windows, soft caps and ALiBi are not served")
        return found

    def check_cache(self) -> None:
        """Refuses a cache that stage 3 cannot read; vLLM chooses it after the model is made."""
        self._paging.check()

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Text and image embeddings; remembers, until the step runs, what stage 1 has made of the placeholders."""
        self._marks = None
        if self._vision is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            multimodal_embeddings, marks = split(multimodal_embeddings, self.config.text_config.hidden_size)
            self._marks = Marks.spread(marks, is_multimodal.to(marks.device))
        model: Any = super()
        return model.embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Hidden states of all rows; those of dropped rows are zero, and nobody reads them."""
        model: Any = super()
        marks, self._marks = self._marks, None
        context = get_forward_context()
        metadata = self._metadata(context)
        if metadata is None or input_ids is None:
            return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        rows = metadata.num_actual_tokens
        placeholders = input_ids[:rows] == self.config.image_token_index
        batch = Batch.of(self.ledger, metadata, placeholders)
        if not batch.beginning and not any(batch.lost):
            return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        with turning(context, self._names) as pages:
            if not batch.beginning:
                left = [length - lost for length, lost in zip(batch.lengths, batch.lost, strict=True)]
                pages.to(self._paging.lay_out(metadata, batch.new, left, batch.lost))
                return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            if inputs_embeds is None:
                inputs_embeds = self.language_model.embed_input_ids(input_ids)
            hidden = inputs_embeds[:rows]
            final, plan = self._prefill.run(
                batch, placeholders, None if marks is None else marks.first(rows), hidden, positions[:rows], pages
            )
        for i in plan.members:
            self.ledger.record(batch.requests[i], plan.dropped[i])
        padding = inputs_embeds.shape[0] - rows
        return final if padding == 0 else torch.nn.functional.pad(final, (0, 0, 0, padding))

    def _metadata(self, context: Any) -> Any:
        """The step's attention metadata; None while vLLM measures or warms up."""
        found = context.attn_metadata
        return found[self._names[0]] if found and self._names[0] in found else None
