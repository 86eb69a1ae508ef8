# SPDX-License-Identifier: Apache-2.0
"""Random requests through the transformers integration."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_llava

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

CONFIGS = (
    MustDropConfig(pruning_layers=(1, 3), merge_threshold=0.7),
    MustDropConfig(pruning_layers=(1, 3), budgets=(60, 30)),
    MustDropConfig(pruning_layers=(0, 2, 5), budgets=(90, 50, 20), merge_budget=8),
    MustDropConfig.preset("keep-all", pruning_layers=(1,)),
    MustDropConfig(merge=False, key_rate=0.0, pruning_layers=(2,)),
)
WAYS = ({}, {}, {}, {"do_sample": True}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True})
WORDS = ("USER:", "What", "is", "in", "the", "image?", "car?", "and", "then", "street?", "ASSISTANT:")


class Broken(Exception):
    """Error of requests that fail on purpose."""


def draw_prompt(rng: random.Random) -> str:
    """Text with 0 to 3 pictures, followed by text."""
    parts = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        parts += [*rng.choices(WORDS, k=rng.randrange(4)), "<image>"]
    return " ".join([*parts, *rng.choices(WORDS, k=rng.randrange(2, 12))])


def draw_pictures(rng: random.Random, text: str) -> list[Any]:
    """One picture per placeholder of the text."""
    return [
        tiny_llava.picture(rng.randrange(50), flat=rng.choice((0.25, 0.5, 0.75))) for _ in range(text.count("<image>"))
    ]


class Soak:
    """A model, its processor, and counts of the outcomes of requests."""

    name = f"transformers {transformers.__version__}"

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.model = tiny_llava.model()
        self.processor = tiny_llava.processor()
        self.kinds: Counter[str] = Counter()

    def round(self, requests: int) -> None:
        """Run requests one after another."""
        for _ in range(requests):
            self._request()

    def _request(self) -> None:
        """One context with one or more generations in it."""
        rng, model = self.rng, self.model
        texts = [draw_prompt(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        pictures = draw_pictures(rng, " ".join(texts))
        inputs = self.processor(images=pictures or None, text=texts, return_tensors="pt", padding=True)
        settings = {"max_new_tokens": rng.randrange(1, 12), **rng.choice(WAYS)}
        self.kinds[f"pictures: {len(pictures)}"] += 1
        self.kinds[", ".join(settings.keys() - {"max_new_tokens"}) or "greedy"] += 1
        with drop_tokens(model, rng.choice(CONFIGS)):
            if rng.random() < 0.1:
                self._broken(inputs, settings)
            found = model.generate(**inputs, **settings, return_dict_in_generate=True)
            plain = found.sequences.shape[0] == inputs["input_ids"].shape[0] and "num_beams" not in settings
            if plain and pictures and rng.random() < 0.3:
                self._second_turn(found, inputs)

    def _broken(self, inputs: Any, settings: dict[str, Any]) -> None:
        layer = self.rng.choice(list(self.model.model.language_model.layers))

        def fail(*args: Any) -> None:
            raise Broken

        handle = layer.mlp.register_forward_pre_hook(fail)
        try:
            self.model.generate(**inputs, **settings)
        except Broken:
            self.kinds["raised in the middle"] += 1
        finally:
            handle.remove()

    def _second_turn(self, found: Any, inputs: Any) -> None:
        rows = found.sequences.shape[0]
        more = self.processor.tokenizer([" car What?"] * rows, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([found.sequences, more], 1)
        mask = inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(rows, ids.shape[1] - mask.shape[1])], 1)
        self.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=found.past_key_values, max_new_tokens=3, do_sample=False
        )
        self.kinds["second turn"] += 1
