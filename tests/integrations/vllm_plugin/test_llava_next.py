# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT, whose images have several tiles, ends of rows and cropped bars, against transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import llava_next
import torch
from engines import PAGE_SIZE, engine, free_blocks, sampling, scheduler
from transformers import LlavaNextForConditionalGeneration

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

ARCHITECTURE = "MustDropLlavaNextForConditionalGeneration"
TEXTS = ["USER: <image>\nWhat is in the image? ASSISTANT:", "USER: <image>\ncar? ASSISTANT: a", "USER: <image> on? "]
NEW = 12
BUDGETS = {"pruning_layers": [1, 3, 5], "budgets": [60, 40, 15]}
PLANS = {
    "no stage 1": {"merge": False, "key_rate": 0.0, **BUDGETS},
    "budgets": {"merge_budget": 6, "window": [2, 2], "key_rate": 0.1, **BUDGETS},
    "thresholds": {
        "merge_layer": 1,
        "window": [2, 4],
        "key_rate": 0.05,
        "pruning_layers": [0, 4],
        "global_threshold": 0.01,
        "individual_threshold": 0.02,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava_next")
    llava_next.save(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    model = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def in_transformers(model, plan, text, picture):
    """Tokens and the report of the prompt."""
    inputs = llava_next.processor()(images=picture, text=text, return_tensors="pt")
    with drop_tokens(model, MustDropConfig.from_dict({**plan, "evict_from": 0})) as report:
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), report.last


@pytest.mark.parametrize("name", PLANS)
def test_tokens_equal_transformers(name, folder, model):
    plan = PLANS[name]
    pictures = [llava_next.picture(seed) for seed in range(3)]
    asks = list(zip(TEXTS, pictures, strict=True))
    expected, reports = zip(*(in_transformers(model, plan, *ask) for ask in asks), strict=True)
    dropped = [report.length - report.final_cache.lengths[-1] for report in reports]
    images = [image for report in reports for image in report.images]
    assert len(set(dropped)) > 1  # pictures of different size
    assert all((image.tokens < image.patches) == plan.get("merge", True) for image in images)
    assert all((image.key_tokens > 0) == (plan["key_rate"] > 0) for image in images)
    overrides = {"architectures": [ARCHITECTURE], "mustdrop": plan}
    with engine(folder, None, hf_overrides=overrides) as llm, torch.inference_mode():
        free = free_blocks(llm)
        requests = [{"prompt": text, "multi_modal_data": {"image": picture}} for text, picture in asks]
        outputs = llm.generate(requests, sampling(NEW), use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == list(expected)
        for request, tokens in zip(requests, expected, strict=True):
            assert list(llm.generate([request], sampling(NEW), use_tqdm=False)[0].outputs[0].token_ids) == tokens
        assert scheduler(llm).released_blocks == 2 * sum(count // PAGE_SIZE for count in dropped)
        assert free_blocks(llm) == free
