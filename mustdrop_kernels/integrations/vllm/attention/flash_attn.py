# SPDX-License-Identifier: Apache-2.0
"""FLASH_ATTN: FlashAttention 2, 3 and 4, the default on Ampere and Hopper."""

from __future__ import annotations

from .backend import AttentionBackend


class FlashAttn(AttentionBackend):
    """FlashAttention. Version 3 plans its work from the lengths of a step, on the device, whenever metadata are built.

    Where graphs are used the builder copies the plan into a buffer of its own, on the same stream; the next step
    replaces it before a graph reads it.
    """
