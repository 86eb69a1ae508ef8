# SPDX-License-Identifier: Apache-2.0
"""The operators as documented Python functions.

Each is ``torch.ops.mustdrop.<name>`` with named results and a ``backend`` keyword (see ``mustdrop_kernels.backends``).
All operators share these properties:

- No host synchronization and no allocation that depends on data: a result whose length depends on data has a capacity
  known from shapes, and an int32 ``counts`` tensor on the device holds its length.
- float32, float16 and bfloat16; sums in float32, rounded once. Operators that only move tokens take any dtype.
- Any strides with a contiguous last dimension; a paged cache may have any strides.
- The same input gives the same bits on the same device. Ties go to the lower index; NaN ranks lowest.
- ``spatial_merge`` and ``gather_tokens`` are differentiable in ``x``, in reverse and forward mode and under
  ``torch.func`` (``grad``, ``vjp``, ``jvp``, ``jacrev``, ``jacfwd``, ``hessian``, ``vmap``, composed too). The others
  have no gradient: the backward pass raises, and so does a call with a forward-mode tangent, except of
  ``select_dual`` and ``select_topk``, whose results are integers. ``vmap`` batches all operators but the in-place
  ones, which no transform of ``torch.func`` may contain.
- Lists of tensors have one length, or one entry for all layers; a call whose lists are all empty has no effect.
- Numbers may be Python's, NumPy's or tensors of no dimension; arrays serve as lists of numbers.
- torch's settings (default dtype and device, deterministic algorithms, matmul precision, autocast) change no bit.
- A wrong argument raises a RuntimeError that names it, and an explicit backend that does not serve the call a
  ``mustdrop_kernels.backends.BackendError``, before any work.

The method is MustDrop, "Multi-Stage Vision Token Dropping" (arXiv 2411.10803). One file holds one family of operators:
result types, documented functions, argument checks and fakes.
"""

from __future__ import annotations

# ruff: noqa: F403, I001  (OPS follows this order, that of the stages)
from . import merge, cls_attention as cls, scores, select, attention_select, gather, compact
from .contract import CONTRACTS
from .token_types import TokenType
from .merge import *
from .cls_attention import *
from .scores import *
from .select import *
from .attention_select import *
from .gather import *
from .compact import *

OPS = tuple(CONTRACTS)
"""Names of all operators."""

__all__ = [
    "OPS",
    "TokenType",
    *merge.__all__,
    *cls.__all__,
    *scores.__all__,
    *select.__all__,
    *attention_select.__all__,
    *gather.__all__,
    *compact.__all__,
]
