# SPDX-License-Identifier: Apache-2.0
"""Base class of the models: replaces the pass through the language model in steps where prompts with images begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from . import settings, tower
from .batch import Batch, DropRecord
from .metadata import MetadataBuilder, metadata_swap
from .prefill import Prefill
from .vision import PlaceholderFlags, split_contents


class DropTokensMixin:
    """Precedes one of vLLM's LLaVA models among the bases of a class.

    vLLM's own code runs the steps in which no token is dropped and no request has lost any.
    """

    # Attributes of the model.
    config: Any
    language_model: Any
    lora_manager: Any = None  # set by vLLM

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.drop_config = settings.read(self.config)
        self.drop_record = DropRecord()
        attention = self._attention_layers()
        self._names = [layer.layer_name for layer in attention]
        self._metadata = MetadataBuilder(attention[0])
        self._prefill = Prefill(self.language_model.model, self.drop_config, self._metadata)
        has_tower = vllm_config.model_config.multimodal_config.get_limit_per_prompt("image") > 0
        stage_1 = self.drop_config.needs_vision_stage and has_tower
        self._vision = tower.build(self, vllm_config, prefix) if stage_1 else None
        self._flags: PlaceholderFlags | None = None  # of the next step

    def _attention_layers(self) -> list[Any]:
        """The attention layer of each decoder layer.

        Raises:
            ValueError: a layer is not full softmax attention as in Llama.
        """
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
        """Raises ``ValueError`` if stage 3 cannot read the cache, which vLLM chooses after the model is built."""
        self._metadata.check()

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Text and image embeddings; keeps the flags of the placeholders for the step's ``forward``."""
        self._flags = None
        if self._vision is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            multimodal_embeddings, contents = split_contents(multimodal_embeddings, self.config.text_config.hidden_size)
            self._flags = PlaceholderFlags.of(contents, is_multimodal.to(contents.device))
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
        """Hidden states of all rows; those of dropped rows are zero and never read."""
        model: Any = super()
        flags, self._flags = self._flags, None
        context = get_forward_context()
        metadata = self._plain_metadata(context)
        if metadata is None:
            return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        batch = Batch.of(self.drop_record, metadata)
        if not batch.beginning and not any(batch.dropped_before):
            return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        with metadata_swap(context, self._names) as swap:
            if not batch.beginning:
                dropped = batch.dropped_before
                lengths = [length - count for length, count in zip(batch.lengths, dropped, strict=True)]
                swap.use(self._metadata.build(metadata, batch.new, lengths, dropped))
                return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            assert inputs_embeds is not None  # as in every step of a model with images
            rows = batch.rows
            flags = None if flags is None else flags.first(rows)
            final, plan = self._prefill.run(
                batch, flags, inputs_embeds[:rows], positions[:rows], swap, self.lora_manager
            )
        for i in plan.members:
            self.drop_record.add(batch.requests[i].name, plan.dropped[i])
        padding = inputs_embeds.shape[0] - rows
        return final if padding == 0 else torch.nn.functional.pad(final, (0, 0, 0, padding))

    def _plain_metadata(self, context: Any) -> Any:
        """vLLM's attention metadata of the step; None in profiling and warm-up runs."""
        found = context.attn_metadata
        return found[self._names[0]] if found and self._names[0] in found else None
