# SPDX-License-Identifier: Apache-2.0
"""Fused kernels that drop vision tokens over their whole life in a multimodal model (MustDrop, arXiv 2411.10803).

``torch.ops.mustdrop.*`` are the operators; the functions here are the same with documentation, named results and a
choice of backend. Importing this package loads the operator libraries and nothing else: no device is touched, nothing
is compiled, no environment is changed.
"""

from __future__ import annotations

from . import _load
from ._version import __version__ as __version__

_load.load_all()

from . import backends  # noqa: E402
from .backends import register_backend, use_backend  # noqa: E402
from .ops import (  # noqa: E402
    ScoredSelection,
    Scores,
    Selection,
    SpatialMerge,
    TokenType,
    cls_attention,
    compact_kv_,
    compact_paged_kv_,
    dual_attention_select,
    gather_tokens,
    select_dual,
    select_topk,
    spatial_merge,
    text_vision_attention,
    text_vision_scores,
    text_vision_scores_paged,
    text_vision_scores_varlen,
    topk_attention_select,
)

if _load.core.loaded:
    from . import autograd, fakes

    fakes.register()
    backends.serve_dispatcher()
    autograd.register()

__all__ = [
    "ScoredSelection",
    "Scores",
    "Selection",
    "SpatialMerge",
    "TokenType",
    "backends",
    "cls_attention",
    "compact_kv_",
    "compact_paged_kv_",
    "dual_attention_select",
    "gather_tokens",
    "register_backend",
    "select_dual",
    "select_topk",
    "spatial_merge",
    "text_vision_attention",
    "text_vision_scores",
    "text_vision_scores_paged",
    "text_vision_scores_varlen",
    "topk_attention_select",
    "use_backend",
]
