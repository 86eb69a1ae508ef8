# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 that drops vision tokens: vLLM's own model, with another way through its layers where an image begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from . import settings
from .batch import Batch, Ledger
from .pages import READABLE, Paging, turning
from .prefill import Prefill
from .vision import VisionMerge, split


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class MustDropLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Steps in which no token is dropped and none has been run through vLLM's own code."""

    requires_raw_input_tokens = True  # the placeholders show where the images are

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        hf_config = vllm_config.model_config.hf_config
        self.drop_config = settings.read(hf_config)
        self.ledger = Ledger()
        attention = self._attention_layers()
        self._names = [layer.layer_name for layer in attention]
        self._paging = Paging(attention[0])
        self._prefill = Prefill(self.language_model.model, self.drop_config, self._paging)
        self._merge = self._make_merge(hf_config) if self.drop_config.merge else None
        self._empty: Tensor | None = None  # (rows) bool, of the step that is about to run

    def _attention_layers(self) -> list[Any]:
        """One attention layer per decoder layer, all alike."""
        layers = getattr(getattr(self.language_model, "model", None), "layers", None)
        found = [getattr(getattr(layer, "self_attn", None), "attn", None) for layer in layers or ()]
        if not found or any(layer is None for layer in found):
            raise ValueError(f"mustdrop: {type(self.language_model).__name__} is not built like Llama")
        for layer in found:
            impl = layer.impl
            if impl.sliding_window != -1 or impl.logits_soft_cap or impl.alibi_slopes is not None:
                raise ValueError("mustdrop: sliding windows, soft caps and ALiBi are not served")
        return found

    def _make_merge(self, hf_config: Any) -> VisionMerge:
        vision = hf_config.vision_config
        strategy = hf_config.vision_feature_select_strategy
        if vision.model_type != "clip_vision_model" or strategy != "default":
            raise ValueError(
                "mustdrop: merge needs a CLIP vision tower with vision_feature_select_strategy='default', got "
                f"{vision.model_type!r} with {strategy!r}; merge=False leaves the tower alone"
            )
        side = vision.image_size // vision.patch_size
        return VisionMerge(self.vision_tower.vision_model.encoder.layers, (side, side), self.drop_config)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of each image at its placeholders."""
        features = super().embed_multimodal(**kwargs)
        if self._merge is None or kwargs.get("pixel_values") is None:
            return features
        return self._merge.place(features)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Text and image embeddings; remembers, until the step runs, which placeholders are empty."""
        self._empty = None
        if self._merge is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            multimodal_embeddings, holds = split(multimodal_embeddings, self.config.text_config.hidden_size)
            where = is_multimodal.to(holds.device)
            self._empty = torch.zeros_like(where).masked_scatter_(where, ~holds)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Hidden states of all rows; those of dropped rows are zero, and nobody reads them."""
        empty, self._empty = self._empty, None
        context = get_forward_context()
        metadata = self._metadata(context)
        if metadata is None or input_ids is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        rows = metadata.num_actual_tokens
        placeholders = input_ids[:rows] == self.config.image_token_index
        batch = Batch.of(self.ledger, metadata, placeholders)
        if not any(batch.images) and not any(batch.lost):
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        with turning(context, self._names) as pages:
            if not any(batch.images):
                left = [length - lost for length, lost in zip(batch.lengths, batch.lost, strict=True)]
                pages.to(self._paging.lay_out(metadata, batch.new, left, batch.lost))
                return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            if inputs_embeds is None:
                inputs_embeds = self.language_model.embed_input_ids(input_ids)
            hidden = inputs_embeds[:rows]
            final, prompts = self._prefill.run(
                batch, placeholders, None if empty is None else empty[:rows], hidden, positions[:rows], pages
            )
        for i in prompts.members:
            self.ledger.record(batch.requests[i], prompts.lost[i])
        padding = inputs_embeds.shape[0] - rows
        return final if padding == 0 else torch.nn.functional.pad(final, (0, 0, 0, padding))

    def _metadata(self, context: Any) -> Any:
        """The step's attention metadata; None while vLLM measures or warms up."""
        found = context.attn_metadata
        if not found or self._names[0] not in found:
            return None
        isa = self._paging.attention.isa
        if isa not in READABLE:
            raise RuntimeError(f"mustdrop: the CPU attention's cache layout {isa!r} is not served, only {READABLE}")
        return found[self._names[0]]
