# SPDX-License-Identifier: Apache-2.0
"""Stages 2 and 3 of a prompt with images on its way through transformers' language model.

``plans.PaddedDropPlan`` selects the tokens and keeps the state; this module adapts masks, rotary tables and caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...config import MustDropConfig
from ...ops import TokenType
from ...placeholders import EncodedImage
from ...plans import PaddedDropPlan
from ...report import CacheReport, PromptReport, Stopwatch
from ...stages import Pruned, Tokens
from .attention import causal_mask
from .cache import DropCache
from .families import Family
from .image_reports import image_reports
from .masks import GivenMask
from .prompt import find_placeholders, read_prompt
from .shortened_cache import LayerTokens
from .static_cache import DropStaticCache


class Prefill:
    """A pass over a prompt: each layer gets the mask and the rotary table of the remaining tokens."""

    def __init__(
        self,
        family: Family,
        config: MustDropConfig,
        stopwatch: Stopwatch,
        images: Mapping[str, Sequence[EncodedImage]],  # by modality
        input_ids: Tensor | None,  # (B, L)
        inputs: dict[str, Any],  # of the language model: the images are in inputs_embeds
        mask: GivenMask,
        cache: DropCache | DropStaticCache | None,
        *,
        heat_maps: bool = False,
    ) -> None:
        self.family = family
        self.config = config
        self.stopwatch = stopwatch
        embeds = inputs["inputs_embeds"]
        shape, seen = embeds.shape[:2], 0 if cache is None else cache.seen
        positions = family.read_positions(inputs.get("position_ids"), embeds, seen)
        placeholders = find_placeholders(input_ids, {modality: family.token_id(modality) for modality in images})
        mask.check(shape, seen)
        real = mask.real_tokens(placeholders.values(), seen)
        self.given_mask, self.seen = mask, seen
        self.past = cache.past_tokens(real, shape[0], embeds.device) if cache is not None and seen > 0 else None
        self.shortened = cache is not None and cache.shortened  # before this prompt
        if self.shortened and (mask.dense is not None or mask.unknown is not None):
            raise ValueError("behind a cache that drop_tokens has shortened attention_mask must be (B, L)")
        self.static = cache if isinstance(cache, DropStaticCache) else None
        own = real if real is None else real[:, seen:]
        self.prompt = prompt = read_prompt(placeholders, own, positions, images, config)
        mask.check_queries(prompt.tokens.types, seen)
        self.hidden: Tensor | None = None  # (B, seen + L), tokens that the mask hides
        if real is not None and (seen or prompt.tokens.padded):
            self.hidden = ~real.bool()
        self.plan = PaddedDropPlan(prompt.tokens, config, text_queries=prompt.text_queries, group=family.ranks)
        self.after: dict[int, Tokens] = {}  # pruning layer -> remaining tokens
        self.heat: dict[int, Tensor] | None = {} if heat_maps else None  # layer -> (B, L) of the plain prompt
        self._masks: dict[Any, Any] = {}  # by the tokens that a layer's cache held before, or "dense"
        self._rotary: Any = None
        self.rows: Tensor | None = None
        """(B, L) int64 on the host, after ``finish``: the row of each position of the prompt in the output, -1 without
        one; None if nothing was dropped."""

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The language model's inputs without the placeholders that stage 1 has emptied."""
        if self.shortened:
            inputs = {**inputs, "attention_mask": None}  # each layer gets its own
        if self.prompt.remaining == self.prompt.tokens.lengths:
            return inputs
        chosen = self.plan.drop_empty(self.prompt.empty, self.prompt.remaining)
        inputs = {**inputs, "inputs_embeds": self.take(inputs["inputs_embeds"], chosen)}
        if not self.plan.nothing_dropped:
            tokens = self.plan.tokens
            if self.given_mask.dense is not None:
                inputs["attention_mask"] = self._dense()
            else:
                inputs["attention_mask"] = _alive(tokens) if self.past is None else None
            inputs["position_ids"] = self.family.position_ids(tokens.positions)
            if inputs.get("cache_position") is not None:  # transformers 4
                inputs["cache_position"] = inputs["cache_position"][: tokens.length]
        return inputs

    def layer_inputs(self, layer: int, inputs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A decoder layer's inputs; the model's own ones while nothing is dropped."""
        self.plan.begin_layer()
        past = None if self.past is None else self.past[layer]
        if past is not None:
            self.plan.past_types = torch.where(past.real(), int(TokenType.TEXT), int(TokenType.PADDING)).to(torch.uint8)
        if self.given_mask.dense is not None:
            self.plan.mask = self._dense()
        if self.plan.nothing_dropped and not self.shortened:
            return inputs
        if self.static is not None:
            self.static.limit(layer, self._end(layer))
        inputs = {**inputs, "attention_mask": self._mask(past, hidden)}
        if self.plan.nothing_dropped:
            return inputs
        # Flash attention takes positions with gaps for several packed sequences; no layer needs them.
        return {**inputs, "position_embeddings": self._rotary, "position_ids": None}

    def _mask(self, past: LayerTokens | None, hidden: Tensor) -> Any:
        """transformers' own mask, shared by layers whose caches hold the same tokens."""
        if self.given_mask.dense is not None:
            return self._dense()
        if id(past) not in self._masks:
            tokens = LayerTokens.of(self.plan.tokens, self.seen)
            seen = tokens if past is None else past.followed_by(tokens)
            config, length = self.family.language_model.config, 0 if past is None else past.length
            self._masks[id(past)] = causal_mask(config, hidden, seen.alive, past=length)
        return self._masks[id(past)]

    def _dense(self) -> Tensor:  # (B, H, remaining, seen + remaining)
        """The caller's mask of 4 dimensions, for the remaining tokens."""
        if "dense" not in self._masks:
            self._masks["dense"] = self.given_mask.take(self.plan.tokens, self.seen)
        return self._masks["dense"]

    def _end(self, layer: int) -> int:
        """Filled slots of the current layer when it attends."""
        return self.plan.tokens.length + (0 if self.past is None else self.past[layer].length)

    def select(
        self, layer: int, query: Tensor, key: Tensor, scale: float, *, lse: Tensor | None = None
    ) -> Pruned | None:
        """The remaining tokens after a layer, from its queries (B, Hq, L, D) and keys (B, Hk, L, D); None: all.

        `lse` (B, Hq, L) is given if the layer's attention returns it.
        """
        key = key[:, :, : self._end(layer)]  # a static cache passes the whole buffer
        if self.heat is not None:
            self.heat[layer] = self._heat_map(query, key, scale, lse)
        if layer not in self.config.pruning_layers:
            return None
        with self.stopwatch.measure(f"layer {self.config.pruning_layers[len(self.after)]}"):
            return self.plan.prune(query, key, scale, lse=lse)

    def _heat_map(
        self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None
    ) -> Tensor:  # (B, plain length) float32
        """Attention to vision tokens, mean over text queries and heads; nan without a remaining vision token."""
        tokens = self.plan.tokens
        found, _ = self.plan.scores(query.detach(), key.detach(), scale, lse)
        rows, columns = (tokens.types == TokenType.VISION).nonzero(as_tuple=True)
        text_queries = torch.tensor(self.prompt.text_queries, device=found.device).clamp(min=1)
        heat = found.new_full((len(text_queries), self.plan.prompt_tokens.length), torch.nan)
        heat[rows, tokens.index[rows, columns]] = found[rows, columns] / text_queries[rows]
        return heat

    def drop_rows(self, layer: int, hidden: Tensor, chosen: Pruned | None) -> Tensor:
        """A pruning layer's output (B, L, C) without the tokens that it dropped."""
        if chosen is not None:
            with self.stopwatch.measure(f"layer {layer}"):
                hidden = self.take(hidden, chosen)
        self.after[layer] = self.plan.tokens
        return hidden

    def take(self, hidden: Tensor, chosen: Pruned | None) -> Tensor:
        """The remaining hidden states; later layers get their masks and their rotary table (transformers' own)."""
        if chosen is not None and self.given_mask.unknown is not None:
            raise ValueError(
                f"attention_mask is a {type(self.given_mask.unknown).__name__} from which drop_tokens cannot take the "
                "remaining tokens; pass a mask (B, L), or a bool or float mask (B, 1, L, K)"
            )
        hidden, tokens = self.plan.take(hidden, chosen), self.plan.tokens
        self._masks = {}
        self._rotary = self.family.rotary(hidden, tokens.positions)
        return hidden

    def finish(self, cache: DropCache | DropStaticCache | None) -> PromptReport:
        """After the last layer: compacts the cache and returns the report. Synchronizes with the device."""
        self.rows = self._rows()
        processed = list(self.plan.cached_tokens)
        if self.static is not None:
            for i in range(len(processed)):
                self.static.limit(i, None)
        if cache is not None and not self.plan.nothing_dropped:
            self._compact(cache)
            length = self.seen + self.plan.prompt_tokens.length
            renumbered = self.config.positions == "published"
            cache.set_layer_tokens(length, self._layer_tokens(), self.hidden, renumbered=renumbered)
        return self._report(processed, 0 if cache is None else cache.slot_bytes)

    # The output's rows

    def _rows(self) -> Tensor | None:
        if self.plan.nothing_dropped:
            return None
        tokens = self.plan.tokens
        index, real = tokens.index.cpu(), (tokens.types != TokenType.PADDING).cpu()
        rows = torch.full((len(index), self.plan.prompt_tokens.length), -1, device="cpu")
        sequence, row = real.nonzero(as_tuple=True)
        rows[sequence, index[sequence, row]] = row
        return rows

    def dropped(self) -> Tensor:  # (B, L) bool on the host
        """The tokens of the prompt, padding aside, that the output has no row of."""
        real = (self.plan.prompt_tokens.types != TokenType.PADDING).cpu()
        return real & (self.rows < 0) if self.rows is not None else torch.zeros_like(real)

    def labels(self, labels: Tensor, ignored: int) -> Tensor:  # (B, L) -> (B, remaining)
        """The labels of remaining text tokens that a token precedes; `ignored` for the others."""
        tokens = self.plan.tokens
        labels = labels.masked_fill(self.prompt.vision, ignored).gather(1, tokens.index.clamp(min=0))
        padding = tokens.types == TokenType.PADDING
        return labels.masked_fill(padding | torch.nn.functional.pad(padding, (1, -1)), ignored)

    def _compact(self, cache: DropCache | DropStaticCache) -> None:
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
            views = self.plan.compact_caches(*zip(*stored, strict=True), to_front=self.static is not None)
            for i, begin, (key, value) in zip(layers, begins, views, strict=True):
                cache.store(i, begin, key, value)

    def _layer_tokens(self) -> list[LayerTokens]:
        """The tokens in each layer's cache; layers that hold the same tokens share an entry."""
        pasts: Sequence[LayerTokens | None] = [None] * len(self.plan.cached_tokens) if self.past is None else self.past
        pairs = list(zip(pasts, self.plan.cached_tokens, strict=True))
        found: dict[tuple[int, int], LayerTokens] = {}
        for past, tokens in pairs:
            if (id(past), id(tokens)) not in found:
                own = LayerTokens.of(tokens, self.seen)
                found[id(past), id(tokens)] = own if past is None else past.followed_by(own)
        return [found[id(past), id(tokens)] for past, tokens in pairs]

    def _report(self, processed: Sequence[Tokens], slot_bytes: int) -> PromptReport:
        plan, layers = self.plan, len(processed)
        before = [0] * layers if self.past is None else [past.length for past in self.past]
        rows = self.rows
        return PromptReport(
            length=plan.prompt_tokens.length,
            rows=torch.arange(plan.prompt_tokens.length, device="cpu").repeat(len(self.prompt.text), 1)
            if rows is None
            else rows,
            text=self.prompt.text,
            images=image_reports(self.prompt.images, self.prompt.placeholders, self.after, self.heat or {}),
            layer_tokens=[sum(tokens.vision_token_counts) for tokens in processed],
            plain_cache=_cache_report([plan.prompt_tokens] * layers, before, slot_bytes),
            prefill_cache=_cache_report(processed, before, slot_bytes),
            final_cache=_cache_report(plan.cached_tokens, before, slot_bytes),
            milliseconds=self.stopwatch.read(),
        )


@dataclasses.dataclass(eq=False)
class DropStep:
    """One layer of a prompt's pass. Its attention selects the remaining tokens, its output loses the others."""

    prefill: Prefill
    layer: int
    chosen: Pruned | None = None  # the remaining tokens; None: all

    def on_attention(self, query: Tensor, key: Tensor, scale: float, *, lse: Tensor | None = None) -> None:
        """Called by the layer's attention with its queries and keys after RoPE, and its lse if it has one."""
        self.chosen = self.prefill.select(self.layer, query, key, scale, lse=lse)

    def drop_rows(self, hidden: Tensor) -> Tensor:
        """The layer's output without the dropped tokens."""
        return self.prefill.drop_rows(self.layer, hidden, self.chosen)


def _alive(tokens: Tokens) -> Tensor | None:  # (B, L)
    return tokens.types != TokenType.PADDING if tokens.padded else None


def _cache_report(cached: Sequence[Tokens], before: Sequence[int], slot_bytes: int) -> CacheReport:
    lengths = [past + tokens.length for past, tokens in zip(before, cached, strict=True)]
    return CacheReport(lengths, sum(lengths) * slot_bytes)
