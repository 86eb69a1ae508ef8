# SPDX-License-Identifier: Apache-2.0
"""The protocol of an attention backend, and the cache layout of those for GPUs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_CACHE_TYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
_PER_HEAD = "_per_token_head"


class AttentionBackend:
    """A backend whose cache is (blocks, Hk, block_size, 2 D) to its layers, with the key before the value in a row.

    Any strides are served. In the formats with scales per token and head a row holds these as well, so each half of it
    moves as a whole.
    """

    def __init__(self, layers: list[Any]) -> None:  # attention layers of the language model
        self.layers = layers

    def check(self, block_size: int) -> None:
        """Raises ``ValueError`` for caches that cannot be compacted; called once they are allocated."""
        kind = self.layers[0].kv_cache_dtype
        if not (kind in _CACHE_TYPES or kind.endswith(_PER_HEAD)):
            raise ValueError(
                f"mustdrop: kv_cache_dtype {kind!r} is not served, whose scales are shared by the tokens of a block; "
                f"{', '.join(_CACHE_TYPES)} and the types that end in {_PER_HEAD} are"
            )
        slots = {self.views(layer.kv_cache)[0].shape[1] for layer in self.layers}
        if slots != {block_size}:
            raise ValueError(
                f"mustdrop: block_size {block_size} is split by the attention backend into blocks of {min(slots)} "
                f"slots; give block_size={min(slots)}"
            )

    def views(self, cache: Tensor) -> tuple[Tensor, Tensor]:  # cache of a layer
        """Views of keys and values as (blocks, block_size, Hk, D)."""
        keys, values = cache.transpose(1, 2).chunk(2, dim=-1)
        return keys, values

    def caches(self) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the keys and values of all layers."""
        keys, values = zip(*(self.views(layer.kv_cache) for layer in self.layers), strict=True)
        return list(keys), list(values)

    def build(self, groups: list[Any], common: Any) -> Any:
        """The layers' metadata from vLLM's ``CommonAttentionMetadata``, by its ``AttentionGroup`` of these layers."""
        name = self.layers[0].layer_name
        return next(group for group in groups if name in group.layer_names).build_metadata(common)
