# SPDX-License-Identifier: Apache-2.0
"""A logits processor that raises one token of requests that name it, as users bring one along."""

from __future__ import annotations

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Bias(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        token = (params.extra_args or {}).get("bias")
        return None if token is None else lambda output, logits: self._raise(token, output, logits)

    def _raise(self, token, output, logits):
        logits[token] += 2.0 * (len(output) % 2)
        return logits
