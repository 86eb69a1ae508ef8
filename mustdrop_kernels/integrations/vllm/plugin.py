# SPDX-License-Identifier: Apache-2.0
"""Registration. Runs in every process of vLLM, perhaps more than once; touches no device and loads no model code."""

from __future__ import annotations

ARCHITECTURE = "MustDropLlavaForConditionalGeneration"
_HERE = "mustdrop_kernels.integrations.vllm"


def register() -> None:
    """Tells vLLM of the model and of what has to be set up for it."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine import MustDropEngineConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{_HERE}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = MustDropEngineConfig
