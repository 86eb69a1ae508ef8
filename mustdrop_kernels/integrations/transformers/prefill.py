# SPDX-License-Identifier: Apache-2.0
"""Stage 2, and stage 3 at its end: a prompt with images on its way through the language model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops, stages
from ...config import MustDropConfig
from ...ops import TokenType
from ...report import CacheReport, ImageReport, PromptReport, Stopwatch
from ...stages import Pruned, Tokens
from .attention import causal_mask
from .cache import DropCache
from .llava import Llava
from .vision import EncodedImage


class Prefill:
    """Holds what is left of the prompt, and hands every layer the mask and the rotary table that fit."""

    def __init__(
        self,
        llava: Llava,
        config: MustDropConfig,
        stopwatch: Stopwatch,
        features: Sequence[Tensor],  # per image (N, C)
        images: Sequence[EncodedImage],
        inputs: dict[str, Any],  # of the LLaVA body: input_ids, attention_mask, position_ids, ...
    ) -> None:
        self.llava = llava
        self.config = config
        self.stopwatch = stopwatch
        self.images = images
        self.pruned: Pruned | None = None  # by the layer that is running
        self.after: dict[int, Tokens] = {}  # pruning layer -> what went on
        self.held: list[Tokens] = []  # per layer: what it has processed, so what its cache holds
        self._mask: Any = None
        self._rotary: tuple[Tensor, Tensor] | None = None

        input_ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        self.placeholders = input_ids == llava.image_token_id  # (B, L)
        self.plain, self.tokens = self._tokens(mask, inputs.get("position_ids"))

        embeds = llava.body.get_input_embeddings()(input_ids)
        values = torch.cat(list(features)).to(embeds)
        self.embeds = embeds.masked_scatter(self.placeholders[..., None], values)
        if self._merge is not None:
            self.embeds = self._gather(self.embeds, self._merge)
            self._enter(self.embeds)

    # The prompt as the language model gets it.

    def _tokens(self, mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tokens, Tokens]:
        """The plain prompt's tokens, and those that are left after merging (the same object if all are).

        Waits for the device once, to learn the sequences' lengths.
        """
        shape, device = self.placeholders.shape, self.placeholders.device
        types = stages.token_types(self.placeholders, mask, self.config.votes)
        standing, protected = self._stage_1()
        place = torch.arange(shape[1], device=device).expand(shape).contiguous()
        real = types != TokenType.PADDING
        numbers = (real, self.placeholders, standing, protected, types == TokenType.QUERY)
        counts = torch.stack([number.sum(1) for number in numbers])
        lengths, slots, vision, keys, voters = map(tuple, counts.tolist())
        self._check(slots, voters)
        self.text = [length - slot for length, slot in zip(lengths, slots)]
        plain = Tokens(
            types=types,
            index=place,
            positions=place if position_ids is None else position_ids.expand(shape).contiguous(),
            protected=protected,
            counts=counts[0].int(),
            lengths=lengths,
            vision=slots,
            keys=keys,
        )
        self._merge = None
        if vision == slots:
            return plain, plain
        # A patch that went into another's token leaves its placeholder, which is padding from here on.
        types = types.masked_fill(self.placeholders & ~standing, int(TokenType.PADDING))
        lengths = tuple(text + tokens for text, tokens in zip(self.text, vision))
        keep, kept = ops.select_topk(
            torch.zeros(shape, device=device), types, shape[1], capacity=max(lengths), backend=self.config.backend
        )
        self._merge = Pruned(keep, kept, lengths)
        return plain, self._take(plain, self._merge)

    def _stage_1(self) -> tuple[Tensor, Tensor]:
        """(B, L) bool each: placeholders that hold a token, and those whose token is a key token."""
        rank = self.placeholders.flatten().cumsum(0).view_as(self.placeholders) - 1

        def spread(flags: Sequence[Tensor]) -> Tensor:
            flat = torch.cat(list(flags)).to(rank.device)
            return self.placeholders & flat[rank.clamp(0, flat.numel() - 1)]

        return spread([image.alive for image in self.images]), spread([image.key for image in self.images])

    def _check(self, slots: Sequence[int], voters: Sequence[int]) -> None:
        patches = sum(image.alive.numel() for image in self.images)
        if sum(slots) != patches:
            raise ValueError(f"the prompt has {sum(slots)} image placeholders, the images have {patches} patches")
        silent = [row for row, (slot, voter) in enumerate(zip(slots, voters)) if slot and not voter]
        if silent and self.config.pruning_layers:
            raise ValueError(f"no text follows the last image of sequence(s) {silent}: nothing says which tokens matter")

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The LLaVA body's inputs, with the images in place already."""
        inputs = {**inputs, "input_ids": None, "inputs_embeds": self.embeds}
        if self._merge is not None:
            inputs["attention_mask"] = self._alive()
            inputs["position_ids"] = self.tokens.positions
            if inputs.get("cache_position") is not None:  # transformers 4
                inputs["cache_position"] = inputs["cache_position"][: self.tokens.length]
        return inputs

    # Layer by layer.

    def layer_inputs(self, layer: int, inputs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A decoder layer's inputs. While nothing is gone they are the model's own, untouched."""
        self.held.append(self.tokens)
        if self.tokens is self.plain:
            return inputs
        # Flash attention would read positions with gaps as several packed sequences; no layer needs them.
        return {**inputs, "attention_mask": self._mask, "position_embeddings": self._rotary, "position_ids": None}

    def attended(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Scores and selects where queries and keys are at hand."""
        stage = len(self.after)
        with self.stopwatch.measure(f"layer {self.config.pruning_layers[stage]}"):
            self.pruned = stages.prune(query, key, self.tokens, scale, self.config, stage)

    def shorten(self, layer: int, hidden: Tensor) -> Tensor:
        """A pruning layer's output (B, L, C) without the tokens that it dropped."""
        pruned, self.pruned = self.pruned, None
        assert pruned is not None
        if pruned.lengths != self.tokens.lengths:
            with self.stopwatch.measure(f"layer {layer}"):
                self.tokens = self._take(self.tokens, pruned)
                hidden = self._gather(hidden, pruned)
                self._enter(hidden)
        self.after[layer] = self.tokens
        return hidden

    def _take(self, tokens: Tokens, pruned: Pruned) -> Tokens:
        return tokens.take(pruned, renumber=self.config.positions == "published", backend=self.config.backend)

    def _gather(self, x: Tensor, pruned: Pruned) -> Tensor:
        return ops.gather_tokens(x, pruned.keep, pruned.counts, align_end=True, backend=self.config.backend)

    def _alive(self) -> Tensor | None:
        return (self.tokens.types != TokenType.PADDING).long() if self.tokens.padded else None

    def _enter(self, hidden: Tensor) -> None:
        """Mask and rotary table of the tokens that are left; transformers' own, so they fit any attention."""
        model = self.llava.language_model
        self._mask = causal_mask(model.config, hidden, self._alive(), past=0)
        self._rotary = model.rotary_emb(hidden, position_ids=self.tokens.positions)

    # Stage 3 and the record.

    def finish(self, cache: DropCache | None) -> PromptReport:
        """After the last layer: cuts the cache and says what was done. Waits for the device."""
        held = list(self.held)
        before = _lengths(held)
        if cache is not None and self.tokens is not self.plain:
            self._evict(cache, held)
            cache.shorten(self.plain.length, held)
        token_bytes = 0 if cache is None else _bytes_per_slot(cache)
        depth = len(held)
        caches = [CacheReport(lengths, sum(lengths) * token_bytes) for lengths in ([self.plain.length] * depth, before, _lengths(held))]
        return PromptReport(
            length=self.plain.length,
            text=self.text,
            images=self._image_reports(),
            layer_tokens=[sum(tokens.vision) for tokens in self.held],
            plain_cache=caches[0],
            prefill_cache=caches[1],
            final_cache=caches[2],
            milliseconds=self.stopwatch.read(),
        )

    def _evict(self, cache: DropCache, held: list[Tokens]) -> None:
        first = self.config.first_evicted_layer
        if first is None:
            return
        layers = [i for i in range(first, len(held)) if held[i] is not self.tokens]
        if not layers:
            return
        with self.stopwatch.measure("evict"):
            cut = stages.evict(
                [cache.layers[i].keys for i in layers],
                [cache.layers[i].values for i in layers],
                [held[i] for i in layers],
                self.tokens,
                backend=self.config.backend,
            )
            for i, (keys, values) in zip(layers, cut):
                cache.layers[i].keys, cache.layers[i].values = keys, values
                held[i] = self.tokens

    def _image_reports(self) -> list[ImageReport]:
        """Back from places in the prompt to places in the patch grid."""
        row_of_slot, place_of_slot = torch.nonzero(self.placeholders.cpu(), as_tuple=True)
        alive = {}
        for layer, tokens in self.after.items():
            index, real = tokens.index.cpu(), (tokens.types == TokenType.VISION).cpu()
            flags = torch.zeros(self.placeholders.shape, dtype=torch.bool)
            rows = torch.arange(flags.shape[0])[:, None].expand_as(index)
            flags[rows[real], index[real]] = True
            alive[layer] = flags[row_of_slot, place_of_slot]  # (all images' slots)
        reports = []
        sizes = [image.alive.numel() for image in self.images]
        for image, begin, size in zip(self.images, itertools.accumulate([0, *sizes]), sizes):
            token_of_patch = image.token_of_patch.cpu()
            surviving = {layer: flags[begin : begin + size] for layer, flags in alive.items()}
            reports.append(
                ImageReport(
                    sequence=int(row_of_slot[begin]),
                    token_of_patch=token_of_patch.view(image.grid),
                    key=image.key.cpu()[token_of_patch].view(image.grid),
                    survived={layer: flags[token_of_patch].view(image.grid) for layer, flags in surviving.items()},
                    kept={layer: int(flags.sum()) for layer, flags in surviving.items()},
                    tokens=image.tokens,
                    key_tokens=image.keys,
                )
            )
        return reports


def _lengths(held: Sequence[Tokens]) -> list[int]:
    return [tokens.length for tokens in held]


def _bytes_per_slot(cache: DropCache) -> int:
    """Keys and values of one slot of one layer, for the whole batch."""
    layer = cache.layers[0]
    return sum(x[:, :, 0].numel() * x.element_size() for x in (layer.keys, layer.values))
