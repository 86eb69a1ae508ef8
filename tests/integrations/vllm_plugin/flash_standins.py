# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch in place of FlashAttention's three compiled functions: FLASH_ATTN in a vLLM on a CPU.

vLLM's metadata, builder and layers are its own. The stand-ins check what the kernels require: that no length exceeds
the promised maximum, and that a plan of version 3 was made for the lengths of its call.
"""

from __future__ import annotations

import itertools

import pytest
import torch


def write_cache(key, value, key_cache, value_cache, slots, kv_cache_dtype, k_scale, v_scale):
    """Stands in for ``reshape_and_cache_flash``; slots below zero are padding."""
    real = slots >= 0
    block, slot = slots[real] // key_cache.shape[1], slots[real] % key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows = new[: len(slots)][real]
        if cache.element_size() == 1:
            rows = (rows.float() / scale).to(torch.float8_e4m3fn).view(cache.dtype)
        cache[block, slot] = rows.to(cache.dtype)


def attention(
    q,  # (rows, Hq, D)
    k,  # (blocks, slots, Hk, D)
    v,
    *,
    out,
    cu_seqlens_q,
    max_seqlen_q,
    seqused_k,
    max_seqlen_k,
    softmax_scale,
    causal,
    block_table,
    scheduler_metadata=None,
    k_descale=None,
    v_descale=None,
    **unused,
):
    """Stands in for ``flash_attn_varlen_func``."""
    begins, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert max(lengths) <= max_seqlen_k
    assert max(b - a for a, b in itertools.pairwise(begins)) <= max_seqlen_q
    if scheduler_metadata is not None:
        assert scheduler_metadata[: len(lengths)].tolist() == lengths, "a plan for other lengths"
    for i, length in enumerate(lengths):
        rows = q[begins[i] : begins[i + 1]]
        if not len(rows):  # padding
            continue
        pages = block_table[i, : -(-length // k.shape[1])].long()
        keys, values = (
            _values(x[pages], scale).flatten(0, 1)[:length].repeat_interleave(q.shape[1] // x.shape[2], 1)
            for x, scale in ((k, k_descale), (v, v_descale))
        )
        scores = torch.einsum("qhd,khd->hqk", _values(rows).float(), keys) * softmax_scale
        if causal:
            place = torch.arange(length - len(rows), length)
            scores = scores.masked_fill(torch.arange(length) > place[:, None], float("-inf"))
        out[begins[i] : begins[i + 1]] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
    return out


def _values(x, scale=None):
    if x.element_size() == 1:
        x = x.view(torch.float8_e4m3fn)
    return x.float() if scale is None else x.float() * scale.flatten()[0]


def plan(*, cache_seqlens, **unused):
    """Stands in for ``get_scheduler_metadata``: the plan of version 3 is the lengths it was made for."""
    return cache_seqlens.clone()


def install(patch: pytest.MonkeyPatch, version: int) -> None:
    """Makes FLASH_ATTN run with these functions, as FlashAttention of a version."""
    import vllm.v1.attention.backends.fa_utils as fa_utils

    replacements = {
        "flash_attn_varlen_func": attention,
        "reshape_and_cache_flash": write_cache,
        "get_scheduler_metadata": plan,
        "compile_flash_attn_varlen_func_from_specs": None,
        "is_flash_attn_varlen_func_available": lambda: True,
        "get_flash_attn_version": lambda *args, **kwargs: version,
        "is_fa_version_supported": lambda *args, **kwargs: True,
        "flash_attn_supports_sinks": lambda *args, **kwargs: False,
        "flash_attn_supports_kv_cache_dtype": lambda *args, **kwargs: True,
    }
    for name, value in replacements.items():
        patch.setattr(fa_utils, name, value, raising=False)
    import vllm.v1.attention.backends.flash_attn as flash_attn

    for name, value in replacements.items():
        if hasattr(flash_attn, name):
            patch.setattr(flash_attn, name, value)
