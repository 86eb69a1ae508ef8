# SPDX-License-Identifier: Apache-2.0
"""Stage 2, and stage 3 at its end: a prompt with images on its way through the language model.

``engines.PaddedPrompts`` decides and keeps the books; what transformers needs to hear of it is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...config import MustDropConfig
from ...engines import PaddedPrompts
from ...ops import TokenType
from ...parallel import mean_over_ranks
from ...report import CacheReport, PromptReport, Stopwatch
from ...stages import Pruned, Tokens
from .attention import causal_mask
from .cache import DropCache
from .encode import EncodedImage
from .families import Family
from .prompt import read_prompt
from .record import image_reports


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
        *,
        guessed: int = 0,  # tokens at the end that may be taken back
        heat_maps: bool = False,
    ) -> None:
        self.family = family
        self.config = config
        self.stopwatch = stopwatch
        self.guessed = guessed
        embeds = inputs["inputs_embeds"]
        positions = family.read_positions(inputs.get("position_ids"), embeds)
        token_ids = {modality: family.token_id(modality) for modality in images}
        self.prompt = read_prompt(
            input_ids, inputs.get("attention_mask"), positions, images, token_ids, config, guessed
        )
        self.plan = PaddedPrompts(self.prompt.tokens, config, voters=self.prompt.voters, group=family.ranks)
        self.after: dict[int, Tokens] = {}  # pruning layer -> what went on
        self.heat: dict[int, Tensor] | None = {} if heat_maps else None  # layer -> (B, L) of the plain prompt
        self._chosen: Pruned | None = None  # by the pruning layer that is running; None: all go on
        self._mask: Any = None
        self._rotary: Any = None

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The language model's inputs without the placeholders that stage 1 has emptied."""
        if self.prompt.left == self.prompt.tokens.lengths:
            return inputs
        chosen = self.plan.leave_out(self.prompt.empty, self.prompt.left)
        inputs = {**inputs, "inputs_embeds": self._go_on(inputs["inputs_embeds"], chosen)}
        if not self.plan.whole:
            tokens = self.plan.tokens
            inputs["attention_mask"] = _alive(tokens)
            inputs["position_ids"] = self.family.position_ids(tokens.positions)
            if inputs.get("cache_position") is not None:  # transformers 4
                inputs["cache_position"] = inputs["cache_position"][: tokens.length]
        return inputs

    def layer_inputs(self, layer: int, inputs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A decoder layer's inputs. While nothing is gone they are the model's own, untouched."""
        self.plan.enter()
        if self.plan.whole:
            return inputs
        # Flash attention would read positions with gaps as several packed sequences; no layer needs them.
        return {**inputs, "attention_mask": self._mask, "position_embeddings": self._rotary, "position_ids": None}

    def attended(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Scores and selects while a pruning layer's queries (B, Hq, L, D) and keys (B, Hk, L, D) are at hand."""
        if self.heat is not None:
            self.heat[layer] = self._look(query, key, scale)
        if layer not in self.config.pruning_layers:
            return
        with self.stopwatch.measure(f"layer {self.config.pruning_layers[len(self.after)]}"):
            self._chosen = self.plan.prune(query, key, scale)

    def _look(self, query: Tensor, key: Tensor, scale: float) -> Tensor:  # (B, plain length) float32
        """What the text that votes looks at, mean over its tokens and heads; nan where no vision token is left."""
        tokens, group = self.plan.tokens, self.family.ranks
        found, _ = ops.text_vision_scores(
            query.detach(), key.detach(), tokens.types, scale, backend=self.config.backend
        )
        found = found if group is None else mean_over_ranks(found, group)
        rows, columns = (tokens.types == TokenType.VISION).nonzero(as_tuple=True)
        voters = torch.tensor(self.prompt.voters, device=found.device).clamp(min=1)
        heat = found.new_full((len(voters), self.plan.plain.length), torch.nan)
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
        """With fewer tokens: their hidden states, their mask and rotary table (transformers' own)."""
        hidden, tokens = self.plan.take(hidden, chosen), self.plan.tokens
        self._mask = causal_mask(self.family.language_model.config, hidden, _alive(tokens), past=0)
        self._rotary = self.family.rotary(hidden, tokens.positions)
        return hidden

    def finish(self, cache: DropCache | None) -> PromptReport:
        """After the last layer: cuts the cache and says what was done. Waits for the device."""
        plan, processed = self.plan, list(self.plan.held)
        if cache is not None and not plan.whole:
            self._commit(cache)
            cache.shorten(plan.plain.length, plan.held, renumbered=self.config.positions == "published")
            cache.guessed = self.guessed
        slot_bytes = 0 if cache is None else cache.slot_bytes
        return PromptReport(
            length=plan.plain.length,
            text=self.prompt.text,
            images=image_reports(self.prompt.images, self.prompt.placeholders, self.after, self.heat or {}),
            layer_tokens=[sum(tokens.vision) for tokens in processed],
            plain_cache=_cache_report([plan.plain] * len(processed), slot_bytes),
            prefill_cache=_cache_report(processed, slot_bytes),
            final_cache=_cache_report(plan.held, slot_bytes),
            milliseconds=self.stopwatch.read(),
        )

    def _commit(self, cache: DropCache) -> None:
        """Stage 3."""
        layers = self.plan.moving
        if not layers:
            return
        with self.stopwatch.measure("evict"):
            keys, values = zip(*(cache.stored(i) for i in layers), strict=True)
            for i, (key, value) in zip(layers, self.plan.commit(keys, values), strict=True):
                cache.store(i, key, value)


def _alive(tokens: Tokens) -> Tensor | None:  # (B, L)
    return tokens.types != TokenType.PADDING if tokens.padded else None


def _cache_report(held: Sequence[Tokens], slot_bytes: int) -> CacheReport:
    lengths = [tokens.length for tokens in held]
    return CacheReport(lengths, sum(lengths) * slot_bytes)
