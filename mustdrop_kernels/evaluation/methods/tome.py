# SPDX-License-Identifier: Apache-2.0
"""ToMe (arXiv 2210.09461): tokens with similar keys merge in pairs, in every layer of the vision tower."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers.compat import hidden_of, with_hidden
from ...placeholders import first_placeholders
from .base import NOTHING, Method, Sizes
from .schedules import Unreachable
from .stage import OtherStage


def tome(sizes: Sizes, average: float) -> Method:
    """ToMe (arXiv 2210.09461): bipartite matching of keys in every layer before the features, sizes in the softmax.

    Differences: the number of tokens falls by a constant ratio per layer instead of a constant count, since a shallow
    tower cannot reach small budgets otherwise, and a layer that merges more than half of its tokens matches twice;
    merging follows the layer instead of the attention; a merged token takes the position of its first patch.
    """
    if average > sizes.patches:
        raise Unreachable(f"there are only {sizes.patches} tokens")
    return Method(NOTHING, lambda seed: lambda *args: Merging(int(average), *args), in_tower=True)


class Merging(OtherStage):
    """A first stage that merges in all layers up to the features."""

    def __init__(self, budget: int, *args: Any):
        super().__init__(*args)
        self.budget = budget
        self._key: Tensor | None = None
        self._sizes = self._assignment = torch.empty(0)

    def install(self, stack: contextlib.ExitStack) -> None:
        """Adds the hooks."""
        super().install(stack)
        for number, layer in enumerate(self.tower_layers):
            if number < self.depth:
                stack.callback(layer.self_attn.k_proj.register_forward_hook(self._take_key_of_layer).remove)
                hook = layer.register_forward_hook(self._merge_after(number), prepend=True)
                stack.callback(hook.remove)
            stack.callback(layer.register_forward_pre_hook(self._weigh, with_kwargs=True).remove)

    def _take_key_of_layer(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._key = output

    def _weigh(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Proportional attention: the weight of a token merged from n patches is n times larger."""
        if module is self.tower_layers[0]:
            self._sizes = torch.empty(0)
            return None
        hidden, _, *rest = args  # the encoder passes hidden_states and attention_mask by position
        mask = self._sizes.log().to(hidden.dtype)[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        return (hidden, mask, *rest), kwargs

    def _merge_after(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if not self._sizes.numel():
                self._sizes = torch.ones(hidden.shape[:2], device=hidden.device)
                self._assignment = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
                self._patches = hidden.shape[1] - 1
            target = round(self._patches * (self.budget / self._patches) ** ((number + 1) / self.depth))
            key = self._key
            assert key is not None
            with self.stopwatch.measure("match"):
                while hidden.shape[1] - 1 > target:
                    hidden, key = self._merge_pairs(hidden, key, hidden.shape[1] - 1 - target)
            return with_hidden(output, hidden)

        return hook

    def _merge_pairs(self, hidden: Tensor, key: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Merges `count` of every other token, at most all of them, into their best matches among the others."""
        unit = nn.functional.normalize(key.float(), dim=-1)
        odd, even = unit[:, 1::2], unit[:, 2::2]  # CLS, the first token, does not merge
        likeness, match = (odd @ even.transpose(1, 2)).max(-1)
        gone = likeness.topk(min(count, odd.shape[1]), dim=1).indices
        length = hidden.shape[1]
        into = torch.arange(length, device=hidden.device).repeat(len(hidden), 1)
        into.scatter_(1, 1 + 2 * gone, 2 + 2 * match.gather(1, gone))
        stays = into == torch.arange(length, device=hidden.device)
        rank = (stays.cumsum(1) - 1).gather(1, into)  # (B, length): where each token goes
        left = length - gone.shape[1]
        size = self._sizes[..., None]
        total = torch.zeros(len(hidden), left, 1, device=hidden.device).scatter_add(1, rank[..., None], size)

        def mean(x: Tensor) -> Tensor:
            sums = torch.zeros(len(x), left, x.shape[2], device=x.device)
            return (sums.scatter_add(1, rank[..., None].expand_as(x), x.float() * size) / total).to(x.dtype)

        hidden, key = mean(hidden), mean(key)
        self._sizes, self._assignment = total[..., 0], rank.gather(1, self._assignment)
        return hidden, key

    def layout(self) -> tuple[Tensor, Tensor]:
        """A token takes the place of its first patch."""
        assignment = self._assignment[:, 1:] - 1  # without CLS
        slot = first_placeholders(assignment, self._sizes.shape[1] - 1)
        return slot, slot.gather(1, assignment)
