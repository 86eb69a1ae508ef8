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
from .keys import KeyLayer
from .pages import Paging, turning
from .prefill import Prefill
from .vision import Marks, VisionStage, split


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
        self._vision = self._make_vision_stage(vllm_config, prefix) if self.drop_config.needs_vision_stage else None
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

    def _make_vision_stage(self, vllm_config: Any, prefix: str) -> VisionStage:
        """Stage 1 needs a tower with one CLS token before the patches, and features without it."""
        hf_config, config = self.config, self.drop_config
        vision = hf_config.vision_config
        strategy = hf_config.vision_feature_select_strategy
        if vision.model_type != "clip_vision_model" or strategy != "default":
            raise ValueError(
                "mustdrop: merging and key tokens need a CLIP vision tower with "
                f"vision_feature_select_strategy='default', got {vision.model_type!r} with {strategy!r}; merge=False "
                "and key_rate=0.0 leave the tower alone"
            )
        layers = self.vision_tower.vision_model.encoder.layers
        running = list(layers)
        key_layer = None
        if config.key_rate > 0:
            if len(running) != vision.num_hidden_layers - 1:
                raise ValueError(
                    "mustdrop: key_rate needs vision_feature_layer=-2, the input of the tower's last layer, got "
                    f"{hf_config.vision_feature_layer}; key_rate=0.0 leaves the tower alone"
                )
            name = f"{prefix}.vision_tower" if prefix else "vision_tower"
            name = f"{name}.vision_model.encoder.layers.{len(running)}"
            with self._mark_tower_model(vllm_config, "image"):
                key_layer = KeyLayer(vision, vllm_config.quant_config, name, config)
            layers.append(key_layer)
        side = vision.image_size // vision.patch_size
        return VisionStage(running, (side, side), config, key_layer)

    def check_cache(self) -> None:
        """Refuses a cache that stage 3 cannot read; vLLM chooses it after the model is made."""
        self._paging.check()

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of each image at its placeholders."""
        pixels: Any = kwargs.get("pixel_values")  # (images, 3, H, W)
        if self._vision is None or pixels is None:
            return super().embed_multimodal(**kwargs)
        placed = []
        for images in pixels.split(1) if self._vision.one_by_one else [pixels]:
            features = super().embed_multimodal(**{**kwargs, "pixel_values": images})
            placed.append(self._vision.place(features))
        return torch.cat(placed)

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
        marks, self._marks = self._marks, None
        context = get_forward_context()
        metadata = self._metadata(context)
        if metadata is None or input_ids is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        rows = metadata.num_actual_tokens
        placeholders = input_ids[:rows] == self.config.image_token_index
        batch = Batch.of(self.ledger, metadata, placeholders)
        if not batch.beginning and not any(batch.lost):
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        with turning(context, self._names) as pages:
            if not batch.beginning:
                left = [length - lost for length, lost in zip(batch.lengths, batch.lost, strict=True)]
                pages.to(self._paging.lay_out(metadata, batch.new, left, batch.lost))
                return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
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
        if not found or self._names[0] not in found:
            return None
        return found[self._names[0]]
