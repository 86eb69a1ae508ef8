# SPDX-License-Identifier: Apache-2.0
"""What model runner V2 alone offers for sampling: given tokens, sampling masks, watermarks."""

from __future__ import annotations

import gpu_backends
import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import ASKS, BUDGETS, compare_with_plain
from vllm import SamplingParams

NEW = 8
GIVEN = [398, 139, 20, 398, 30, 10, 139, 20]
ENGINES = {
    "given tokens": dict(enable_trace_replay=True),
    "sampling masks": dict(return_sampling_mask=True, logprobs_mode="processed_logprobs"),
    "watermarks": dict(watermark_config={"key": 7, "deduplicate_contexts": "all"}),
}
PARAMETERS = {
    "given tokens": dict(trace_decode_token_ids=GIVEN, logprobs=2),
    "sampling masks": dict(temperature=0.7, top_k=5, top_p=0.9, seed=3, logprobs=2),
    "watermarks": dict(temperature=1.0, seed=4, watermarking=True),
}
pytestmark = pytest.mark.skipif(gpu_backends.DEFAULT.startswith("1"), reason="needs model runner V2: make test-vllm")


def answers(llm, parameters, asks):
    """Tokens, log probabilities of each of them, and sampling masks, of each request."""
    sampling = SamplingParams(**{"max_tokens": NEW, "ignore_eos": True, **parameters})
    outputs = llm.generate([ask.for_vllm() for ask in asks], sampling, use_tqdm=False)
    return [answer(output.outputs[0]) for output in outputs]


def answer(output):
    places = output.logprobs or []
    likely = [{token: pytest.approx(p.logprob, abs=1e-3) for token, p in place.items()} for place in places]
    mask = None if output.sampling_mask is None else [sorted(map(int, ids)) for ids in output.sampling_mask.token_ids]
    return list(output.token_ids), likely, mask


@pytest.mark.parametrize("name", ENGINES)
def test_as_in_plain_vllm(name, checkpoint):
    """Equal if every token is kept; with dropped tokens independent of the batch."""
    plain, together = compare_with_plain(
        checkpoint, lambda llm, asks: answers(llm, PARAMETERS[name], asks), ASKS, BUDGETS, **ENGINES[name]
    )
    assert together[1] == plain[1]
    if name == "given tokens":
        assert [tokens for tokens, _, _ in together] == [GIVEN] * len(ASKS)
        assert [likely for _, likely, _ in together] != [likely for _, likely, _ in plain]
    if name == "sampling masks":
        assert all(token in kept for tokens, _, mask in together for token, kept in zip(tokens, mask, strict=True))
        assert all(len(kept) <= 5 for _, _, mask in together for kept in mask)
