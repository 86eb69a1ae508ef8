# SPDX-License-Identifier: Apache-2.0
"""Prompts of every kind."""

from __future__ import annotations

import tiny_llava

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
    """The processor's inputs for one of `PROMPTS` and its pictures."""
    texts = PROMPTS[name]
    count = sum(text.count("<image>") for text in texts)
    # Unequal flat shares: the images merge to different numbers of tokens.
    pictures = [tiny_llava.picture(seed, flat=(0.5, 0.25, 0.75)[seed]) for seed in range(count)]
    return dict(processor(images=pictures or None, text=texts, return_tensors="pt", padding=True))
