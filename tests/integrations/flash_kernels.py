# SPDX-License-Identifier: Apache-2.0
"""Functions with the signatures of flash-attention's, for transformers' own calls on machines without it.

Each version returns the lse by a flag of its own, or always; see ``VERSIONS``.
"""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

ASKED_BY = {  # the argument that requests it; None: always returned
    "flash_attention_2": "return_attn_probs",
    "flash_attention_3": "return_attn_probs",
    "vllm-flash-attn3": "return_softmax_lse",
    "flash_attention_3 of 2024": None,
}
VERSIONS = tuple(ASKED_BY)


def _attention(query, key, value, scale, causal):  # (L, H, D) each -> (Lq, Hq, D), (Hq, Lq)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key).float() * scale
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(value.dtype), value), scores.logsumexp(-1)


class Kernels:
    """Both functions of one version; `asked` counts the calls that wanted the lse, and `calls` all of them."""

    def __init__(self, version: str) -> None:
        self.flag, self.extra = ASKED_BY[version], version == "flash_attention_2"
        self.calls = self.asked = 0
        self.dense, self.packed = self._taking_the_flag(self._dense), self._taking_the_flag(self._packed)

    def _taking_the_flag(self, function):
        def call(q, k, v, softmax_scale=None, causal=False, **rest):
            wants = self.flag is None or rest.pop(self.flag, False)
            self.calls += 1
            self.asked += wants
            output, lse = function(q, k, v, softmax_scale, causal, **rest)
            return (output, lse, *([None] if self.extra else [])) if wants else output

        parameters = [p for name, p in inspect.signature(function).parameters.items()]
        if self.flag:
            parameters.append(inspect.Parameter(self.flag, inspect.Parameter.KEYWORD_ONLY, default=False))
        call.__signature__ = inspect.Signature(parameters)
        return call

    @staticmethod
    def _dense(q, k, v, softmax_scale=None, causal=False):  # (B, L, H, D)
        rows = [_attention(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))

    @staticmethod
    def _packed(  # (total, H, D)
        q, k, v, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0
    ):
        pieces = [
            x.split(bounds.diff().tolist()) for x, bounds in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
        ]
        rows = [_attention(*piece, softmax_scale, causal) for piece in zip(*pieces, strict=True)]
        return torch.cat([output for output, _ in rows]), torch.cat([lse for _, lse in rows], dim=1)


@contextlib.contextmanager
def installed(model, version):
    """transformers calls these in the language model, for whichever version it was told is there."""
    kernels, config = Kernels(version), model.config.text_config
    name, found = version.split(" ")[0] if version.startswith("flash") else "flash_attention_3", SimpleNamespace()
    found._flash_fn, found._flash_varlen_fn, found._flash_with_kvcache_fn = kernels.dense, kernels.packed, None
    found._pad_fn, found._unpad_fn, found._loaded_implementation = flash._pad_input, flash._unpad_input, name
    found._process_flash_kwargs_fn = flash._lazy_define_process_function(kernels.packed)
    with pytest.MonkeyPatch.context() as patched:
        for attribute, value in vars(found).items():
            patched.setattr(flash, attribute, value, raising=False)
        patched.setattr(config, "_attn_implementation", name)
        yield kernels
