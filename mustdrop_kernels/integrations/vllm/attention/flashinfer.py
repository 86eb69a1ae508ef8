# SPDX-License-Identifier: Apache-2.0
"""FLASHINFER: the default on Blackwell."""

from __future__ import annotations

from typing import Any

import torch

from .backend import AttentionBackend


class FlashInfer(AttentionBackend):
    """FlashInfer's own kernels, and those of trtllm-gen and XQA, which need no plan.

    A plan is made on the host, and copied to the device asynchronously from one pinned buffer, which the next plan
    overwrites. vLLM alone makes one plan a step.
    """

    def build_group(self, group: Any, common: Any) -> Any:
        """See ``AttentionBackend.build_group``; synchronizes with the device after a plan.

        The next plan may follow at once: that of another group, of the next pruning layer, or of vLLM's next step.
        vLLM's own plan for this step may be overwritten, since no layer runs with it.
        """
        metadata = super().build_group(group, common)
        planned = any(hasattr(part, "wrapper") for part in (metadata.decode, metadata.prefill))
        if planned and common.seq_lens.is_cuda:
            torch.cuda.current_stream(common.seq_lens.device).synchronize()
        return metadata
