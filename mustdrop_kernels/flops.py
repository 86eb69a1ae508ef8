# SPDX-License-Identifier: Apache-2.0
"""Floating point operations and KV bytes of a prompt in a language model, with and without dropping.

A layer that holds n tokens, of width d, with an MLP of width m and k = kv_heads / heads:

==============  ==============================  ==========================================================
counting        operations of a layer           used by
==============  ==============================  ==========================================================
``"exact"``     4 n d^2 (1 + k) + 4 n^2 d       every matrix product, 2 for a multiplication and an
                + 6 n d m                       addition, three matrices in the MLP; n^2 d twice: all scores
``"fastv"``     4 n d^2 + 2 n^2 d + 2 n d m     FastV (arXiv 2403.06764): multiply-adds, an MLP of two matrices
``"pdrop"``     4 n d^2 + 2 n^2 d + 3 n d m     PyramidDrop (arXiv 2410.17247): multiply-adds, an MLP of three
==============  ==============================  ==========================================================

A layer that holds n tokens has 2 n kv_heads head_dim numbers in the KV cache. Nothing else is counted: neither the
vision tower, nor the language head, nor the cost of dropping itself (`mustdrop bench ops` measures that).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from .config import MustDropConfig

COUNTINGS = ("exact", "fastv", "pdrop")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Sizes of a language model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vision: int = 576
    """Vision tokens of one prompt, before anything is merged or dropped."""

    @classmethod
    def of(cls, config: Any, vision: int | None = None) -> LanguageModel:
        """From a transformers config, of a LLaVA or of its language model.

        Args:
            config: has ``text_config``, or is one.
            vision: vision tokens of a prompt; by default the patches of one image in the config's vision tower.

        Raises:
            ValueError: `vision` is not given and the config has no vision tower.
        """
        text = getattr(config, "text_config", config)
        tower = getattr(config, "vision_config", None)
        if vision is None:
            if tower is None:
                raise ValueError("this config has no vision tower: give the number of vision tokens")
            vision = (tower.image_size // tower.patch_size) ** 2
        heads = text.num_attention_heads
        return cls(
            text.num_hidden_layers, text.hidden_size, text.intermediate_size, heads,
            getattr(text, "num_key_value_heads", None) or heads, vision,
        )  # fmt: skip

    def layer_flops(self, tokens: int, counting: str = "exact") -> int:
        """Operations of one layer with this number of tokens; see the module's table."""
        n, d, m = tokens, self.hidden, self.intermediate
        if counting == "exact":
            return 4 * n * d * d * (self.heads + self.kv_heads) // self.heads + 4 * n * n * d + 6 * n * d * m
        if counting not in COUNTINGS:
            raise ValueError(f"counting must be one of {COUNTINGS}, got {counting!r}")
        return 4 * n * d * d + 2 * n * n * d + (2 if counting == "fastv" else 3) * n * d * m

    def token_bytes(self, element_size: int) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return 2 * self.kv_heads * (self.hidden // self.heads) * element_size


MODELS = {
    "llava-1.5-7b": LanguageModel(32, 4096, 11008, 32, 32),
    "llava-1.5-13b": LanguageModel(40, 5120, 13824, 40, 40),
    "llava-next-7b": LanguageModel(32, 4096, 11008, 32, 32, vision=2880),
}


def schedule(model: LanguageModel, config: MustDropConfig) -> tuple[list[int], list[int]]:
    """Vision tokens that each layer processes, and those that its cache holds after stage 3.

    Raises:
        ValueError: the config has thresholds, so the number of tokens depends on the picture.
    """
    config = config.for_depth(model.layers)
    if config.budgets is None or (config.merge and config.merge_budget is None):
        raise ValueError("thresholds keep a number of tokens that depends on the picture: take a preset with budgets")
    size = math.prod(config.window)
    saved = config.merged_windows(model.vision // size) * (size - 1) if config.merge else 0
    left = [model.vision - saved]
    for budget in config.budgets:
        left.append(min(budget, left[-1]))
    begins = [0, *(layer + 1 for layer in config.pruning_layers)]
    ends = [*begins[1:], model.layers]
    processed = [n for n, begin, end in zip(left, begins, ends, strict=True) for _ in range(begin, end)]
    first = config.first_evicted_layer
    held = [n if first is None or layer < first else left[-1] for layer, n in enumerate(processed)]
    return processed, held


@dataclasses.dataclass(frozen=True)
class Account:
    """Cost of a prompt, plain and with dropping."""

    counting: str
    text: int
    processed: list[int]
    """Vision tokens that each layer processes."""
    held: list[int]
    """Vision tokens in each layer's cache during decoding."""
    plain_flops: int
    flops: int
    plain_bytes: int
    bytes: int

    @property
    def mean_tokens(self) -> float:
        """Vision tokens, mean over the layers: the usual name of a setting in papers."""
        return sum(self.processed) / len(self.processed)

    @property
    def saved(self) -> float:
        """Share of the operations that dropping saves."""
        return 1 - self.flops / self.plain_flops

    @property
    def saved_bytes(self) -> float:
        """Share of the cache that dropping saves."""
        return 1 - self.bytes / self.plain_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **dataclasses.asdict(self), "mean_tokens": self.mean_tokens, "saved": self.saved,
            "saved_bytes": self.saved_bytes,
        }  # fmt: skip


def account(
    model: LanguageModel,
    processed: Sequence[int],
    held: Sequence[int] | None = None,
    *,
    text: int = 60,
    counting: str = "exact",
    element_size: int = 2,
) -> Account:
    """Compares a schedule with the plain model.

    Args:
        model: sizes.
        processed: vision tokens of each layer.
        held: vision tokens of each layer's cache after stage 3; by default those that it processed.
        text: text tokens of the prompt, in all layers. 0: vision alone, as in some papers.
        counting: one of ``COUNTINGS``.
        element_size: bytes of a number in the cache.

    Raises:
        ValueError: a list does not have one entry per layer, or counts are negative.
    """
    held = processed if held is None else held
    for name, counts in (("processed", processed), ("held", held)):
        if len(counts) != model.layers or min(counts) < 0:
            raise ValueError(f"{name} must be {model.layers} counts, one per layer, got {list(counts)}")
    if text < 0:
        raise ValueError(f"text must not be negative, got {text}")
    slot = model.token_bytes(element_size)
    return Account(
        counting=counting,
        text=text,
        processed=list(processed),
        held=list(held),
        plain_flops=model.layers * model.layer_flops(model.vision + text, counting),
        flops=sum(model.layer_flops(n + text, counting) for n in processed),
        plain_bytes=model.layers * (model.vision + text) * slot,
        bytes=sum(n + text for n in held) * slot,
    )


def headline() -> list[dict[str, Any]]:
    """The published figure, 88.5% fewer operations, by every way of counting.

    The abstract names neither the setting nor the counting. Rows: 64 of 576 and 320 of 2880 vision tokens in every
    layer, with and without 60 text tokens.
    """
    rows = []
    cases = (("llava-1.5-7b", 64), ("llava-next-7b", 320))
    for (name, kept), text, counting in itertools.product(cases, (0, 60), COUNTINGS):
        found = account(MODELS[name], [kept] * MODELS[name].layers, text=text, counting=counting)
        rows.append({"model": name, "kept": kept, "text": text, "counting": counting, "saved": found.saved})
    return rows
