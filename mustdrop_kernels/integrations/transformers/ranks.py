# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: the processes that share the attention heads of a model loaded with ``tp_plan``."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def head_ranks(model: Any) -> dist.ProcessGroup | None:
    """The ranks that share the language model's heads; None if this rank has all of them.

    Raises:
        ValueError: the model uses pipeline parallelism, or heads are not a multiple of the ranks.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ("tp",)  # transformers 4 names none
    sizes = dict(zip(names, mesh.shape, strict=True))
    if sizes.get("pp", 1) > 1:
        raise ValueError("drop_tokens cannot be used with pipeline parallelism: each rank would drop for itself")
    ranks = sizes.get("tp", 1)
    if ranks == 1:
        return None
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % ranks:
            raise ValueError(f"drop_tokens: {name} ({getattr(config, name)}) must be a multiple of the {ranks} ranks")
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()
