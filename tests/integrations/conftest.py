# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA and prompts of every kind."""

from __future__ import annotations

import pytest
import tiny_llava
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processor():
    return tiny_llava.processor()


@pytest.fixture(scope="session")
def models():
    """One model per attention implementation, with the same weights."""
    return {attention: tiny_llava.model(attention=attention) for attention in ("sdpa", "eager")}


@pytest.fixture(params=["sdpa", "eager"])
def model(request, models):
    return models[request.param]


@pytest.fixture
def sdpa(models):
    return models["sdpa"]


PROMPTS = {
    "one": ["USER: <image>\nWhat is in the image? ASSISTANT:"],
    "padded": ["USER: <image>\nWhat is in the image? ASSISTANT:", "USER: <image>\ncar? ASSISTANT: a"],
    "two images": ["USER: <image> and <image>\nWhat is in the images? ASSISTANT:"],
    "different numbers": [
        "USER: <image>\ncar? ASSISTANT: a",
        "USER: <image>, then <image>\nWhat is on the street? ASSISTANT:",
        "USER: What is a car? ASSISTANT:",
    ],
}


def make_inputs(processor, name):
    texts = PROMPTS[name]
    count = sum(text.count("<image>") for text in texts)
    # Unequal flat shares: the images merge to different numbers of tokens.
    pictures = [tiny_llava.picture(seed, flat=(0.5, 0.25, 0.75)[seed]) for seed in range(count)]
    return dict(processor(images=pictures or None, text=texts, return_tensors="pt", padding=True))


@pytest.fixture(params=PROMPTS)
def inputs(request, processor):
    return make_inputs(processor, request.param)


@pytest.fixture
def one(processor):
    return make_inputs(processor, "one")


@pytest.fixture
def padded(processor):
    return make_inputs(processor, "padded")
