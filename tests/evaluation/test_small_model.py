# SPDX-License-Identifier: Apache-2.0
"""The model in the package: plain transformers loads it, and it answers."""

from __future__ import annotations

import contextlib

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mustdrop_kernels.evaluation import datasets, questions
from mustdrop_kernels.evaluation.checkpoint import SMALL_MODEL
from mustdrop_kernels.evaluation.methods import Sizes, make
from mustdrop_kernels.integrations.transformers import drop_tokens


def share_right(subject, asked: datasets.Questions, method: str = "full") -> float:
    found = make(method, None, Sizes.of(subject.model.config))
    right = 0.0
    for begin in range(0, len(asked.examples), 8):
        examples = asked.examples[begin : begin + 8]
        inputs = subject.batch([e.picture() for e in examples], [e.text for e in examples])
        dropping = contextlib.nullcontext() if method == "full" else drop_tokens(subject.model, found.config)
        with dropping, torch.inference_mode():
            tokens = subject.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = subject.processor.tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(asked.score(text, e.answers) for text, e in zip(answers, examples, strict=True))
    return right / len(asked.examples)


def test_it_answers_held_out_questions(subject) -> None:
    """36 questions; guessing gets 17 of 100 right."""
    asked = datasets.made("test", [21], 36)
    chance = sum(questions.CHANCE[example.kind] for example in asked.examples) / 36
    assert chance < 0.17
    assert share_right(subject, asked) > 0.75
    assert share_right(subject, asked, "after-0") < 0.6, "with the tokens the answers go"


def test_plain_transformers_loads_it() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(SMALL_MODEL)
    (item,) = questions.items("test", 4, 1)
    inputs = processor(images=item.scene().image, text=item.question.prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokens[-1] == model.generation_config.eos_token_id, "it stops after a word"
    assert processor.decode(tokens, skip_special_tokens=True).strip() in questions.WORDS
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question.text}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == item.question.prompt


def test_it_is_small() -> None:
    files = list(SMALL_MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 10_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= {f.name for f in files}
