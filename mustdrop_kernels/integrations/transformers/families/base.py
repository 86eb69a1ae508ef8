# SPDX-License-Identifier: Apache-2.0
"""Interface of a model to drop_tokens. Each kind of model is a subclass of ``Family``, in a file of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....config import MustDropConfig
from ..ranks import head_ranks

Arguments = dict[str, Any]
"""Arguments of a ``get_..._features`` call by name, without those that are None."""


@dataclasses.dataclass(frozen=True)
class Tower:
    """A vision tower: transformer layers over the patches of each tile."""

    layers: Sequence[Any]
    attention: Any
    """The attention module whose queries and keys select the key tokens."""
    config: Any
    heads: int
    """Number of heads, over all ranks."""
    prefix: int
    """Tokens before the patches: one CLS token, or none."""
    whole: str | None = None
    """The reason why patches cannot merge inside the tower, as the end of a sentence; None: they can."""


class Family:
    """A model: a vision tower, a projector, a language model.

    Placeholders are the positions of a prompt that the features of an image or a video take. An image or a video has N
    of them, numbered from 0; its *views* are grids of placeholders, for merging (``merge_at="features"``) and for
    pictures. "Image" includes videos below.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.body: Any = model.model  # takes input_ids and pixel_values
        self.language_model: Any = self.body.language_model
        self.layers: Sequence[Any] = self.language_model.layers
        self.ranks = head_ranks(model)
        """The ranks that share the language model's heads; None: this rank has all."""
        _check_language_model(self.language_model.config)

    def token_id(self, modality: str) -> int:
        """The id of a placeholder."""
        return int(getattr(self.model.config, f"{modality}_token_id"))

    def placeholder_ids(self, embeds: Tensor) -> Tensor:  # (B, L, C) -> (B, L) int64
        """Ids of the placeholders in embeddings of a prompt, by the embedding of a placeholder; -1 elsewhere."""
        table = self.model.get_input_embeddings()
        ids = torch.full(embeds.shape[:2], -1, dtype=torch.long, device=embeds.device)
        for modality in self.modalities:
            token = torch.tensor(self.token_id(modality), device=embeds.device)
            ids.masked_fill_((embeds == table(token).to(embeds)).all(-1), self.token_id(modality))
        return ids

    # Stage 1

    def tower(self, modality: str) -> Tower | None:
        """The tower of a modality; None: stage 1 does not support it."""
        return None

    def why_whole(self, modality: str, arguments: Arguments) -> str | None:
        """The reason why the patches of these images cannot merge inside the tower, or None."""
        tower = self.tower(modality)
        return "is not known" if tower is None else tower.whole

    def grid(self, modality: str, arguments: Arguments) -> tuple[int, int]:
        """Height and width of a tile in patches."""
        raise NotImplementedError

    def tiles(self, modality: str, arguments: Arguments) -> int:
        """Number of tiles of all images."""
        raise NotImplementedError

    def lead(self, modality: str, arguments: Arguments) -> int:
        """Number of features of a tile before those of its patches."""
        raise NotImplementedError

    def pack(
        self,
        modality: str,
        maps: Tensor,  # (tiles, lead + patches), a number for each of the tower's outputs
        arguments: Arguments,
        gap: float,
    ) -> list[Tensor]:
        """Packs numbers as the model packs the tower's outputs into the placeholders of each image.

        Returns:
            (N) per image; `gap` at placeholders without a patch, such as the ends of rows.
        """
        raise NotImplementedError

    def views(
        self,
        modality: str,
        lengths: Sequence[int],  # N of each image
        arguments: Arguments,
    ) -> list[tuple[Tensor, ...]]:
        """Grids of placeholders of each image, (H, W) or (T, H, W) int64, the finest last."""
        raise NotImplementedError

    # Positions

    multi_axis: ClassVar[bool] = False
    """A token has several positions (time, height, width)."""

    def read_positions(self, positions: Tensor | None, embeds: Tensor, past: int) -> Tensor:  # embeds: (B, L, C)
        """Converts the language model's position_ids, by default from `past` on, to (B, L) or (B, L, axes)."""
        if positions is None:
            positions = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        return positions.expand(embeds.shape[:2]).contiguous()

    def position_ids(self, positions: Tensor) -> Tensor:
        """Converts the result of ``read_positions`` to the language model's position_ids."""
        return positions

    def rotary(self, hidden: Tensor, positions: Tensor) -> Any:
        """The language model's rotary table."""
        return self.language_model.rotary_emb(hidden, position_ids=self.position_ids(positions))

    # Checks of a config

    def check(self, config: MustDropConfig) -> None:
        """Checks that the model supports a config.

        Raises:
            ValueError: it does not; the message names the setting to change.
        """
        self._check_depth(config)
        towers = {modality: self.tower(modality) for modality in self.modalities}
        if config.merges_in_tower and (reason := self._why_always_whole()):
            raise ValueError(refusal(reason))
        if config.key_rate > 0 and not any(towers.values()):
            raise ValueError(
                "key tokens are found in a CLIP, SigLIP or InternVL vision tower or in Qwen2.5-VL's, this model's is "
                f"{self.vision_kind!r}; key_rate=0.0 leaves the tower alone"
            )
        if config.positions == "published" and self.multi_axis:
            raise ValueError("positions='published' renumbers tokens, which have several positions each in this model")
        if config.positions == "published" and config.merge and not self.published:
            raise ValueError("merging with positions='published' is what the published code does with LLaVA-1.5 alone")

    def preset(self, name: str) -> MustDropConfig:
        """A preset at the model's depth, which merges features if patches cannot merge in the tower.

        Raises:
            ValueError: there is no such preset.
        """
        config = MustDropConfig.preset(name).for_depth(len(self.layers))
        if config.merges_in_tower and self._why_always_whole():
            config = dataclasses.replace(config, merge_at="features")
        return config

    def _why_always_whole(self) -> str | None:
        """The reason why no input's patches can merge in the tower, or None."""
        reasons = [self.why_whole(modality, {}) for modality in self.modalities]
        return reasons[0] if all(reasons) else None

    published: ClassVar[bool] = False
    """Whether the published code supports this model; an image's placeholders are the patches of one tile then."""

    @property
    def vision_kind(self) -> str:
        """The kind of vision tower, for messages."""
        return str(self.model.config.vision_config.model_type)

    def _check_depth(self, config: MustDropConfig) -> None:
        depth = len(self.layers)
        beyond = [layer for layer in config.pruning_layers if layer >= depth]
        if beyond:
            raise ValueError(
                f"pruning_layers {config.pruning_layers}: the language model has {depth} layers, so there is no layer "
                f"{beyond[0]}; config.for_depth({depth}) leaves such layers out"
            )


def refusal(reason: str) -> str:
    """Message for a model whose patches cannot merge inside the tower, with the alternatives."""
    return (
        f"patches cannot merge inside this model's vision tower, which {reason}; merge_at='features' merges what comes "
        "out of it, merge=False leaves merging out"
    )


def _check_language_model(config: Any) -> None:
    """Raises ``ValueError`` unless all layers are full softmax attention, which the scores assume."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or window is not None:
        kind = ", ".join(sorted(kinds)) or f"sliding_window={window}"
        raise ValueError(
            f"drop_tokens needs full attention in every language layer, this model has {kind}: text behind the window "
            "does not attend to the image"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            "drop_tokens scores plain softmax attention, this language model caps its scores "
            f"(attn_logit_softcapping={config.attn_logit_softcapping})"
        )


def bare(config: Any, name: str) -> int:
    """A size of a vision config, given as a number or as a pair of equal numbers."""
    size = getattr(config, name)
    return int(size if isinstance(size, int) else size[0])


def square(tokens: int) -> tuple[int, int]:
    """Height and width of a square with this number of tokens."""
    side = math.isqrt(tokens)
    return side, side
