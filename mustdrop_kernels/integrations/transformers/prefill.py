# SPDX-License-Identifier: Apache-2.0
"""Stage 2, and stage 3 at its end: a prompt with images on its way through the language model.

``plans.PaddedDropPlan`` decides and keeps the books; what transformers needs to hear of it is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...config import MustDropConfig
from ...ops import TokenType
from ...parallel import mean_over_ranks
from ...placeholders import EncodedImage
from ...plans import PaddedDropPlan
from ...report import CacheReport, PromptReport, Stopwatch
from ...stages import Pruned, Tokens
from .attention import causal_mask
from .cache import DropCache
from .families import Family
from .image_reports import image_reports
from .prompt import read_prompt
from .shortened_cache import Held
from .static_cache import DropStaticCache


class Prefill:
    """Hands every layer the mask and the rotary table that fit what is left of the prompt."""

    def __init__(
        self,
        family: Family,
        config: MustDropConfig,
        stopwatch: Stopwatch,
        images: Mapping[str, Sequence[EncodedImage]],  # by modality
        input_ids: Tensor | None,  # (B, L)
        inputs: dict[str, Any],  # of the language model: the images are in inputs_embeds
        cache: DropCache | DropStaticCache | None,
        *,
        heat_maps: bool = False,
    ) -> None:
        self.family = family
        self.config = config
        self.stopwatch = stopwatch
        embeds = inputs["inputs_embeds"]
        positions = family.read_positions(inputs.get("position_ids"), embeds)
        token_ids = {modality: family.token_id(modality) for modality in images}
        mask, seen = inputs.get("attention_mask"), 0 if cache is None else cache.seen
        self.past = cache.past(mask, embeds.shape[0], embeds.device) if cache is not None and seen > 0 else None
        self.shortened = cache is not None and cache.shortened  # before this prompt
        self.static = cache if isinstance(cache, DropStaticCache) else None
        own = mask if mask is None else mask[:, seen:]
        self.prompt = read_prompt(input_ids, own, positions, images, token_ids, config)
        self.plan = PaddedDropPlan(self.prompt.tokens, config, text_queries=self.prompt.voters, group=family.ranks)
        self.after: dict[int, Tokens] = {}  # pruning layer -> what went on
        self.heat: dict[int, Tensor] | None = {} if heat_maps else None  # layer -> (B, L) of the plain prompt
        self._chosen: Pruned | None = None  # by the pruning layer that is running; None: all go on
        self._masks: dict[int, Any] = {}  # by what a layer's cache held before
        self._rotary: Any = None

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The language model's inputs without the placeholders that stage 1 has emptied."""
        if self.shortened:
            inputs = {**inputs, "attention_mask": None}  # each layer gets one of its own
        if self.prompt.left == self.prompt.tokens.lengths:
            return inputs
        chosen = self.plan.drop_empty(self.prompt.empty, self.prompt.left)
        inputs = {**inputs, "inputs_embeds": self._go_on(inputs["inputs_embeds"], chosen)}
        if not self.plan.nothing_dropped:
            tokens = self.plan.tokens
            inputs["attention_mask"] = _alive(tokens) if self.past is None else None
            inputs["position_ids"] = self.family.position_ids(tokens.positions)
            if inputs.get("cache_position") is not None:  # transformers 4
                inputs["cache_position"] = inputs["cache_position"][: tokens.length]
        return inputs

    def layer_inputs(self, layer: int, inputs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A decoder layer's inputs. While nothing is gone they are the model's own, untouched."""
        self.plan.begin_layer()
        past = None if self.past is None else self.past[layer]
        if past is not None:
            self.plan.past_types = torch.where(past.real(), int(TokenType.TEXT), int(TokenType.PADDING)).to(torch.uint8)
        if self.plan.nothing_dropped and not self.shortened:
            return inputs
        if self.static is not None:
            self.static.show(layer, self._end(layer))
        inputs = {**inputs, "attention_mask": self._mask(past, hidden)}
        if self.plan.nothing_dropped:
            return inputs
        # Flash attention would read positions with gaps as several packed sequences; no layer needs them.
        return {**inputs, "position_embeddings": self._rotary, "position_ids": None}

    def _mask(self, past: Held | None, hidden: Tensor) -> Any:
        """transformers' own mask; layers whose caches hold the same share it."""
        if id(past) not in self._masks:
            tokens = Held.of(self.plan.tokens)
            seen = tokens if past is None else past.followed_by(tokens)
            config, length = self.family.language_model.config, 0 if past is None else past.length
            self._masks[id(past)] = causal_mask(config, hidden, seen.alive, past=length)
        return self._masks[id(past)]

    def _end(self, layer: int) -> int:
        """Slots that the layer which runs has filled when it attends."""
        return self.plan.tokens.length + (0 if self.past is None else self.past[layer].length)

    def attended(self, layer: int, query: Tensor, key: Tensor, scale: float, *, lse: Tensor | None = None) -> None:
        """Scores and selects while a pruning layer's queries (B, Hq, L, D) and keys (B, Hk, L, D) are at hand.

        And, where its attention says it, the lse (B, Hq, L) of the rows.
        """
        key = key[:, :, : self._end(layer)]  # of a static cache that is the whole buffer
        if self.heat is not None:
            self.heat[layer] = self._look(query, key, scale, lse)
        if layer not in self.config.pruning_layers:
            return
        with self.stopwatch.measure(f"layer {self.config.pruning_layers[len(self.after)]}"):
            self._chosen = self.plan.prune(query, key, scale, lse=lse)

    def _look(
        self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None
    ) -> Tensor:  # (B, plain length) float32
        """What the text that votes looks at, mean over its tokens and heads; nan where no vision token is left."""
        tokens, group = self.plan.tokens, self.family.ranks
        found, _ = ops.text_vision_scores(
            query.detach(), key.detach(), self.plan.key_types, scale, lse=lse, backend=self.config.backend
        )
        found = found[:, found.shape[1] - tokens.length :]
        found = found if group is None else mean_over_ranks(found, group)
        rows, columns = (tokens.types == TokenType.VISION).nonzero(as_tuple=True)
        voters = torch.tensor(self.prompt.voters, device=found.device).clamp(min=1)
        heat = found.new_full((len(voters), self.plan.prompt_tokens.length), torch.nan)
        heat[rows, tokens.index[rows, columns]] = found[rows, columns] / voters[rows]
        return heat

    def shorten(self, layer: int, hidden: Tensor) -> Tensor:
        """A pruning layer's output (B, L, C) without the tokens that it dropped."""
        chosen, self._chosen = self._chosen, None
        if chosen is not None:
            with self.stopwatch.measure(f"layer {layer}"):
                hidden = self._go_on(hidden, chosen)
        self.after[layer] = self.plan.tokens
        return hidden

    def _go_on(self, hidden: Tensor, chosen: Pruned | None) -> Tensor:
        """With fewer tokens: their hidden states and their rotary table (transformers' own)."""
        hidden, tokens = self.plan.take(hidden, chosen), self.plan.tokens
        self._masks = {}
        self._rotary = self.family.rotary(hidden, tokens.positions)
        return hidden

    def finish(self, cache: DropCache | DropStaticCache | None) -> PromptReport:
        """After the last layer: cuts the cache and says what was done. Waits for the device."""
        plan, processed = self.plan, list(self.plan.cached_tokens)
        before = [0] * len(processed) if self.past is None else [past.length for past in self.past]
        if self.static is not None:
            for i in range(len(processed)):
                self.static.show(i, None)
        if cache is not None and not plan.nothing_dropped:
            plain = plan.prompt_tokens.length + (0 if self.past is None else cache.seen - processed[0].length)
            self._commit(cache)
            cache.shorten(plain, self._held(), renumbered=self.config.positions == "published")
        slot_bytes = 0 if cache is None else cache.slot_bytes
        return PromptReport(
            length=plan.prompt_tokens.length,
            text=self.prompt.text,
            images=image_reports(self.prompt.images, self.prompt.placeholders, self.after, self.heat or {}),
            layer_tokens=[sum(tokens.vision_token_counts) for tokens in processed],
            plain_cache=_cache_report([plan.prompt_tokens] * len(processed), before, slot_bytes),
            prefill_cache=_cache_report(processed, before, slot_bytes),
            final_cache=_cache_report(plan.cached_tokens, before, slot_bytes),
            milliseconds=self.stopwatch.read(),
        )

    def _held(self) -> list[Held]:
        """What each layer's cache holds; layers that hold the same share it."""
        pasts: Sequence[Held | None] = [None] * len(self.plan.cached_tokens) if self.past is None else self.past
        pairs = list(zip(pasts, self.plan.cached_tokens, strict=True))
        found: dict[tuple[int, int], Held] = {}
        for past, tokens in pairs:
            if (id(past), id(tokens)) not in found:
                own = Held.of(tokens)
                found[id(past), id(tokens)] = own if past is None else past.followed_by(own)
        return [found[id(past), id(tokens)] for past, tokens in pairs]

    def _commit(self, cache: DropCache | DropStaticCache) -> None:
        """Stage 3."""
        layers = self.plan.layers_to_compact
        if not layers:
            return
        with self.stopwatch.measure("evict"):
            begins = [0 if self.past is None else self.past[i].length for i in layers]
            stored = [
                [x[:, :, begin:] for x in cache.stored(i, begin + self.plan.cached_tokens[i].length)]
                for i, begin in zip(layers, begins, strict=True)
            ]
            cut = self.plan.compact_caches(*zip(*stored, strict=True), to_front=self.static is not None)
            for i, begin, (key, value) in zip(layers, begins, cut, strict=True):
                cache.store(i, begin, key, value)


def _alive(tokens: Tokens) -> Tensor | None:  # (B, L)
    return tokens.types != TokenType.PADDING if tokens.padded else None


def _cache_report(held: Sequence[Tokens], before: Sequence[int], slot_bytes: int) -> CacheReport:
    lengths = [past + tokens.length for past, tokens in zip(before, held, strict=True)]
    return CacheReport(lengths, sum(lengths) * slot_bytes)
