# SPDX-License-Identifier: Apache-2.0
"""TRITON_ATTN: NVIDIA and AMD GPUs."""

from __future__ import annotations

from .backend import AttentionBackend


class TritonAttn(AttentionBackend):
    """vLLM's Triton kernels, whose metadata are tensors of the step and scratch memory."""
