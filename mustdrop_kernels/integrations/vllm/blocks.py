# SPDX-License-Identifier: Apache-2.0
"""What is done to blocks of requests: the one place that knows how vLLM's pool does it."""

from __future__ import annotations

from collections.abc import Callable
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


def keep_out_of_prefix_cache(kv_cache_manager: Any, private: Callable[[Any], bool]) -> None:
    """From here on no request finds a block of these requests; they do not look for any with ``never_share``."""
    coordinator = kv_cache_manager.coordinator
    cache_blocks = coordinator.cache_blocks

    def cache_public_blocks(request: Any, num_computed_tokens: int) -> None:
        if not private(request):
            cache_blocks(request, num_computed_tokens)

    coordinator.cache_blocks = cache_public_blocks


def never_share(request: Any) -> None:
    """This request takes no block of another."""
    request.skip_reading_prefix_cache = True


def shares_blocks(kv_cache_manager: Any, request_id: str) -> bool:
    """Whether a block of this request is somebody else's too."""
    managers = kv_cache_manager.coordinator.single_type_managers
    return any(block.ref_cnt > 1 for manager in managers for block in manager.req_to_blocks[request_id])
