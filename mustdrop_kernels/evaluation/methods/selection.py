# SPDX-License-Identifier: Apache-2.0
"""Methods that select or merge features of the unchanged tower before the language model.

CLS attention and keys are those of the layer that makes the features (the last but one in LLaVA-1.5), as published.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...ops import TokenType
from ..tower import with_states
from .base import NOTHING, Method, Sizes
from .schedules import Unreachable
from .stage import OtherStage

Chosen = tuple[Tensor, Tensor, Tensor]
"""Features (B, M, C), the patch whose place each takes (B, M), and for each patch that of its token (B, N)."""
Choose = Callable[[Tensor, Tensor, Tensor, torch.Generator], Chosen]
"""Chooses tokens from features (B, N, C), CLS attention (B, N), keys (B, N, Ck) and a generator."""


class Selection(OtherStage):
    """A first stage that acts between tower and projector."""

    def __init__(self, choose: Choose, seed: int, *args: Any):
        super().__init__(*args)
        self.choose = choose
        self.generator = torch.Generator().manual_seed(seed)
        self._states: Any = None
        self._chosen: Chosen | None = None

    def install(self, stack: contextlib.ExitStack) -> None:
        """Adds the hooks, none of them within the tower, whose output may be reused."""
        super().install(stack)
        body = self.family.body
        stack.callback(body.vision_tower.register_forward_pre_hook(self._ask_for_states, with_kwargs=True).remove)
        stack.callback(body.vision_tower.register_forward_hook(self._take_states).remove)
        stack.callback(body.multi_modal_projector.register_forward_pre_hook(self._reduce).remove)

    def _ask_for_states(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, with_states(kwargs)  # newer versions of transformers 5 return the features' layer alone

    def _take_states(self, module: nn.Module, args: Any, output: Any) -> None:
        self._states = output.hidden_states

    def _reduce(self, module: nn.Module, args: Any) -> Any:
        (features,) = args
        with self.stopwatch.measure("choose"):
            look, key = self._attention(self._states[self.depth - 1])
            self._chosen = self.choose(features, look, key, self.generator)
        return (self._chosen[0],)

    def _attention(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # (B, 1+N, C) -> (B, N), (B, N, C)
        """CLS attention of the layer that computes the features, and that layer's keys."""
        layer = self.tower_layers[self.depth - 1]
        attention, hidden = layer.self_attn, layer.layer_norm1(hidden)
        query, key = attention.q_proj(hidden[:, 0]), attention.k_proj(hidden)
        heads = (-1, attention.head_dim)
        look = ops.cls_attention(
            query.unflatten(-1, heads), key.unflatten(-1, heads).transpose(1, 2), attention.scale,
            backend=self.config.backend,
        )  # fmt: skip
        return look[:, 1:], key[:, 1:]

    def layout(self) -> tuple[Tensor, Tensor]:
        """The selection, without merging."""
        assert self._chosen is not None
        return self._chosen[1:]


def best(scores: Tensor, count: int) -> Tensor:
    """(B, N) -> (B, count), the indices of the highest, ascending."""
    types = torch.full(scores.shape, int(TokenType.VISION), dtype=torch.uint8, device=scores.device)
    return ops.select_topk(scores, types, count, capacity=count).keep


def _take(x: Tensor, keep: Tensor) -> Tensor:
    return x.take_along_dim(keep.view(*keep.shape, *[1] * (x.dim() - 2)), 1)


def _itself(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def _method(sizes: Sizes, average: float, choose: Choose) -> Method:
    if average > sizes.patches:
        raise Unreachable(f"there are only {sizes.patches} tokens")
    return Method(NOTHING, lambda seed: lambda *args: Selection(choose, seed, *args))


def _top(sizes: Sizes, average: float, rate: Callable[[Tensor, torch.Generator], Tensor]) -> Method:
    """The tokens with the highest rates, computed from the CLS attention (B, N) and a generator."""

    def choose(features: Tensor, look: Tensor, key: Tensor, generator: torch.Generator) -> Chosen:
        keep = best(rate(look, generator), int(average))
        return _take(features, keep), keep, _itself(look)

    return _method(sizes, average, choose)


def random(sizes: Sizes, average: float) -> Method:
    """Random tokens, the lower bound of a comparison."""
    return _top(sizes, average, lambda look, generator: torch.rand(look.shape, generator=generator).to(look.device))


def cls_top(sizes: Sizes, average: float) -> Method:
    """The tokens with the highest CLS attention, as in FasterVLM (arXiv 2412.01818) and the first half of VisionZip."""
    return _top(sizes, average, lambda look, generator: look)


def visionzip(sizes: Sizes, average: float) -> Method:
    """VisionZip (arXiv 2412.04467): most by CLS attention; the rest is merged into every n-th of it by its keys.

    Differences: 10 of 64 tokens are merged ones at every budget (published for 64 of 576), and a merged token takes the
    position of the patch that it is merged into.
    """
    count = int(average)
    contextual = max(1, round(count * 10 / 64))

    def choose(features: Tensor, look: Tensor, key: Tensor, generator: torch.Generator) -> Chosen:
        dominant = best(look, count - contextual)
        rest = best(torch.zeros_like(look).scatter(1, dominant, -1.0), look.shape[1] - dominant.shape[1])
        step = rest.shape[1] // contextual
        centres = rest[:, : step * contextual : step].contiguous()
        merged, _ = _average_into(features, key, centres, rest, torch.ones_like(look))
        slot, order = torch.cat([dominant, centres], dim=1).sort(dim=1)
        kept = torch.cat([_take(features, dominant), merged], dim=1)
        return kept.gather(1, order[..., None].expand_as(kept)), slot, _itself(look)

    return _method(sizes, average, choose)


def prumerge(sizes: Sizes, average: float) -> Method:
    """LLaVA-PruMerge (arXiv 2403.15388): the tokens with the highest CLS attention, merged with those of similar keys.

    Differences: a fixed number instead of the outliers of the attention; every other token merges into its nearest
    selected one, instead of the 32 nearest to each; weights are CLS attention, as published.
    """

    def choose(features: Tensor, look: Tensor, key: Tensor, generator: torch.Generator) -> Chosen:
        keep = best(look, int(average))
        merged, token_of_patch = _average_into(features, key, keep, _itself(look), look)
        return merged, keep, token_of_patch

    return _method(sizes, average, choose)


def _average_into(
    features: Tensor,  # (B, N, C)
    key: Tensor,  # (B, N, Ck)
    centres: Tensor,  # (B, M) of these patches
    members: Tensor,  # (B, R) of these, centres among them
    weights: Tensor,  # (B, N)
) -> tuple[Tensor, Tensor]:  # (B, M, C), (B, N) the centre of each patch, itself where it is no member
    """Merges each member into the center with the most similar key, by weighted means."""
    unit = nn.functional.normalize(key.float(), dim=-1)
    nearest = (_take(unit, members) @ _take(unit, centres).transpose(1, 2)).argmax(-1)  # (B, R)
    own = torch.arange(centres.shape[1], device=key.device).expand_as(centres)
    place = torch.full(key.shape[:2], -1, device=key.device).scatter(1, members, nearest).scatter(1, centres, own)
    nearest = place.gather(1, members)
    weight = weights.gather(1, members).float() + 1e-9
    share = torch.zeros(*nearest.shape, centres.shape[1], device=key.device)
    share.scatter_(2, nearest[..., None], weight[..., None])
    share /= share.sum(1, keepdim=True)
    merged = (share.transpose(1, 2) @ _take(features, members).float()).to(features.dtype)
    owner = _itself(place).where(place < 0, centres.gather(1, place.clamp(min=0)))
    return merged, owner
