# SPDX-License-Identifier: Apache-2.0
"""CPU_ATTN."""

from __future__ import annotations

from torch import Tensor

from .backend import AttentionBackend

READABLE = ("vec", "vec16")
"""Layouts whose keys can be viewed as (blocks, block_size, Hk, D)."""


class CpuAttn(AttentionBackend):
    """vLLM's attention on CPUs, which keeps the keys of a block transposed, before its values."""

    def check(self, block_size: int) -> None:
        """See ``AttentionBackend.check``."""
        for isa in sorted({layer.isa for layer in self.layers}):
            if isa not in READABLE:
                raise ValueError(
                    f"mustdrop: the CPU attention's {isa!r} cache is not served, which vLLM takes for bfloat16 on a "
                    "processor with matrix tiles; dtype float16 or float32 has another"
                )
        super().check(block_size)

    def views(self, cache: Tensor) -> tuple[Tensor, Tensor]:  # (blocks, Hk, block_size, 2 D)
        """See ``AttentionBackend.views``. Keys are stored as (blocks, Hk, D, block_size)."""
        blocks, heads, slots, width = cache.shape
        halves = cache.view(blocks, heads, 2, slots * width // 2)
        keys = halves[:, :, 0].unflatten(-1, (width // 2, slots)).permute(0, 3, 1, 2)
        values = halves[:, :, 1].unflatten(-1, (slots, width // 2)).permute(0, 2, 1, 3)
        return keys, values
