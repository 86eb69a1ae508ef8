# SPDX-License-Identifier: Apache-2.0
"""The three stages on tensors, against the published values and plain indexing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mustdrop_kernels import stages
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.ops import TokenType
from mustdrop_kernels.stages import Pruned, Tokens

GOLDEN = Path(__file__).parent / "golden"


def recorded(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return tensors, json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


# Stage 1


def test_merge_agrees_with_the_published_code():
    tensors, cases = recorded("merge")
    for case in cases:
        name, grid = case["name"], (case["grid"], case["grid"])
        config = MustDropConfig(
            window=case["window"], merge_threshold=case["threshold"], merge_uniform=True, positions="published"
        )
        merged = stages.merge_vision_tokens(tensors[f"{name}.x"], grid, config)
        length = 1 + case["N_out"]
        assert merged.counts.tolist() == [length] * case["B"]
        torch.testing.assert_close(merged.tokens[:, :length], tensors[f"{name}.merged"], atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.assignment, tensors[f"{name}.source_row"].long())


def test_merge_keeps_raster_order_with_original_positions():
    tensors, cases = recorded("merge")
    case = cases[0]
    x, grid = tensors[f"{case['name']}.x"], (case["grid"], case["grid"])
    config = MustDropConfig(window=case["window"], merge_threshold=case["threshold"])
    merged = stages.merge_vision_tokens(x, grid, config)
    first = [int((merged.assignment[0] == token).nonzero()[0]) for token in range(int(merged.counts))]
    assert first == sorted(first)  # a token takes the place of its first patch


def test_merge_budget_has_a_length_known_beforehand():
    config = MustDropConfig(merge_budget=5)
    with FakeTensorMode():
        merged = stages.merge_vision_tokens(torch.randn(2, 1 + 144, 8), (12, 12), config)
        assert merged.tokens.shape == (2, 1 + 144 - 5 * 8, 8)


def test_key_tokens_are_the_published_ones():
    tensors, cases = recorded("key_set")
    for case in cases:
        q, k = tensors[f"{case['name']}.q"], tensors[f"{case['name']}.k"]
        config = MustDropConfig(key_rate=case["keep_rate"])
        kept = stages.key_tokens(q[:, :, 0], k, case["scale"], config)
        assert not kept[:, 0].any()  # CLS itself is none
        for row, expected in zip(kept, tensors[f"{case['name']}.key_set"], strict=True):
            assert row[1:].nonzero().flatten().tolist() == sorted(expected.tolist())


@given(st.data())
def test_key_tokens_of_ragged_images_are_each_images_own(data):
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    config = MustDropConfig(key_rate=data.draw(st.sampled_from([0.0, 0.08, 0.25, 0.5, 1.0])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q = torch.randn(len(counts), 2, 4, generator=generator)
    k = torch.randn(len(counts), 2, max(counts), 4, generator=generator)
    kept = stages.key_tokens(q, k, 0.5, config, counts=torch.tensor(counts, dtype=torch.int32))
    for row, count in enumerate(counts):
        alone = stages.key_tokens(q[row : row + 1], k[row : row + 1, :, :count], 0.5, config)
        assert torch.equal(kept[row, :count], alone[0])
        assert not kept[row, count:].any()
        assert int(kept[row].sum()) == math.ceil(config.key_rate * (count - 1))


@pytest.mark.parametrize("rows", [1 << 22, 20])  # all at once, and two queries at a time
def test_received_attention_is_the_mean_over_queries(rows, monkeypatch):
    monkeypatch.setattr(stages, "_ROWS", rows)
    q, k = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    found = stages.received_attention(q, k, 0.7, MustDropConfig())
    expected = (q @ k.transpose(2, 3) * 0.7).softmax(-1).mean((1, 2))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    counts = torch.tensor([10, 6], dtype=torch.int32)
    ragged = stages.received_attention(q, k, 0.7, MustDropConfig(), counts=counts)
    alone = stages.received_attention(q[1:, :, :6], k[1:, :, :6], 0.7, MustDropConfig())
    torch.testing.assert_close(ragged[0], expected[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ragged[1, :6], alone[0], atol=1e-6, rtol=1e-5)
    assert not ragged[1, 6:].any()


# Stage 2


def types_of(*rows, text_queries="after_image"):
    """Token types for rows of letters (v: vision, t: text, .: padding), as letters (q: text query)."""
    vision = torch.tensor([[letter == "v" for letter in row] for row in rows])
    mask = torch.tensor([[letter != "." for letter in row] for row in rows])
    types = stages.token_types(vision, mask, text_queries)
    assert types.dtype == torch.uint8
    return ["".join(".tvq"[value] for value in row) for row in types.tolist()]


def test_token_types():
    assert types_of("ttvvtt", "..tvtt", "tvtvvt", "tttttt", "ttvv..") == [
        "ttvvqq",
        "..tvqq",
        "tvtvvq",  # text between images does not attend to the last one
        "tttttt",  # no image: no text query
        "ttvv..",
    ]
    assert types_of("ttvvtt", "tvtt..", "..tttt", text_queries="last") == ["ttvvtq", "tvtq..", "..tttt"]
    types = stages.token_types(torch.tensor([[True, False]]), None, "after_image")
    assert types.tolist() == [[TokenType.VISION, TokenType.QUERY]]


def prompt(types, keys=(), positions=None):
    """A `Tokens` for rows of letters."""
    values = torch.tensor([[".tvq".index(letter) for letter in row] for row in types], dtype=torch.uint8)
    place = torch.arange(values.shape[1]).expand(values.shape).contiguous()
    protected = torch.zeros(values.shape, dtype=torch.bool)
    for row, column in keys:
        protected[row, column] = True
    real = (values != TokenType.PADDING).sum(1)
    return Tokens(
        types=values,
        index=place,
        positions=place if positions is None else positions,
        protected=protected,
        counts=real.int(),
        lengths=tuple(real.tolist()),
        vision_token_counts=tuple((values == TokenType.VISION).sum(1).tolist()),
        key_token_counts=tuple(protected.sum(1).tolist()),
    )


def test_prune_agrees_with_the_published_filter():
    tensors, cases = recorded("dual_attention_filter")
    for case in cases:
        name, begin, vision = case["name"], case["v_token_start"], case["img_seq"]
        letters = "t" * begin + "v" * vision + "q" * (case["total_seq"] - begin - vision)
        config = MustDropConfig(
            global_threshold=case["global_thr"], individual_threshold=case["individual_thr"], key_rate=0.0
        )
        q, k = tensors[f"{name}.q"], tensors[f"{name}.k"]
        tokens = prompt([letters])
        pruned = stages.prune(q, k, tokens, case["scale"], config, 0)
        left = tokens.take(pruned)
        kept = left.index[left.types == TokenType.VISION] - begin
        assert kept.tolist() == tensors[f"{name}.kept"].tolist()
        assert left.vision_token_counts == (case["n_kept"],)
        assert left.lengths == pruned.lengths == (case["total_seq"] - vision + case["n_kept"],)


def test_prune_counts_with_budgets_on_the_host():
    """Key tokens are kept beyond the budget, short rows keep all of theirs, padding is dropped."""
    tokens = prompt([".tvvvvvq", "ttvvvvtq", "..tttttt"], keys=[(0, 2), (0, 5), (0, 6)])
    config = MustDropConfig(pruning_layers=(0, 1), budgets=(2, 0), key_rate=0.3)
    q, k = torch.randn(3, 4, 8, 4), torch.randn(3, 2, 8, 4)
    pruned = stages.prune(q, k, tokens, 0.5, config, 0)
    assert pruned.lengths == (5, 6, 6)
    assert pruned.counts.tolist() == [5, 6, 6]
    assert pruned.keep.shape == (3, 6)
    left = tokens.take(pruned)
    assert left.vision_token_counts == (3, 2, 0)
    assert left.index[0].tolist() == [-1, 1, 2, 5, 6, 7]
    assert left.padded
    pruned = stages.prune(q[:, :, :6], k[:, :, :6], left, 0.5, config, 1)
    assert pruned.lengths == (5, 4, 6)  # key tokens are kept even without a budget


def test_prune_with_budgets_does_not_synchronize():
    """With budgets no size depends on data; with thresholds the counts do."""
    tokens = prompt(["ttvvvvtq", "..tvvvqq"])
    budgets = MustDropConfig(pruning_layers=(0,), budgets=(2,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = torch.randn(2, 4, 8, 4), torch.randn(2, 2, 8, 4)
        left = tokens.take(stages.prune(q, k, tokens, 0.5, budgets, 0), renumber=True)
        assert left.types.shape == (2, 6)
        with pytest.raises(DataDependentOutputException):
            stages.prune(q, k, tokens, 0.5, MustDropConfig(pruning_layers=(0,)), 0)


def test_prune_has_no_gradient():
    tokens = prompt(["ttvvvvtq"])
    q, k = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(2))
    for config in (MustDropConfig(), MustDropConfig(pruning_layers=(0,), budgets=(2,))):
        assert not stages.prune(q, k, tokens, 0.5, config, 0).keep.requires_grad


@st.composite
def keeps(draw):
    """Left-padded rows, and two successive ragged selections from each."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    lengths = [draw(st.integers(1, width)) for _ in range(rows)]
    lengths[0] = width
    first = [sorted(draw(st.sets(st.integers(width - n, width - 1), min_size=1))) for n in lengths]
    second = [sorted(draw(st.sets(st.sampled_from(row), min_size=1))) for row in first]
    return width, lengths, first, second


def selection(rows):
    counts = [len(row) for row in rows]
    keep = torch.tensor([row + [-1] * (max(counts) - len(row)) for row in rows])
    return Pruned(keep, torch.tensor(counts, dtype=torch.int32), tuple(counts))


def taken(tokens, first, second):
    """The tokens after the first selection, and the places of the second one among them."""
    once = tokens.take(selection(first))
    shift = [once.length - len(row) for row in first]
    rows = zip(first, second, shift, strict=True)
    return once, [[row.index(place) + pad for place in chosen] for row, chosen, pad in rows]


@given(keeps())
def test_tokens_after_two_selections(example):
    """Places, positions and indices follow the tokens; slots are the former places of the kept tokens."""
    width, lengths, first, second = example
    positions = (10 * torch.arange(width) + 3).repeat(len(lengths), 1)
    tokens = prompt(["." * (width - n) + "v" * n for n in lengths], positions=positions)
    once, local = taken(tokens, first, second)
    twice = once.take(selection(local))
    renumbered = once.take(selection(local), renumber=True)
    for row, chosen in enumerate(second):
        pad = twice.length - len(chosen)
        assert twice.index[row].tolist() == [-1] * pad + chosen
        assert twice.positions[row, pad:].tolist() == [10 * place + 3 for place in chosen]
        assert renumbered.positions[row, pad:].tolist() == list(range(len(chosen)))
        assert twice.types[row].tolist() == [TokenType.PADDING] * pad + [TokenType.VISION] * len(chosen)
        assert tokens.slots(twice)[row, : len(chosen)].tolist() == chosen
        assert once.slots(twice)[row, : len(chosen)].tolist() == local[row]
    assert twice.lengths == twice.vision_token_counts == tuple(len(chosen) for chosen in second)
    assert twice.padded == (min(twice.lengths) < twice.length)


# Stage 3


@given(keeps())
def test_evict_equals_indexing(example):
    """Layers of different length are compacted to the same tokens, in place, aligned at the end."""
    width, lengths, first, second = example
    tokens = prompt(["." * (width - n) + "v" * n for n in lengths])
    once, local = taken(tokens, first, second)
    twice = once.take(selection(local))
    held = [tokens, once, once]
    make = lambda t, dim: torch.randn(len(lengths), 2, t.length, dim)  # noqa: E731
    keys, values = [make(t, 4) for t in held], [make(t, 6) for t in held]
    before = [(key.clone(), value.clone()) for key, value in zip(keys, values, strict=True)]
    cut = stages.evict(keys, values, held, twice)
    for old, new, places in zip(before, cut, (second, local, local), strict=True):
        for was, now in zip(old, new, strict=True):
            assert now.shape[2] == twice.length
            for row, chosen in enumerate(places):
                assert torch.equal(now[row, :, twice.length - len(chosen) :], was[row][:, chosen])
    assert cut[0][0].untyped_storage().data_ptr() == keys[0].untyped_storage().data_ptr()
