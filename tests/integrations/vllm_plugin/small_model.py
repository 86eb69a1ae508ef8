# SPDX-License-Identifier: Apache-2.0
"""The trained small model in transformers, in and out of drop_tokens."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.evaluation.checkpoint import load_model
from mustdrop_kernels.integrations.transformers import drop_tokens


class SmallModel:
    def __init__(self):
        self.subject = load_model(None, "cpu")

    @torch.inference_mode()
    def tokens(self, question, picture, plan, new, stop=False):
        """New tokens, of a preset's name, of fields of MustDropConfig, or of None, with every token."""
        inputs = self._inputs(question, picture)
        until = {} if stop else {"eos_token_id": None}
        with self._dropping(plan if picture is not None else None):
            output = self.subject.model.generate(**inputs, max_new_tokens=new, do_sample=False, **until)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def answer(self, question, picture, plan, new=4):
        """The text until the model ends it."""
        tokens = self.tokens(question, picture, plan, new, stop=True)
        return self.subject.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _inputs(self, question, picture):
        if picture is not None:
            return self.subject.inputs([picture], question)
        chat = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        text = self.subject.processor.apply_chat_template(chat, add_generation_prompt=True)
        return self.subject.processor(text=text, return_tensors="pt")

    def _dropping(self, plan):
        if plan is None:
            return contextlib.nullcontext()
        config = MustDropConfig.preset(plan) if isinstance(plan, str) else MustDropConfig.from_dict(plan)
        return drop_tokens(self.subject.model, dataclasses.replace(config, evict_from=0))
