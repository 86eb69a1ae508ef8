# SPDX-License-Identifier: Apache-2.0
"""Base of first stages other than MustDrop's: fewer tokens reach the projector than there are patches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers.families.llava import Llava
from ...integrations.transformers.vision import Packing, TowerRun, VisionStage
from ...placeholders import Share


class OtherStage(VisionStage):
    """A first stage of LLaVA-1.5 that keeps M tokens of the N patches of every image."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        tower = self.family.tower("image")
        if not isinstance(self.family, Llava) or tower is None or tower.prefix != 1 or self.family.lead("image", {}):
            raise ValueError(
                f"this method needs a CLIP tower and vision_feature_select_strategy='default', this model's tower is "
                f"{self.family.vision_kind!r}"
            )
        layers = self.family.feature_layers
        if not isinstance(layers, int):
            raise ValueError(f"this method needs the features of one layer, this model takes those of {layers}")
        self.tower_layers: Sequence[Any] = tower.layers
        self.depth = layers if layers >= 0 else len(tower.layers) + 1 + layers
        """Number of tower layers that compute the features."""

    def install(self, stack: contextlib.ExitStack) -> None:
        """Adds the hooks; the stack removes them."""
        super().install(stack)
        stack.callback(self.family.body.multi_modal_projector.register_forward_hook(self._place).remove)

    def layout(self) -> tuple[Tensor, Tensor]:
        """The placeholder that each token takes (B, M), and for each patch that of its token (B, N); both int64."""
        raise NotImplementedError

    def _place(self, module: nn.Module, args: Any, features: Tensor) -> Tensor:
        """Features (B, M, C) -> (B, N, C) at all placeholders of their patches; zeros where a patch has no token."""
        slot, token = self.layout()
        batch, length, channels = features.shape
        number = torch.arange(length, device=slot.device).expand(batch, -1)
        number = torch.full_like(token, length).scatter(1, slot, number).gather(1, token)
        return nn.functional.pad(features, (0, 0, 0, 1)).gather(1, number[..., None].expand(-1, -1, channels))

    def shares(self, run: TowerRun, lengths: Sequence[int], pack: Packing, device: torch.device) -> list[Share]:
        """For each placeholder of each image, the placeholder whose token it shares, and a mask of those with one."""
        slot, token = self.layout()
        alive = torch.zeros_like(token, dtype=torch.bool).scatter(1, slot, True)
        return list(zip(token, alive, strict=True))
