# SPDX-License-Identifier: Apache-2.0
"""Agreement with the published code (tests/golden/README.md): merge, key set, dual attention filter."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from .cases import QUERY, TEXT, VISION, f64

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def tensors(name: str) -> dict:
    return load_file(GOLDEN / f"{name}.safetensors")


def cases(name: str) -> list:
    found = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=case["name"]) for case in found]


def golden(name: str, case: dict, tensor: str) -> torch.Tensor:
    return tensors(name)[f"{case['name']}.{tensor}"]


@pytest.mark.parametrize("case", cases("merge"))
def test_merge(backend, case):
    def data(tensor):
        return golden("merge", case, tensor)

    grid, window = [case["grid"]] * 2, case["window"]
    got = backend.spatial_merge(
        data("x").to(backend.device), grid, window, case["threshold"], uniform=True, merged_first=True
    )
    length = case["N_out"] + 1
    assert got.counts.tolist() == [length] * case["B"]
    assert got.assignment.tolist() == data("source_row").tolist()
    np.testing.assert_array_equal(f64(got.sizes)[:, :length], f64(data("size"))[..., 0])
    np.testing.assert_allclose(f64(got.tokens)[:, :length], f64(data("merged")), rtol=1e-5, atol=1e-6)
    # Merged windows in output order: the row after the prefix that their bottom-right token is assigned to.
    for b in range(case["B"]):
        rows = got.assignment[b].cpu()[1 + data("dst_idx")[b].long()]
        assert rows.tolist() == list(range(1, 1 + case["r"]))
    # The same windows with a budget instead of the threshold.
    fixed = backend.spatial_merge(data("x").to(backend.device), grid, window, budget=case["r"], merged_first=True)
    assert fixed.assignment.tolist() == data("source_row").tolist()
    assert fixed.tokens.shape[1] == length


@pytest.mark.parametrize("case", cases("key_set"))
def test_key_set(backend, case):
    def data(tensor):
        return golden("key_set", case, tensor)

    q, k = data("q").to(backend.device), data("k").to(backend.device)
    attention = backend.cls_attention(q[:, :, 0], k, case["scale"])
    np.testing.assert_allclose(f64(attention)[:, 1:], f64(data("cls_mean")), rtol=2e-5, atol=1e-7)
    assert not attention[:, 0].any()
    types = torch.full(attention.shape, VISION, dtype=torch.uint8)
    types[:, 0] = TEXT
    keep, counts = backend.select_topk(attention, types.to(backend.device), case["k"])
    assert counts.tolist() == [1 + case["k"]] * case["B"]
    for b in range(case["B"]):
        assert keep[b, 1 : 1 + case["k"]].tolist() == sorted(1 + i for i in data("key_set")[b].tolist())
    # Descending score: the key set is the sequence of tokens that the budgets 1, 2, 3, ... add.
    for rank in (1, 2, case["k"] // 2):
        few = backend.select_topk(attention, types.to(backend.device), rank)
        assert few.keep[0, 1 : 1 + rank].tolist() == sorted(1 + i for i in data("key_set")[0, :rank].tolist())


@pytest.mark.parametrize("case", cases("dual_attention_filter"))
@pytest.mark.parametrize("rows", ["all rows", "text rows"])
def test_dual_attention_filter(backend, case, rows):
    def data(tensor):
        return golden("dual_attention_filter", case, tensor)

    start, vision, text, length = (case[n] for n in ("v_token_start", "img_seq", "text_seq", "total_seq"))
    q, k = data("q").to(backend.device), data("k").to(backend.device)
    if rows == "text rows":
        q = q[:, :, -text:]
    types = torch.full((1, length), TEXT, dtype=torch.uint8)
    types[:, start : start + vision] = VISION
    types[:, start + vision :] = QUERY
    got = backend.dual_attention_select(
        q, k, types.to(backend.device), case["scale"], case["global_thr"], case["individual_thr"]
    )
    span = slice(start, start + vision)
    np.testing.assert_allclose(f64(got.total)[0, span], f64(data("attn_sum")), rtol=5e-5, atol=1e-6)
    np.testing.assert_allclose(f64(got.peak)[0, span], f64(data("attn_max")), rtol=5e-5, atol=1e-6)
    np.testing.assert_allclose(f64(got.total).sum(), f64(data("attn_sum_total"))[0], rtol=1e-5)
    kept = got.keep[0, : int(got.counts[0])].cpu()
    in_vision = kept[(kept >= start) & (kept < start + vision)] - start
    assert in_vision.tolist() == data("kept").tolist()
    assert len(kept) == length - vision + case["n_kept"], "text stays"
