# SPDX-License-Identifier: Apache-2.0
"""Base class of the models: replaces the pass through the language model in steps where prompts with images begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from . import settings, tower
from .attention import backend_of
from .layout import metadata_swap
from .prefill import Prefill
from .record import DropRecord
from .step import Step, StepSource
from .vision import PlaceholderFlags, split_contents


class DropTokensMixin:
    """Precedes one of vLLM's LLaVA models among the bases of a class.

    vLLM's own code runs the steps in which no token is dropped.
    """

    # Attributes of the model.
    config: Any
    language_model: Any
    lora_manager: Any = None  # set by vLLM

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.drop_config = settings.read(self.config)
        self.drop_record = DropRecord()
        layers = self._attention_layers()
        self.attention = backend_of(layers)
        self.attention_names = [layer.layer_name for layer in layers]
        self._prefill = Prefill(self.language_model.model, self.attention)
        has_tower = vllm_config.model_config.multimodal_config.get_limit_per_prompt("image") > 0
        stage_1 = self.drop_config.needs_vision_stage and has_tower
        self._vision = tower.build(self, vllm_config, prefix) if stage_1 else None
        self._flags: PlaceholderFlags | None = None  # of the next step
        self._steps: StepSource | None = None

    @staticmethod
    def get_model_state_cls() -> type:
        """The state by which vLLM's model runner V2 serves this model."""
        from .runner_v2 import MustDropModelState

        return MustDropModelState

    def connect(self, steps: StepSource) -> None:
        """Sets the model runner from which the model receives its steps."""
        self._steps = steps

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
            if layer.sliding_window is not None or impl.logits_soft_cap or impl.alibi_slopes is not None:
                raise ValueError("mustdrop: sliding windows, soft caps and ALiBi are not served")
        return found

    def check_cache(self, kv_cache_config: Any) -> None:
        """Reads the block size of the allocated cache; raises ``ValueError`` if stage 3 cannot compact it."""
        groups = kv_cache_config.kv_cache_groups
        if len(groups) > 1:
            raise ValueError(f"mustdrop: the layers share one block table, but vLLM made {len(groups)} groups of them")
        self.block_size = groups[0].kv_cache_spec.block_size
        self.attention.check(self.block_size)

    def encode_plainly(self, plainly: bool) -> None:
        """Images that are encoded from now on pass through stage 1, or not."""
        if self._vision is not None:
            self._vision.paused = plainly

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
        if self._steps is None:  # profiling
            return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        context = get_forward_context()
        with self._steps.step(context) as step:
            if step is None:
                return model.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            assert inputs_embeds is not None  # as in every step of a model with images
            return self._drop(step, flags, positions, inputs_embeds, context)

    def _drop(
        self, step: Step, flags: PlaceholderFlags | None, positions: Tensor, embeddings: Tensor, context: Any
    ) -> Tensor:
        rows = step.rows
        flags = None if flags is None else flags.first(rows)
        with metadata_swap(context, self.attention_names) as swap:
            final, plan = self._prefill.run(
                step, flags, embeddings[:rows], positions[:rows], swap, self.block_size, self.lora_manager
            )
        for i in plan.members:
            name, dropped = step.requests[i].name, plan.dropped[i]
            self.drop_record.add(name, dropped)
            step.report(name, dropped)
        padding = embeddings.shape[0] - rows
        return final if padding == 0 else torch.nn.functional.pad(final, (0, 0, 0, padding))
