# SPDX-License-Identifier: Apache-2.0
"""Beam search, whose generated tokens come back as the end of new prompts."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import torch
from engines import ASKS, BUDGETS, KEEP_ALL, engine, generate
from vllm.sampling_params import BeamSearchParams, SamplingParams

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens
from mustdrop_kernels.integrations.vllm import beams

NEW = 6


def beam_search(llm, asks, width):
    """The sequences of each prompt, best first."""
    params = BeamSearchParams(beam_width=width, max_tokens=NEW, ignore_eos=True)
    outputs = llm.beam_search([ask.for_vllm() for ask in asks], params)
    return [[sequence.tokens[-NEW:] for sequence in output.sequences] for output in outputs]


def greedy(llm, ask, extra_args):
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args=extra_args)
    (output,) = llm.generate([ask.for_vllm()], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


@torch.no_grad()
def in_transformers(transformers, ask, width):
    inputs = transformers.processor(images=ask.images(), text=ask.text, return_tensors="pt")
    with drop_tokens(transformers.model, MustDropConfig.preset("192", **BUDGETS, evict_from=0)):
        output = transformers.model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, num_beams=width, num_return_sequences=width
        )
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_beams_equal_transformers(checkpoint, transformers_of):
    """One beam is greedy; prompts of different length are searched at once."""
    asks = ASKS[:4]
    with engine(checkpoint, BUDGETS) as llm:
        assert beam_search(llm, asks, 1) == [[tokens] for tokens in generate(llm, asks, NEW)]
        found = beam_search(llm, asks, 3)
        for length in (0, 3, 100, 10_000, "all"):  # the field arrives among parameters that clients fill in
            assert greedy(llm, asks[0], {beams.FIELD: length}) == generate(llm, asks[:1], NEW)[0]
    for i in (0, 2):  # transformers mixes up several pictures of a prompt in beam search
        assert found[i] == in_transformers(transformers_of, asks[i], 3)


def test_keep_all_equals_plain_vllm(checkpoint):
    with engine(checkpoint, None) as llm:
        plain = beam_search(llm, ASKS, 3)
    with engine(checkpoint, KEEP_ALL) as llm:
        assert beam_search(llm, ASKS, 3) == plain
