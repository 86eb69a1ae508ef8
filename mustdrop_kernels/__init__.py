# SPDX-License-Identifier: Apache-2.0
"""Fused kernels that drop vision tokens in every stage of a multimodal model (MustDrop, arXiv 2411.10803).

``torch.ops.mustdrop.*`` are the operators; the functions of this module add documentation, named results and a choice
of backend. ``MustDropConfig`` and ``drop_tokens`` apply them to a Hugging Face model. Importing this package
loads the operator libraries and nothing else: no device is touched, nothing is compiled, no environment is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _load
from ._version import __version__ as __version__

_load.load_all()

from . import backends, ops  # noqa: E402
from .backends import register_backend, use_backend  # noqa: E402
from .config import MustDropConfig  # noqa: E402
from .ops import *  # noqa: E402, F403

if TYPE_CHECKING:
    from .integrations.transformers import drop_tokens

if _load.core.loaded:
    ops.contract.register_fakes()
    backends.serve_dispatcher()
    ops.transforms.register_all()
    ops.explicit.register()

__all__ = ["MustDropConfig", "backends", "drop_tokens", "register_backend", "use_backend"]
__all__ += [name for name in ops.__all__ if name != "OPS"]


def __getattr__(name: str) -> Any:
    """Load ``drop_tokens`` on first use, because it imports transformers."""
    if name == "drop_tokens":
        from .integrations.transformers import drop_tokens

        return drop_tokens
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
