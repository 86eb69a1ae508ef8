# SPDX-License-Identifier: Apache-2.0
"""Stage 2, and stage 3 at its end: a prompt with images on its way through the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops, stages
from ...config import MustDropConfig
from ...ops import TokenType
from ...report import CacheReport, PromptReport, Stopwatch
from ...stages import Pruned, Tokens
from .attention import causal_mask
from .cache import DropCache
from .llava import Llava
from .prompt import read_prompt
from .record import image_reports
from .vision import EncodedImage


class Prefill:
    """Holds what is left of the prompt, and hands every layer the mask and the rotary table that fit."""

    def __init__(
        self,
        llava: Llava,
        config: MustDropConfig,
        stopwatch: Stopwatch,
        features: Sequence[Tensor],  # per image (N, C), at their placeholders
        images: Sequence[EncodedImage],
        inputs: dict[str, Any],  # of the LLaVA body
    ) -> None:
        self.llava = llava
        self.config = config
        self.stopwatch = stopwatch
        self.images = images
        self.prompt = read_prompt(inputs, images, llava.image_token_id, config)
        self.tokens = self.prompt.tokens
        self.held: list[Tokens] = []  # per layer: what it has processed, so what its cache holds
        self.after: dict[int, Tokens] = {}  # pruning layer -> what went on
        self._pruned: Pruned | None = None  # by the layer that is running
        self._mask: Any = None
        self._rotary: Any = None

        embeds = llava.body.get_input_embeddings()(inputs["input_ids"])
        values = torch.cat(list(features)).to(embeds)
        self.embeds = embeds.masked_scatter(self.prompt.placeholders[..., None], values)
        if self.prompt.merged is not None:
            self.embeds = self._take(self.embeds, self.prompt.merged)

    @property
    def whole(self) -> bool:
        """Nothing has gone yet, so the model can be left to itself."""
        return self.tokens is self.prompt.tokens

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The LLaVA body's inputs with the images in place."""
        inputs = {**inputs, "input_ids": None, "inputs_embeds": self.embeds}
        if not self.whole:
            inputs["attention_mask"] = self._alive()
            inputs["position_ids"] = self.tokens.positions
            if inputs.get("cache_position") is not None:  # transformers 4
                inputs["cache_position"] = inputs["cache_position"][: self.tokens.length]
        return inputs

    def layer_inputs(self, layer: int, inputs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A decoder layer's inputs. While nothing is gone they are the model's own, untouched."""
        self.held.append(self.tokens)
        if self.whole:
            return inputs
        # Flash attention would read positions with gaps as several packed sequences; no layer needs them.
        return {**inputs, "attention_mask": self._mask, "position_embeddings": self._rotary, "position_ids": None}

    def attended(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Scores and selects while a pruning layer's queries (B, Hq, L, D) and keys (B, Hk, L, D) are at hand."""
        stage = len(self.after)
        with self.stopwatch.measure(f"layer {self.config.pruning_layers[stage]}"):
            self._pruned = stages.prune(query, key, self.tokens, scale, self.config, stage)

    def shorten(self, layer: int, hidden: Tensor) -> Tensor:
        """A pruning layer's output (B, L, C) without the tokens that it dropped."""
        pruned, self._pruned = self._pruned, None
        assert pruned is not None, f"layer {layer} did not attend"
        if pruned.lengths != self.tokens.lengths:
            with self.stopwatch.measure(f"layer {layer}"):
                hidden = self._take(hidden, pruned)
        self.after[layer] = self.tokens
        return hidden

    def _take(self, hidden: Tensor, pruned: Pruned) -> Tensor:
        """Goes on with fewer tokens: their hidden states, their mask and rotary table (transformers' own)."""
        renumber, backend = self.config.positions == "published", self.config.backend
        self.tokens = self.tokens.take(pruned, renumber=renumber, backend=backend)
        hidden = ops.gather_tokens(hidden, pruned.keep, pruned.counts, align_end=True, backend=backend)
        model = self.llava.language_model
        self._mask = causal_mask(model.config, hidden, self._alive(), past=0)
        self._rotary = model.rotary_emb(hidden, position_ids=self.tokens.positions)
        return hidden

    def _alive(self) -> Tensor | None:  # (B, L)
        return self.tokens.types != TokenType.PADDING if self.tokens.padded else None

    def finish(self, cache: DropCache | None) -> PromptReport:
        """After the last layer: cuts the cache and says what was done. Waits for the device."""
        plain, final = self.prompt.tokens, list(self.held)
        if cache is not None and not self.whole:
            self._evict(cache, final)
            cache.shorten(plain.length, final, renumbered=self.config.positions == "published")
        slot_bytes = 0 if cache is None else cache.slot_bytes
        return PromptReport(
            length=plain.length,
            text=self.prompt.text,
            images=image_reports(self.images, self.prompt.placeholders, self.after),
            layer_tokens=[sum(tokens.vision) for tokens in self.held],
            plain_cache=_cache_report([plain] * len(final), slot_bytes),
            prefill_cache=_cache_report(self.held, slot_bytes),
            final_cache=_cache_report(final, slot_bytes),
            milliseconds=self.stopwatch.read(),
        )

    def _evict(self, cache: DropCache, held: list[Tokens]) -> None:
        """Stage 3. Puts the survivors into `held` where it has cut a layer."""
        first = self.config.first_evicted_layer
        layers = [] if first is None else [i for i in range(first, len(held)) if held[i] is not self.tokens]
        if not layers:
            return
        with self.stopwatch.measure("evict"):
            keys, values = zip(*(cache.stored(i) for i in layers), strict=True)
            cut = stages.evict(keys, values, [held[i] for i in layers], self.tokens, backend=self.config.backend)
            for i, (key, value) in zip(layers, cut, strict=True):
                cache.store(i, key, value)
                held[i] = self.tokens


def _cache_report(held: Sequence[Tokens], slot_bytes: int) -> CacheReport:
    lengths = [tokens.length for tokens in held]
    return CacheReport(lengths, sum(lengths) * slot_bytes)
