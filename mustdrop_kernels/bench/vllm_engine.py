# SPDX-License-Identifier: Apache-2.0
"""Context with a vLLM engine of this process, around a LLaVA-1.5 with the plug-in or without."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ARCHITECTURE = "MustDropLlavaForConditionalGeneration"


def overrides(fields: dict[str, Any] | None) -> dict[str, Any]:
    """Engine arguments that enable the plug-in with fields of MustDropConfig; none for None."""
    return {} if fields is None else {"hf_overrides": {"architectures": [ARCHITECTURE], "mustdrop": fields}}


@contextmanager
def engine(**arguments: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` with these arguments, which is shut down at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
