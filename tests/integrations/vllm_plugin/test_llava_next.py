# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT, whose images have tokens of several tiles and lengths, against a masked reference."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import llava_next
import torch
from engines import SLOTS, engine, free_blocks, sampling, scheduler
from transformers import LlavaNextForConditionalGeneration

from mustdrop_kernels.config import MustDropConfig

ARCHITECTURE = "MustDropLlavaNextForConditionalGeneration"
TEXTS = ["USER: <image>\nWhat is in the image? ASSISTANT:", "USER: <image>\ncar? ASSISTANT: a", "USER: <image> on? "]
NEW = 12
PLAN = {"merge": False, "key_rate": 0.0, "pruning_layers": [1, 3, 5], "budgets": [60, 40, 15]}


def test_tokens_equal_the_masked_reference(tmp_path):
    llava_next.save(tmp_path)
    pictures = [llava_next.picture(seed) for seed in range(3)]
    model = LlavaNextForConditionalGeneration.from_pretrained(tmp_path).eval()
    model.generation_config.eos_token_id = None
    expected, dropped = [], []
    for text, picture in zip(TEXTS, pictures, strict=True):
        inputs = dict(llava_next.processor()(images=picture, text=text, return_tensors="pt"))
        reference = llava_next.Reference(model, MustDropConfig.from_dict({**PLAN, "evict_from": 0}))
        tokens, _ = reference.generate(inputs, NEW)
        expected.append(tokens[0].tolist())
        dropped.append(int((~reference.alive[-1]).sum()))
    assert len(set(dropped)) > 1  # pictures of different size
    overrides = {"architectures": [ARCHITECTURE], "mustdrop": PLAN}
    with engine(tmp_path, None, hf_overrides=overrides) as llm, torch.inference_mode():
        free = free_blocks(llm)
        requests = [
            {"prompt": text, "multi_modal_data": {"image": picture}}
            for text, picture in zip(TEXTS, pictures, strict=True)
        ]
        outputs = llm.generate(requests, sampling(NEW), use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        for request, tokens in zip(requests, expected, strict=True):
            assert list(llm.generate([request], sampling(NEW), use_tqdm=False)[0].outputs[0].token_ids) == tokens
        assert scheduler(llm).released_blocks == 2 * sum(count // SLOTS for count in dropped)
        assert free_blocks(llm) == free
