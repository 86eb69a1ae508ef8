# SPDX-License-Identifier: Apache-2.0
"""Registration, in every process of vLLM and possibly repeated; touches no device and loads no model code."""

from __future__ import annotations

import os

ARCHITECTURES = {
    "MustDropLlavaForConditionalGeneration": "LlavaForConditionalGeneration",
    "MustDropLlavaNextForConditionalGeneration": "LlavaNextForConditionalGeneration",
}
"""Architectures of this plug-in, and vLLM's own ones, which they replace if MUSTDROP_VLLM is set."""
_MODELS = "mustdrop_kernels.integrations.vllm.model"


def register() -> None:
    """Registers the models and their engine configuration with vLLM, and wraps its processing of requests."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from . import inputs
    from .engine import MustDropEngineConfig
    from .settings import VARIABLE

    inputs.install()
    for ours, plain in ARCHITECTURES.items():
        for name in (ours, plain) if os.environ.get(VARIABLE) else (ours,):
            if getattr(ModelRegistry.models.get(name), "module_name", None) != _MODELS:
                ModelRegistry.register_model(name, f"{_MODELS}:{ours}")
            MODELS_CONFIG_MAP[name] = MustDropEngineConfig
