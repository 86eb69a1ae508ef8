# SPDX-License-Identifier: Apache-2.0
"""Beam search, which sends a prompt and the tokens generated so far as one new prompt.

vLLM does not record where the generated tokens begin, so a field of its sampling parameters does. They are read in a
step of their own, as after preemption.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence

from . import images

FIELD = "mustdrop_prompt_tokens"


def install() -> None:
    """Records the length of the original prompt in all prompts of beam search; repeated calls change nothing."""
    if not hasattr(BeamSearchSequence.get_prompt, "__wrapped__"):
        BeamSearchSequence.get_prompt = _with_length(BeamSearchSequence.get_prompt)


def prompt_tokens(request: Any) -> int:
    """Number of tokens of a request's prompt that were not generated."""
    total, given = request.num_prompt_tokens, None
    if request.sampling_params is not None:
        given = (request.sampling_params.extra_args or {}).get(FIELD)
    return given if isinstance(given, int) and images.end(request.mm_features) <= given <= total else total


def _with_length(get_prompt: Any) -> Any:
    @functools.wraps(get_prompt)
    def wrapped(sequence: Any) -> Any:
        prompt = get_prompt(sequence)
        if prompt["type"] == "multimodal":
            prompt[FIELD] = len(sequence.orig_prompt["prompt_token_ids"])
        return prompt

    return wrapped
