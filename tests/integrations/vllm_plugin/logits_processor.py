# SPDX-License-Identifier: Apache-2.0
"""Logits processors of users, for both model runners: they raise one token of requests that name it."""

from __future__ import annotations

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor


def bias(params):
    return (params.extra_args or {}).get("bias")


class BiasV1(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        token = bias(params)
        return None if token is None else lambda output, logits: self._raise(token, output, logits)

    def _raise(self, token, output, logits):
        logits[token] += 2.0 * (len(output) % 2)
        return logits


class BiasV2(LogitsProcessor):
    def __init__(self, vllm_config, req_states):
        self._states, self._tokens = req_states, {}

    def add_request(self, req_idx, sampling_params):
        self._tokens[req_idx] = bias(sampling_params)
        return self._tokens[req_idx] is not None

    def apply(self, logits, ctx):
        for row, (slot, place) in enumerate(zip(ctx.idx_mapping_np.tolist(), ctx.pos.tolist(), strict=True)):
            if (token := self._tokens.get(slot)) is not None:
                logits[row, token] += 2.0 * ((place + 1 - int(self._states.prompt_len.np[slot])) % 2)
        return logits
