# SPDX-License-Identifier: Apache-2.0
"""FLASHINFER: the default on Blackwell."""

from __future__ import annotations

from typing import Any

import torch

from .backend import AttentionBackend


class FlashInfer(AttentionBackend):
    """FlashInfer, which plans on the host and copies its plan to the device from one pinned buffer."""

    def build(self, groups: list[Any], common: Any) -> Any:
        """See ``AttentionBackend.build``; synchronizes with the device, which may not have copied the last plan yet."""
        if common.seq_lens.is_cuda:
            torch.cuda.current_stream(common.seq_lens.device).synchronize()
        return super().build(groups, common)
