# SPDX-License-Identifier: Apache-2.0
"""Registration. Runs in every process of vLLM, perhaps more than once; touches no device and loads no model code."""

from __future__ import annotations

import os

ARCHITECTURES = {
    "MustDropLlavaForConditionalGeneration": "LlavaForConditionalGeneration",
    "MustDropLlavaNextForConditionalGeneration": "LlavaNextForConditionalGeneration",
}
"""Ours, and vLLM's own of the same checkpoints, whose place they take where MUSTDROP_VLLM is set."""
_MODELS = "mustdrop_kernels.integrations.vllm.model"


def register() -> None:
    """Tells vLLM of the models and of what has to be set up for them."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine import MustDropEngineConfig
    from .settings import VARIABLE

    for ours, plain in ARCHITECTURES.items():
        for name in (ours, plain) if os.environ.get(VARIABLE) else (ours,):
            if getattr(ModelRegistry.models.get(name), "module_name", None) != _MODELS:
                ModelRegistry.register_model(name, f"{_MODELS}:{ours}")
            MODELS_CONFIG_MAP[name] = MustDropEngineConfig
