# SPDX-License-Identifier: Apache-2.0
"""Giving blocks of a running request back: the one place that knows how vLLM's pool does it."""

from __future__ import annotations

from typing import Any


def release_leading_blocks(kv_cache_manager: Any, request_id: str, tokens: int) -> int:
    """Frees the leading blocks of a request that `tokens` dropped tokens have emptied; returns how many.

    Their places in the request's list are taken by the null block, so that the blocks after them keep theirs: blocks
    are counted by the plain sequence's length. The model never reads those places again.
    """
    freed = 0
    for manager in kv_cache_manager.coordinator.single_type_managers:
        pool = manager.block_pool
        before = pool.get_num_free_blocks()
        manager._remove_blocks_in_range(request_id, 0, tokens // manager.block_size)
        freed += pool.get_num_free_blocks() - before
    return freed
