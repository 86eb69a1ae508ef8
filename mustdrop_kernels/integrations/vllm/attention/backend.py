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
        for kind in sorted({layer.kv_cache_dtype for layer in self.layers}):
            if not (kind in _CACHE_TYPES or kind.endswith(_PER_HEAD)):
                raise ValueError(
                    f"mustdrop: kv_cache_dtype {kind!r} is not served; {', '.join(_CACHE_TYPES)} and the types that "
                    f"end in {_PER_HEAD} are"
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

    def build(self, groups: list[Any], common: Any) -> dict[str, Any]:
        """Metadata by the name of a layer, from vLLM's ``CommonAttentionMetadata``.

        vLLM's ``AttentionGroup``s build them: one for layers of equal caches.
        """
        names = {layer.layer_name for layer in self.layers}
        found: dict[str, Any] = {}
        for group in groups:
            if members := names.intersection(group.layer_names):
                found |= dict.fromkeys(members, self.build_group(group, common))
        return found

    def build_group(self, group: Any, common: Any) -> Any:
        """Metadata of the layers of a group."""
        return group.build_metadata(common)
