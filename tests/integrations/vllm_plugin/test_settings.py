# SPDX-License-Identifier: Apache-2.0
"""vLLM's settings, one line each, in engines of several settings.

Those that leave the numbers alone give transformers' tokens under a plan that runs all stages. Those that change the
numbers give plain vLLM's tokens under a plan that keeps every token, and do not depend on the batch under a plan that
drops some.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import ASKS, BUDGETS, PLANS, Ask, compare_with_plain, engine, generate

ALL_STAGES = PLANS["all stages"]
NEW = 8
LONG = Ask("USER: What is on the street? " * 7 + "ASSISTANT:")  # text of more than two blocks
ASKED = [*ASKS[:4], LONG]

SAME_NUMBERS = {
    "scheduler": [
        dict(max_num_active_seqs=2),
        dict(scheduling_policy="priority"),
        dict(async_scheduling=True),
        dict(enable_chunked_prefill=False),
        dict(disable_chunked_mm_input=True),
        dict(scheduler_reserve_full_isl=False),
        dict(watermark=0.05),
        dict(prefill_schedule_interval=3),
        dict(stream_interval=4),
        dict(long_prefill_token_threshold=512),  # max_model_len
        dict(long_prefill_token_threshold_adaptive=True),
        dict(disable_hybrid_kv_cache_manager=True),
    ],
    "one sequence": [
        dict(max_num_seqs=1),
        dict(enable_prefix_caching=False),
        dict(block_size=64),
        dict(kv_cache_memory_bytes=1 << 26),
    ],
    "cache": [
        dict(block_size=None),
        dict(prefix_caching_hash_algo="sha256_cbor"),
        dict(kv_sharing_fast_prefill=True),
        dict(disable_sliding_window=True),
        dict(disable_cascade_attn=False),
        dict(kv_cache_metrics=True, kv_cache_metrics_sample=1.0),
        dict(kv_events_config={"enable_kv_cache_events": True, "publisher": "null"}),
    ],
    "images": [
        dict(mm_processor_cache_gb=0),
        dict(renderer_num_workers=2),
        dict(skip_mm_profiling=True),
        dict(limit_mm_per_prompt={"image": 2}),
        dict(interleave_mm_strings=True),
        dict(media_io_kwargs={"image": {"rgba_background_color": [0, 0, 0]}}),
        dict(mm_processor_kwargs={"do_rescale": True}),
        dict(mm_hasher_algorithm="sha256"),
        dict(mm_encoder_attn_backend="TORCH_SDPA"),
        dict(mm_encoder_tp_mode="data"),
        dict(video_pruning_rate=0.5),
        dict(enable_mm_processor_stats=True, disable_log_stats=False),
    ],
    "model": [
        dict(model_impl="vllm"),
        dict(safetensors_load_strategy="eager"),
        dict(generation_config="vllm"),
        dict(override_generation_config={"temperature": 0.5}),
        dict(logprobs_mode="processed_logits"),
        dict(use_fp64_gumbel=True),
        dict(cpu_offload_gb=0.01),
        dict(enable_dbo=True),  # vLLM disables it on a CPU
        dict(disable_custom_all_reduce=True),
        dict(worker_extension_cls="worker_extension.Extension"),
        dict(additional_config={"a": 1}),
        dict(attention_backend="TRITON_ATTN"),  # vLLM takes its own for a CPU
        dict(optimization_level=0),
        dict(performance_mode="throughput"),
        dict(enable_mfu_metrics=True, enable_logging_iteration_details=True, cudagraph_metrics=True),
    ],
}
OTHER_NUMBERS = {
    "float16, 8-bit weights": dict(dtype="float16", quantization="int8_per_channel_weight_only"),
}


@pytest.mark.parametrize("name", SAME_NUMBERS)
def test_tokens_equal_transformers(name, checkpoint, transformers_of):
    expected = [transformers_of.generate(ask, ALL_STAGES, NEW)[0] for ask in ASKED]
    settings = {key: value for setting in SAME_NUMBERS[name] for key, value in setting.items()}
    with engine(checkpoint, ALL_STAGES, **settings) as llm:
        assert generate(llm, ASKED, NEW) == expected
        assert generate(llm, ASKED[::-1], NEW) == expected[::-1]


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_tokens_equal_plain_vllm(name, checkpoint):
    plain, dropped = compare_with_plain(
        checkpoint, lambda llm, asks: generate(llm, asks, NEW), ASKED, ALL_STAGES, **OTHER_NUMBERS[name]
    )
    assert dropped[-1] == plain[-1]


@pytest.mark.parametrize("settings", [dict(limit_mm_per_prompt={"image": 0}), dict(language_model_only=True)])
def test_without_images_the_tower_is_left_out(settings, checkpoint, transformers_of):
    expected = [transformers_of.generate(ask, BUDGETS, NEW)[0] for ask in (ASKS[1], LONG)]
    with engine(checkpoint, ALL_STAGES, **settings) as llm:
        assert generate(llm, [ASKS[1], LONG], NEW) == expected
        with pytest.raises(ValueError, match="Multi-modal processor not available"):
            generate(llm, ASKS[:1], NEW)
