# SPDX-License-Identifier: Apache-2.0
"""torch.compile(fullgraph=True) with dynamic shapes: one graph for all sizes, with the results of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.fx.experimental._config
from example import SIMPLE, simple_arguments
from torch._dynamo.testing import CompileCounterWithBackend

import mustdrop_kernels as mk
from mustdrop_kernels import backends
from mustdrop_kernels.ops import registry
from mustdrop_kernels.ops.contract import CONTRACTS
from mustdrop_kernels.ops.samples import outcome

from .cases import attention, normal, prompt, random_bits, same_bits, types_tensor
from .sample_calls import sample
from .schemas import OPS
from .test_text_vision_packed import packed, paged


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Disable duck shapes: sizes that are equal in the first call may differ in the second."""
    torch._dynamo.reset()
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield
    torch._dynamo.reset()


def one_graph(function: Callable, calls: list[tuple], exact: bool = True) -> None:
    """Check that every call matches eager mode and that only the first one compiles."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compiled(*calls[0])
    after_first = counter.frame_count
    assert after_first > 0
    for arguments in calls:
        eager = flat(function(*arguments))
        for a, b in zip(eager, flat(compiled(*arguments)), strict=True):
            if exact:
                assert same_bits(a, b)
            else:
                torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    assert counter.frame_count == after_first, "recompiled for another size"


def flat(result: Any) -> list[torch.Tensor]:
    return [t for part in result for t in flat(part)] if isinstance(result, (tuple, list)) else [result]


GRIDS = [(2, 4, 6, 8), (3, 6, 4, 12), (5, 8, 10, 20)]


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"merged_first": True, "num_prefix_tokens": 3}], ids=str)
def test_spatial_merge(device, options):
    prefix = options.get("num_prefix_tokens", 1)

    def merge(x, height, width):
        return mk.spatial_merge(x, [height, width], [2, 2], 0.1, **options)

    one_graph(merge, [(normal((b, prefix + h * w, c), b, device=device), h, w) for b, h, w, c in GRIDS])


def test_spatial_merge_budget(device):
    """The result's length depends on the budget: P + N - r (n - 1)."""

    def merge(x, height, width, budget, sizes):
        return mk.spatial_merge(x, [height, width], [2, 2], budget=budget, sizes=sizes)

    calls = []
    for budget, (b, h, w, c) in zip((2, 3, 7), GRIDS, strict=True):
        calls.append(
            (normal((b, 1 + h * w, c), b, device=device), h, w, budget, torch.rand(b, 1 + h * w, device=device))
        )
    one_graph(merge, calls)


def test_cls_attention(device):
    def attend(q, k, counts):
        return mk.cls_attention(q, k, 0.2, counts=counts)

    calls = []
    for b, h, s, d in ((2, 3, 10, 8), (3, 2, 21, 16), (4, 5, 34, 24)):
        counts = torch.full((b,), s - 2, dtype=torch.int32, device=device)
        calls.append((normal((b, h, d), s, device=device), normal((b, h, s, d), b, device=device), counts))
    one_graph(attend, calls)


DENSE_SIZES = [(2, (4, 2), 12, 20, 8), (3, (6, 3), 15, 31, 16), (5, (8, 4), 40, 64, 24)]


def dense(device: str) -> list:
    return [attention(b, heads, rows, length, d, device=device) for b, heads, rows, length, d in DENSE_SIZES]


def test_text_vision_scores(device, with_lse):
    def score(q, k, types, lse):
        return mk.text_vision_scores(q, k, types, 0.25, lse=lse)

    one_graph(score, [(c.q, c.k, c.types, c.lse() if with_lse else None) for c in dense(device)])


def test_text_vision_attention(device):
    def maps(q, k, types, rows):
        return mk.text_vision_attention(q, k, types, 0.25, rows)

    one_graph(maps, [(c.q, c.k, c.types, 3 + i) for i, c in enumerate(dense(device))])


def test_fused(device):
    def choose(q, k, types, budget, capacity, multiple):
        dual = mk.dual_attention_select(q, k, types, 0.25, 0.02, 0.05, drop_multiple=multiple)
        return dual, mk.topk_attention_select(q, k, types, 0.25, budget, capacity=capacity)

    one_graph(choose, [(c.q, c.k, c.types, 4 + i, 9 + i, 2 + i) for i, c in enumerate(dense(device))])


def test_varlen(device):
    def score(q, k, types, cu_q, cu_k, longest_q, longest_k):
        return mk.text_vision_scores_varlen(q, k, types, cu_q, cu_k, longest_q, longest_k, 0.25)

    sizes = [[(8, 9), (3, 5)], [(2, 2), (7, 20), (5, 5)], [(30, 30), (4, 9), (2, 8), (6, 6)]]
    one_graph(score, [packed(lengths, device=device).arguments[:7] for lengths in sizes])


def test_paged(device):
    def score(q, cache, table, seq_lens, types, cu_q, longest):
        return mk.text_vision_scores_paged(q, cache, table, seq_lens, types, cu_q, longest, 0.25)

    sizes = [[(8, 9), (3, 5)], [(2, 2), (7, 20), (5, 5)], [(30, 30), (4, 9), (2, 8), (6, 6)]]
    one_graph(score, [paged(lengths, device=device).arguments[:7] for lengths in sizes])


def test_select(device):
    def select(total, types, protected, k, capacity):
        dual = mk.select_dual(total, total, types, 0.05, 0.5, protected=protected, drop_multiple=2)
        return dual, mk.select_topk(total, types, k, protected=protected, capacity=capacity)

    calls = []
    for b, length in ((2, 20), (3, 31), (5, 77)):
        types = types_tensor([prompt(length)] * b, device)
        total = normal((b, length), b, device=device).abs()
        calls.append((total, types, total > 1.0, length // 4, length // 2))
    one_graph(select, calls)


def test_gather(device):
    def gather(x, keep, counts):
        return mk.gather_tokens(x, keep, counts), mk.gather_tokens(x, keep, counts, align_end=True)

    calls = []
    for b, length, capacity, c in ((2, 20, 5, 8), (3, 31, 9, 12), (4, 40, 21, 30)):
        keep = torch.arange(capacity, device=device).expand(b, -1).contiguous()
        counts = torch.full((b,), capacity - 1, dtype=torch.int32, device=device)
        calls.append((normal((b, length, c), b, device=device), keep, counts))
    one_graph(gather, calls)


def test_compact(device):
    def compact(keys, values, keep, counts):
        keys, values = [k.clone() for k in keys], [v.clone() for v in values]
        mk.compact_kv_(keys, values, [keep], [counts])
        return [t[:, :, :4] for t in (*keys, *values)]

    calls = []
    for b, heads, length, d in ((2, 2, 20, 8), (3, 4, 31, 16), (4, 3, 40, 24)):
        keep = torch.arange(6, device=device).mul(2).expand(b, -1).contiguous()
        counts = torch.full((b,), 5, dtype=torch.int32, device=device)
        caches = [
            [random_bits((b, heads, length, d), i, torch.float16, device) for i in range(n, n + 2)] for n in (0, 2)
        ]
        calls.append((*caches, keep, counts))
    one_graph(compact, calls)


def test_compact_paged(device):
    def compact(keys, values, table, keep, counts, seq_lens):
        keys, values = [k.clone() for k in keys], [v.clone() for v in values]
        mk.compact_paged_kv_(keys, values, table, [keep], [counts], seq_lens=seq_lens, align_end=True)
        return keys, values

    calls = []
    for blocks, slots, heads, d in ((8, 2, 2, 8), (12, 3, 4, 16), (20, 4, 3, 24)):
        table = torch.arange(2 * (blocks // 2), dtype=torch.int32, device=device).view(2, -1)
        length = slots * (blocks // 2)
        # Dropped slots are unspecified: keep everything, so that the whole pool is comparable.
        keep = torch.arange(length, device=device).expand(2, -1).contiguous()
        counts = torch.full((2,), length, dtype=torch.int32, device=device)
        caches = [
            [random_bits((blocks, slots, heads, d), i + n, torch.float16, device) for i in range(2)] for n in (0, 2)
        ]
        calls.append((*caches, table, keep, counts, counts.clone()))
    one_graph(compact, calls)


def pipeline(q, k, types, hidden, cache, budget, capacity):
    """A pruning layer: score, select, gather the hidden states, compact the cache."""
    chosen = mk.topk_attention_select(q, k, types, 0.25, budget, capacity=capacity)
    kept = mk.gather_tokens(hidden, chosen.keep, chosen.counts)
    cache = cache.clone()
    mk.compact_kv_([cache], [cache + 1], [chosen.keep], [chosen.counts])
    return chosen, kept, cache[:, :, :2]


def pipeline_calls(device: str) -> list[tuple]:
    calls = []
    for i, case in enumerate(dense(device)):
        batch, length = case.types.shape
        hidden = normal((batch, length, 10 + i), 3, device=device)
        calls.append(
            (case.q, case.k, case.types, hidden, normal((batch, 2, length, 8 + i), 4, device=device), 5 + i, 12 + i)
        )
    return calls


def test_pipeline(device):
    one_graph(pipeline, pipeline_calls(device))


def test_pipeline_inductor(device):
    """The same with the default compiler, once."""
    compiled = torch.compile(pipeline, fullgraph=True, dynamic=True)
    for arguments in pipeline_calls(device)[:2]:
        for a, b in zip(flat(pipeline(*arguments)), flat(compiled(*arguments)), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_gradient_in_a_graph(device):
    """spatial_merge and gather_tokens inside a compiled function that is differentiated."""

    def loss(x, weight, height, width):
        merged = mk.spatial_merge(x * weight, [height, width], [2, 2], 0.1)
        keep = torch.arange(4, device=x.device).expand(x.shape[0], -1).contiguous()
        return (mk.gather_tokens(merged.tokens, keep, merged.counts) ** 2).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for b, h, w, c in GRIDS:
        x = normal((b, 1 + h * w, c), b, device=device)
        weights = [torch.full((c,), 1.5, device=device, requires_grad=True) for _ in range(2)]
        loss(x, weights[0], h, w).backward()
        compiled(x, weights[1], h, w).backward()
        torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert len(set(counts)) == 1, "recompiled for another size"


def test_choice_of_a_backend_is_traced(device, monkeypatch):
    """`backend=` and `use_backend` apply to compiled functions, also after compilation with another choice."""

    def sevens(q, k, token_types, scale, *, lse=None):
        return token_types.float() * 0 + 7, token_types.float() * 0 + 7

    always_seven = backends.Backend("sevens", lambda op: sevens, lambda op, device_type: None)
    monkeypatch.setitem(registry._registered, "sevens", always_seven)

    def score(q, k, types, backend):
        return mk.text_vision_scores(q, k, types, 0.25, backend=backend).total

    case = dense(device)[0]
    arguments = case.q, case.k, case.types
    plain = score(*arguments, None)
    seven = torch.full_like(plain, 7.0)
    compiled = torch.compile(score, fullgraph=True, dynamic=True, backend="aot_eager")
    assert same_bits(compiled(*arguments, None), plain)
    assert same_bits(compiled(*arguments, "sevens"), seven)
    with mk.use_backend("sevens"):
        assert same_bits(compiled(*arguments, None), seven)
    assert same_bits(compiled(*arguments, None), plain)


@pytest.mark.parametrize(("op", "by"), [*((op, "argument") for op in OPS), (SIMPLE, "context")])
def test_explicit_backends(backend, op, by):
    """Every backend is one operator of the graph, with the bits of eager mode."""
    chosen = backend.name if by == "argument" else None

    def function(given):
        given = {n: [t.clone() for t in v] if n in CONTRACTS[op].writes else v for n, v in given.items()}
        return given, getattr(mk, op)(**given, backend=chosen)

    getattr(backend, op)  # skips what the backend does not serve
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with mk.use_backend(backend.name) if chosen is None else nullcontext():
        eager, got = (outcome(op, *run(sample(op, backend.device))) for run in (function, compiled))
    for name, value in eager.items():
        assert same_bits(value, got[name]), name


def test_explicit_backend_that_does_not_serve(device):
    """The compiler reports the error of eager mode."""

    def function(x):
        return mk.gather_tokens(*simple_arguments(x, 0), backend="cuda" if device == "cpu" else "cpu")

    with pytest.raises(Exception, match=r"backend '\w+' does not serve gather_tokens on"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(torch.ones(1, 2, 3, device=device))


def test_gradient_of_an_explicit_backend_in_a_graph(backend):
    x, merge = normal((1, 17, 8), 1, device=backend.device), backend.spatial_merge

    def loss(x):
        return (merge(x, [4, 4], [2, 2], 0.1).tokens ** 2).sum()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        f(leaf).backward()
        grads.append(leaf.grad)
    assert same_bits(*grads)
