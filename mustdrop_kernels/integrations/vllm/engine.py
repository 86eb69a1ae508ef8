# SPDX-License-Identifier: Apache-2.0
"""Engine configuration: scheduler, worker of the model runner V1, and checks of the engine's settings."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from . import settings, versions

SCHEDULER = "mustdrop_kernels.integrations.vllm.scheduler.scheduler"
_WORKER_V1 = "mustdrop_kernels.integrations.vllm.runner_v1.MustDropWorker"
_TEXT_DRAFTS = ("ngram", "ngram_gpu")
"""Speculative methods that draft from the text of a request, without a cache of their own."""


class MustDropEngineConfig(VerifyAndUpdateConfig):
    """Called by vLLM once, in the process that creates the engine's configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Sets scheduler and worker; raises ``ValueError`` for settings under which tokens cannot be dropped."""
        versions.check()
        hf_config = vllm_config.model_config.hf_config
        if not hasattr(hf_config, settings.FIELD) and (fields := settings.from_environment()) is not None:
            setattr(hf_config, settings.FIELD, fields)  # hf_config is sent to all processes
        settings.read(hf_config)
        for problem in _problems(vllm_config):
            raise ValueError(f"mustdrop: {problem}")
        _set_up(vllm_config)


def _problems(vllm_config: Any) -> list[str]:
    parallel, cache, scheduler = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.scheduler_config
    model, lora, drafts = vllm_config.model_config, vllm_config.lora_config, vllm_config.speculative_config
    checks = {
        f"runner must be 'generate', got {model.runner_type!r}: pooling reads the hidden states of all tokens, those "
        "that were dropped included": model.runner_type != "generate",
        f"model_class_overrides must leave out {model.architecture}": model.architecture in model.model_class_overrides,
        "pipeline_parallel_size must be 1: a stage has no access to the drops of an earlier one": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism cannot be used: a prompt's pages must be in one place": (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1
        ),
        f"speculative_config must use one of {', '.join(_TEXT_DRAFTS)}: the cache of a draft model holds tokens that "
        "are gone": drafts is not None and drafts.method not in _TEXT_DRAFTS,
        "microbatches (enable_dbo, ubatch_size) cannot be used: a prompt with images is read in one piece": (
            parallel.use_ubatching and not current_platform.is_cpu()
        ),
        "VLLM_USE_BREAKABLE_CUDAGRAPH must be 0: its graphs replay steps in which tokens are dropped": (
            bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH)
        ),
        "kv_transfer_config cannot be used: another engine would read the pages of tokens that are gone": (
            vllm_config.kv_transfer_config is not None
        ),
        "kv_offloading_size cannot be used: it keeps the pages of tokens that are gone": (
            cache.kv_offloading_size is not None
        ),
        "ec_transfer_config cannot be used: images must be encoded by the engine that drops their tokens": (
            vllm_config.ec_transfer_config is not None
        ),
        "mm_encoder_only cannot be used: images must be encoded by the engine that drops their tokens": (
            vllm_config.is_mm_encoder_only
        ),
        "ec_manager_config cannot be used: a prompt's images must be in the cache at once": (
            vllm_config.ec_manager_config.encoder_cache_manager_cls is not None
        ),
        "enable_tower_connector_lora cannot be used: vLLM lays out the tower's adapters without its CLS token": (
            lora is not None and lora.enable_tower_connector_lora
        ),
        f"scheduler_cls must be left out, got {scheduler.scheduler_cls!r}": (
            scheduler.scheduler_cls not in (None, SCHEDULER)
        ),
        f"worker_cls must be left out, got {parallel.worker_cls!r}": parallel.worker_cls not in ("auto", _WORKER_V1),
    }
    return [problem for problem, applies in checks.items() if applies]


def _set_up(vllm_config: Any) -> None:
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    compilation = vllm_config.compilation_config
    if settings.read(vllm_config.model_config.hf_config).needs_vision_stage:
        compilation.cudagraph_mm_encoder = compilation.compile_mm_encoder = False  # the tower's tokens are merged
    if not vllm_config.use_v2_model_runner:
        vllm_config.parallel_config.worker_cls = _WORKER_V1
        vllm_config.scheduler_config.async_scheduling = False
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE  # requests become shorter in the model's forward
