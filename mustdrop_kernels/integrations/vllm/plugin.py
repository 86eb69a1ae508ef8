# SPDX-License-Identifier: Apache-2.0
"""Registration. Runs in every process of vLLM, perhaps more than once; touches no device and loads no model code."""

from __future__ import annotations

ARCHITECTURES = ("MustDropLlavaForConditionalGeneration", "MustDropLlavaNextForConditionalGeneration")
_MODELS = "mustdrop_kernels.integrations.vllm.model"


def register() -> None:
    """Tells vLLM of the models and of what has to be set up for them."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine import MustDropEngineConfig

    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"{_MODELS}:{architecture}")
        MODELS_CONFIG_MAP[architecture] = MustDropEngineConfig
