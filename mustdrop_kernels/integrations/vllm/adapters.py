# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of the live rows of a step; vLLM has laid them out for all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.lora.layers import LoRAMapping


def set_adapters(
    manager: Any,  # vLLM's LoRAModelManager
    adapters: Sequence[int],  # of each request; 0: none
    rows: Sequence[int],  # live rows of each request
) -> None:
    """Applies the adapter of each request to its live rows. The next step begins with vLLM's own layout."""
    of_rows = [adapter for adapter, count in zip(adapters, rows, strict=True) for _ in range(count)]
    manager.set_adapter_mapping(LoRAMapping(tuple(of_rows), tuple(adapters), is_prefill=True))
