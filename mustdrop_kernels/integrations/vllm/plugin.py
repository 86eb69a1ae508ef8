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
    """Registers the models and their engine configuration with vLLM, and wraps its processing of requests.

    Under a vLLM that is not supported the models are registered so that their configuration refuses to start, and
    nothing else is changed; if it lacks the names used here, nothing is registered.

    Raises:
        ValueError: MUSTDROP_VLLM is set, and vLLM lacks a name that is used here.
    """
    from vllm.logger import init_logger
    from vllm.version import __version__

    from .settings import VARIABLE
    from .versions import problem

    unsupported, everywhere = problem(__version__), bool(os.environ.get(VARIABLE))
    try:
        if unsupported is None:
            from .inputs import install

            install()
        _register_models(everywhere)
    except (ImportError, AttributeError) as error:
        sentence = unsupported or f"mustdrop: vLLM {__version__} lacks a name that the plug-in uses"
        if everywhere:
            raise ValueError(sentence) from error
        init_logger("vllm.mustdrop").warning("%s; tokens cannot be dropped (%s)", sentence, error)


def _register_models(everywhere: bool) -> None:
    """Registers this plug-in's architectures, and in place of vLLM's own ones too if MUSTDROP_VLLM is set."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine import MustDropEngineConfig

    for ours, plain in ARCHITECTURES.items():
        for name in (ours, plain) if everywhere else (ours,):
            if getattr(ModelRegistry.models.get(name), "module_name", None) != _MODELS:
                ModelRegistry.register_model(name, f"{_MODELS}:{ours}")
            MODELS_CONFIG_MAP[name] = MustDropEngineConfig
