# SPDX-License-Identifier: Apache-2.0
"""The views of vLLM's cache hold what vLLM writes; stage 1's placeholders; bookkeeping."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import engines  # noqa: F401 - sets vLLM's environment
import torch
from vllm import _custom_ops

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.vllm.batch import Ledger
from mustdrop_kernels.integrations.vllm.pages import Paging, cache_views
from mustdrop_kernels.integrations.vllm.vision import EMPTY, KEY, TOKEN, Marks, VisionStage, split


@pytest.mark.parametrize(("isa", "size", "dtype"), [("vec", 32, torch.float32), ("vec16", 80, torch.bfloat16)])
def test_views_hold_what_vllm_writes(isa, size, dtype):
    blocks, heads, slots = 5, 2, 32
    cache = torch.zeros(blocks, heads, slots, 2 * size, dtype=dtype)
    key, value = torch.randn(2, 7, heads, size).to(dtype)
    places = torch.tensor([3, 31, 32, 64 + 5, 96, 159, 0])
    halves = cache.view(blocks, heads, 2 * slots, size).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(
        key, value, *halves, places, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    keys, values = cache_views(cache)
    assert keys.shape == values.shape == (blocks, slots, heads, size)
    assert torch.equal(keys[places // slots, places % slots], key)
    assert torch.equal(values[places // slots, places % slots], value)
    assert keys.count_nonzero() + values.count_nonzero() == key.count_nonzero() + value.count_nonzero()


def test_other_layouts_are_refused():
    Paging(types.SimpleNamespace(isa="vec")).check()
    with pytest.raises(ValueError, match="mustdrop: the CPU attention's 'amx' cache is not served"):
        Paging(types.SimpleNamespace(isa="amx")).check()


def test_merged_tokens_stand_at_their_first_patch():
    config = MustDropConfig(merge_budget=1, window=(2, 2), key_rate=0.0)
    layer = torch.nn.Identity()
    merge = VisionStage([layer], (2, 4), config)
    patches = torch.eye(9, 16)[None].clone()  # CLS and 2 x 4 patches
    patches[:, [3, 4, 7, 8]] = 1.0  # the right window is alike
    merged = layer(patches)
    assert merged.shape == (1, 6, 16)
    placed = merge.place(merged[:, 1:])
    features, marks = split([placed[0]], 16)
    assert marks.tolist() == [TOKEN, TOKEN, TOKEN, EMPTY, TOKEN, TOKEN, EMPTY, EMPTY]
    assert torch.equal(features[0][[0, 1, 4, 5]], patches[0, [1, 2, 5, 6]])
    assert torch.equal(features[0][2], torch.ones(16))
    assert features[0][[3, 6, 7]].count_nonzero() == 0


def test_features_that_were_given_are_all_there():
    features, marks = split([torch.ones(3, 4)], 4)
    assert features[0].shape == (3, 4)
    assert marks.tolist() == [TOKEN] * 3


def test_marks_go_to_their_rows():
    rows = torch.tensor([False, True, True, False, True])
    marks = Marks.spread(torch.tensor([KEY, EMPTY, TOKEN]), rows)
    assert marks.key.tolist() == [False, True, False, False, False]
    assert marks.empty.tolist() == [False, False, True, False, False]


def test_ledger_tells_news_once():
    ledger = Ledger()
    ledger.record("a", 5)
    assert ledger.take_news() == {"a": 5}
    assert ledger.take_news() == {}
    assert ledger.lost == {"a": 5}
    ledger.forget(["a", "b"])
    assert ledger.lost == {}
