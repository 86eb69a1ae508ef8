# SPDX-License-Identifier: Apache-2.0
"""Stage 1 inside the vision tower: alike patches become one token, and the CLS token names the key tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ... import stages
from ...config import MustDropConfig
from ...report import Stopwatch
from .attention import padding_mask
from .llava import Llava, hidden_of, with_hidden


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """What stage 1 made of an image of N patches. A token goes by its placeholder in the prompt, 0 .. N-1."""

    grid: tuple[int, int]
    token_of_patch: Tensor  # (N) int64
    alive: Tensor  # (N) bool, placeholders that hold a token
    key: Tensor  # (N) bool, placeholders that hold a key token
    tokens: int
    key_tokens: int


@dataclasses.dataclass
class _Run:
    """One run of the tower over a batch of images."""

    grid: tuple[int, int]
    counts: Tensor | None = None  # (B) tokens of each image with CLS; None: not merged
    lengths: Sequence[int] = ()  # counts on the host
    source: Tensor | None = None  # (B, 1+N) token that each patch went into
    mask: Tensor | None = None  # where the images' lengths differ
    query: Tensor | None = None  # (B, S, C) of the last layer
    key: Tensor | None = None  # (B, S, C) of the last layer


class VisionStage:
    """Hooks in the tower, and a ``get_image_features`` that returns each feature at its place in the prompt."""

    def __init__(self, llava: Llava, config: MustDropConfig, stopwatch: Stopwatch) -> None:
        self.llava = llava
        self.config = config
        self.stopwatch = stopwatch
        self.encoded = WeakTensorKeyDictionary()
        """By feature tensor, (N, C): transformers repeats and reorders these (beams, several answers) as it likes."""
        self._run: _Run | None = None  # the tower works for get_image_features

    def install(self, stack: contextlib.ExitStack) -> None:
        """Adds the hooks; the stack takes them away."""
        layers, config = self.llava.vision_layers, self.config
        if config.merge:
            # Before transformers' own hook, which records the hidden states that the features are taken from.
            merge = layers[config.merge_layer].register_forward_hook(self._merge, prepend=True)
            stack.callback(merge.remove)
            for layer in layers[config.merge_layer + 1 :]:
                stack.callback(layer.register_forward_pre_hook(self._mask, with_kwargs=True).remove)
        if config.key_rate > 0:
            attention = layers[-1].self_attn
            stack.callback(attention.q_proj.register_forward_hook(self._take_query).remove)
            stack.callback(attention.k_proj.register_forward_hook(self._take_key).remove)

    def _merge(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._run
        if run is None:
            return None
        with self.stopwatch.measure("merge"):
            merged = stages.merge_vision_tokens(hidden_of(output), run.grid, self.config)
            tokens, run.counts, run.source = merged.tokens, merged.counts, merged.source
            if self.config.merge_budget is not None:
                run.lengths = [tokens.shape[1]] * tokens.shape[0]
            else:  # waits for the device: the length of the next layers
                run.lengths = merged.counts.tolist()
                tokens = tokens[:, : max(run.lengths)]
            if min(run.lengths) < tokens.shape[1]:
                real = torch.arange(tokens.shape[1], device=tokens.device) < merged.counts[:, None]
                run.mask = padding_mask(self.llava.vision_config, real, tokens.dtype)
        return with_hidden(output, tokens)

    def _mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._run is None or self._run.mask is None:
            return None
        hidden, _, *rest = args  # the encoder passes hidden_states and attention_mask by position
        return (hidden, self._run.mask, *rest), kwargs

    def _take_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._run is not None:
            self._run.query = output

    def _take_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._run is not None:
            self._run.key = output

    def wrap(self, get_image_features: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``get_image_features``, returning as many features as an image has placeholders.

        A merged token's feature stands at one of its patches' placeholders, and zeros at the others, which never reach
        the language model. So a prompt keeps its length until the language model begins.
        """

        @functools.wraps(get_image_features)
        def wrapped(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.stopwatch.read()  # begins anew, whatever became of the last prompt
            self._run = run = _Run(self._grid(pixel_values))
            try:
                output = get_image_features(pixel_values, *args, **kwargs)
            finally:
                self._run = None
            in_object = hasattr(output, "pooler_output")  # transformers 4 returns the features themselves
            placed = self._place(run, list(output.pooler_output if in_object else output))
            if not in_object:
                return placed
            output.pooler_output = placed
            return output

        return wrapped

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        height, width = pixel_values.shape[-2:]
        patch = getattr(self.llava.vision_config, "patch_size", 1)
        return height // patch, width // patch

    def _place(self, run: _Run, features: list[Tensor]) -> list[Tensor]:
        """Features (S, C) of the tokens of each image -> features (N, C) at their placeholders; fills ``encoded``."""
        key = self._key_tokens(run)
        placed = []
        for i, feature in enumerate(features):
            slot, token_of_patch = self._layout(run, i, feature)
            tokens, patches = slot.shape[0], token_of_patch.shape[0]
            alive = torch.zeros_like(token_of_patch, dtype=torch.bool).index_fill(0, slot, True)
            marked = torch.zeros_like(alive)
            if key is not None:
                marked = marked.index_copy(0, slot, key[i, :tokens])
            placed.append(feature.new_zeros(patches, feature.shape[1]).index_copy(0, slot, feature[:tokens]))
            self.encoded[placed[-1]] = EncodedImage(
                grid=run.grid if math.prod(run.grid) == patches else (1, patches),
                token_of_patch=token_of_patch,
                alive=alive,
                key=marked,
                tokens=tokens,
                key_tokens=math.ceil(self.config.key_rate * tokens),
            )
        return placed

    def _layout(self, run: _Run, image: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens) the placeholder that each token takes, and (N) that of each patch's token."""
        if run.source is None:
            tokens = feature.shape[0]
            source = torch.arange(tokens, device=feature.device)
        else:
            tokens = run.lengths[image] - 1  # without CLS
            source = run.source[image, 1:] - 1
            self._check(feature.shape[0], max(run.lengths) - 1)
        slot = self._placeholders(source, tokens)
        return slot, slot[source]

    def _placeholders(self, source: Tensor, tokens: int) -> Tensor:
        """(N) token of each patch -> (tokens) the placeholder that each token takes.

        With original positions that of its first patch. Published positions number the tokens, so placeholders
        0, 1, 2, ... are taken.
        """
        if self.config.positions == "published":
            return torch.arange(tokens, device=source.device)
        place = torch.arange(source.shape[0], device=source.device)
        return torch.full_like(place[:tokens], source.shape[0]).scatter_reduce(0, source, place, "amin")

    def _key_tokens(self, run: _Run) -> Tensor | None:  # (B, S) bool, CLS left out
        if self.config.key_rate == 0:
            return None
        assert run.query is not None
        assert run.key is not None
        attention = self.llava.vision_layers[-1].self_attn
        heads = (-1, attention.head_dim)
        with self.stopwatch.measure("key tokens"):
            query = run.query[:, 0].unflatten(-1, heads)  # (B, H, D) of CLS
            key = run.key.unflatten(-1, heads).transpose(1, 2)  # (B, H, S, D)
            return stages.key_tokens(query, key, attention.scale, self.config, counts=run.counts)[:, 1:]

    def _check(self, features: int, tokens: int) -> None:
        if features != tokens:
            raise ValueError(
                f"an image was merged to {tokens} tokens but has {features} features: vision_feature_layer must come "
                "after merge_layer, and vision_feature_select_strategy must be 'default'"
            )
