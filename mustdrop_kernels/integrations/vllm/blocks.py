# SPDX-License-Identifier: Apache-2.0
"""Operations on the blocks of requests; the only file that depends on internals of vLLM's block pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def release_leading_blocks(kv_cache_manager: Any, request_id: str, tokens: int) -> int:
    """Frees the leading blocks of a request that `tokens` dropped tokens have emptied; returns their number.

    The null block replaces them in the request's list, so that the indices of later blocks still follow the plain
    sequence's length. The model does not read those entries again.
    """
    freed = 0
    for manager in kv_cache_manager.coordinator.single_type_managers:
        pool = manager.block_pool
        before = pool.get_num_free_blocks()
        manager._remove_blocks_in_range(request_id, 0, tokens // manager.block_size)
        freed += pool.get_num_free_blocks() - before
    return freed


def keep_out_of_prefix_cache(kv_cache_manager: Any, private: Callable[[Any], Any]) -> None:
    """Keeps the blocks of private requests out of the prefix cache; ``never_share`` keeps them from reading it."""
    coordinator = kv_cache_manager.coordinator
    cache_blocks = coordinator.cache_blocks

    def cache_public_blocks(request: Any, num_computed_tokens: int) -> None:
        if not private(request):
            cache_blocks(request, num_computed_tokens)

    coordinator.cache_blocks = cache_public_blocks


def never_share(request: Any) -> None:
    """Keeps a request from reading blocks of another one."""
    request.skip_reading_prefix_cache = True


def shares_blocks(kv_cache_manager: Any, request_id: str) -> bool:
    """Whether another request shares a block of this one."""
    managers = kv_cache_manager.coordinator.single_type_managers
    return any(block.ref_cnt > 1 for manager in managers for block in manager.req_to_blocks[request_id])
