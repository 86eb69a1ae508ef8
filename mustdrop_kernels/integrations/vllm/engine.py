# SPDX-License-Identifier: Apache-2.0
"""Engine configuration: scheduler, worker, and checks of the engine's settings."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from . import settings

_SCHEDULER = "mustdrop_kernels.integrations.vllm.scheduler.MustDropScheduler"
_WORKER = "mustdrop_kernels.integrations.vllm.worker.MustDropCPUWorker"


class MustDropEngineConfig(VerifyAndUpdateConfig):
    """Called by vLLM once, in the process that creates the engine's configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Sets scheduler and worker; raises ``ValueError`` for settings under which tokens cannot be dropped."""
        hf_config = vllm_config.model_config.hf_config
        if not hasattr(hf_config, settings.FIELD) and (fields := settings.from_environment()) is not None:
            setattr(hf_config, settings.FIELD, fields)  # hf_config is sent to all processes
        settings.read(hf_config)
        for problem in _problems(vllm_config):
            raise ValueError(f"mustdrop: {problem}")
        _set_up(vllm_config)


def _problems(vllm_config: Any) -> list[str]:
    parallel, cache, scheduler = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.scheduler_config
    model, lora = vllm_config.model_config, vllm_config.lora_config
    longest, batched = model.max_model_len, scheduler.max_num_batched_tokens
    scheduled = scheduler.max_num_scheduled_tokens or batched
    checks = {
        f"runner must be 'generate', got {model.runner_type!r}: pooling reads the hidden states of all tokens, those "
        "that were dropped included": model.runner_type != "generate",
        f"model_class_overrides must leave out {model.architecture}": model.architecture in model.model_class_overrides,
        "only vLLM's CPU attention is served so far": not current_platform.is_cpu(),
        "pipeline_parallel_size must be 1: a stage has no access to the drops of an earlier one": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism cannot be used: a prompt's pages must be in one place": (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1
        ),
        "speculative decoding cannot be used: its drafts read the pages of tokens that are gone": (
            vllm_config.speculative_config is not None
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
        f"kv_cache_dtype must be 'auto', got {cache.cache_dtype!r}": cache.cache_dtype != "auto",
        "the model runner V2 is not served: unset VLLM_USE_V2_MODEL_RUNNER": vllm_config.use_v2_model_runner,
        "long_prefill_token_threshold must be 0: a prompt with an image is read in one piece": (
            0 < scheduler.long_prefill_token_threshold < longest
        ),
        f"scheduler_cls must be left out, got {scheduler.scheduler_cls!r}": (
            scheduler.scheduler_cls not in (None, _SCHEDULER)
        ),
        f"worker_cls must be left out, got {parallel.worker_cls!r}": parallel.worker_cls not in ("auto", _WORKER),
        _too_short("max_num_batched_tokens", batched, longest): batched < longest,
        _too_short("max_num_scheduled_tokens", scheduled, longest): scheduled < longest <= batched,
    }
    return [problem for problem, applies in checks.items() if applies]


def _too_short(name: str, value: int, longest: int) -> str:
    return (
        f"{name} ({value}) must be at least max_model_len ({longest}): a prompt with an image is read in one piece, "
        "since the text after the image tokens scores them"
    )


def _set_up(vllm_config: Any) -> None:
    # The scheduler requires the drops of a step before it plans the next one.
    vllm_config.scheduler_config.async_scheduling = False
    vllm_config.scheduler_config.scheduler_cls = _SCHEDULER
    vllm_config.parallel_config.worker_cls = _WORKER
