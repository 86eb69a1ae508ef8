# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backends that are served: the views of their caches, and how they are told about a step.

A request that has lost tokens is an ordinary, shorter request to every one of them (layout.py). So a backend differs in
two things only: where its cache holds keys and values, and what building its metadata more than once a step requires.
"""

from __future__ import annotations

from typing import Any

from .backend import AttentionBackend
from .cpu_attn import CpuAttn
from .flash_attn import FlashAttn
from .flashinfer import FlashInfer
from .triton_attn import TritonAttn

_BACKENDS: dict[str, type[AttentionBackend]] = {
    "CPU_ATTN": CpuAttn,
    "FLASH_ATTN": FlashAttn,
    "FLASHINFER": FlashInfer,
    "TRITON_ATTN": TritonAttn,
}


def backend_of(layers: list[Any]) -> AttentionBackend:
    """The backend of the attention layers of a language model.

    Raises:
        ValueError: the layers differ in their backend, or it is not served.
    """
    names = sorted({layer.attn_backend.get_name() for layer in layers})
    if len(names) > 1 or names[0] not in _BACKENDS:
        raise ValueError(
            f"mustdrop: the attention backend {' with '.join(names)} is not served; attention_backend can be one of "
            f"{', '.join(_BACKENDS)}"
        )
    return _BACKENDS[names[0]](layers)


__all__ = ["AttentionBackend", "backend_of"]
