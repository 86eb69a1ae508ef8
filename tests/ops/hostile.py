# SPDX-License-Identifier: Apache-2.0
"""Invalid and adversarial inputs: for each, the specified outcome and its check on a backend.

The outcome is a specific error or defined behavior, never an out-of-bounds write. The overlap test is exact
(mustdrop_kernels/ops/overlap.py, csrc/common/overlap.h): interleaved views with disjoint elements are legal, a single
shared byte is an error.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import mustdrop_kernels as mk

from .cases import Watch, random_bits, same_bits
from .sample_calls import deciding, sample, tensors_in
from .schemas import OPS
from .test_refusals import ROWS, broken, expect_refusal

Check = Callable[[Any], None]
IN_PLACE = ("compact_kv_", "compact_paged_kv_")
ANY_REFUSAL = (RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Row:
    section: str
    wrong: str
    happens: str
    check: Check  # of a backend


TABLE: list[Row] = []


def row(section: str, wrong: str, happens: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        TABLE.append(Row(section, wrong, happens, check))
        return check

    return add


def ints(values: Any, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def gather(backend, x=None, keep=((2, 0),), counts=(2,)) -> torch.Tensor:
    x = torch.arange(12.0).view(1, 3, 4) if x is None else x
    return backend.gather_tokens(x, ints(keep, torch.int64), ints(counts))


def compact(backend, keys, values, keep=((1, 3),), counts=(2,)) -> None:
    backend.compact_kv_(keys, values, [ints(keep, torch.int64)], [ints(counts)])


def refused(backend, op: str, argument: str, given: dict) -> None:
    """Check that the call raises an error that names the argument, before any work."""
    expect_refusal(getattr(backend, op), op, argument, given)


def table_rows(backend, ways: tuple[str, ...]) -> None:
    """Check these rows of the table of invalid arguments."""
    found = [(op, argument, wrong) for op, argument, wrong in ROWS if wrong.startswith(ways)]
    assert len({op for op, _, _ in found}) >= 2, "the table of invalid arguments has other names now"
    for op, argument, wrong in found:
        refused(backend, op, argument, broken(op, argument, wrong, backend.device))


# ---------------------------------------------------------------------------------------------- of another kind

KIND = "Arguments of the wrong kind"
NAMED = "`RuntimeError` that names the operator and the argument, before any work"


@row(KIND, "a tensor of another dtype", NAMED)
def another_dtype(backend):
    table_rows(backend, ("int", "float", "integers", "another dtype", "uint8", "bool"))


@row(KIND, "a tensor of another rank or size", NAMED)
def another_shape(backend):
    table_rows(backend, ("rank", "another", "one token", "heads", "rows", "other heads"))


@row(KIND, "gaps in the last dimension (of anything but a paged cache, `counts`, `budgets`, `lse`)", NAMED)
def gaps(backend):
    table_rows(backend, ("last dimension with gaps", "gaps"))


@row(KIND, "a negative `budget`, `k`, `capacity`, `max_query`, `num_prefix_tokens`; a `drop_multiple` below 1", NAMED)
def negative(backend):
    table_rows(backend, ("negative", "zero"))


@row(KIND, "lists of different lengths; `keep` neither one nor one per layer", NAMED)
def lists(backend):
    table_rows(backend, ("one layer less", "neither one", "none", "more than keep"))


@row(KIND, "`None`, a NumPy array, a number in the place of a tensor", "`TypeError` or `RuntimeError` that names it")
def no_tensor(backend):
    for wrong in (None, np.zeros((1, 3, 4)), 3):
        with pytest.raises(ANY_REFUSAL, match=r"gather_tokens.*x"):
            backend.gather_tokens(wrong, ints([[0]], torch.int64), ints([1]))
        with pytest.raises(ANY_REFUSAL, match=r"gather_tokens.*keep"):
            backend.gather_tokens(torch.zeros(1, 3, 4), wrong, ints([1]))
    cache = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ANY_REFUSAL, match=r"compact_kv_.*keys"):
        compact(backend, [None], [cache])
    with pytest.raises(ANY_REFUSAL, match=r"compact_kv_.*values"):
        compact(backend, [cache], [None])


@row(KIND, "one tensor in the place of a list of caches", "taken apart along its first dimension, as Python does")
def stacked(backend):
    keys, values = (random_bits((2, 1, 3, 8, 4), seed, torch.float32) for seed in (1, 2))
    want = [key[:, :, [1, 3]].clone() for key in keys]
    compact(backend, keys, values)
    assert all(same_bits(key[:, :, :2], old) for key, old in zip(keys, want, strict=True))


@row(KIND, "a sparse, nested or quantized tensor", "an error of torch or of this package that names the operator")
def not_strided(backend):
    warnings.simplefilter("ignore")  # both kinds are deprecated in torch
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)])
    quantized = torch.quantize_per_tensor(torch.zeros(1, 3, 4), 0.1, 0, torch.qint8)
    for x in (torch.eye(4)[None].to_sparse(), nested, quantized):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"gather_tokens|Nested"):
            backend.gather_tokens(x, ints([[0]] * x.size(0), torch.int64), ints([1] * x.size(0)))


@row(
    KIND,
    "a lazy conjugate or negative (`x.conj()`, its `.imag`)",
    "materialized by torch, or an error that names the argument; in place always an error, memory unchanged",
)
def lazy(backend):
    x = torch.complex(torch.randn(1, 3, 4), torch.randn(1, 3, 4)).conj()
    for view in (x, x.imag[..., :1]):
        try:
            got = gather(backend, view)
        except RuntimeError as error:
            assert "mustdrop::gather_tokens: x" in str(error)  # noqa: PT017
        else:
            assert torch.equal(got[0, 0], view[0, 2])
    cache = torch.complex(torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2))
    before = cache.clone()
    with pytest.raises(RuntimeError):
        compact(backend, [cache.conj()], [torch.zeros_like(cache)])
    assert same_bits(cache, before)


@row(
    KIND,
    "tensors that require a gradient",
    "`spatial_merge` and `gather_tokens` have a gradient in `x`; the others raise in `backward`; in-place operators"
    " raise immediately",
)
def requires_grad(backend):
    x = torch.randn(1, 3, 4, requires_grad=True)
    gather(backend, x).sum().backward()
    assert x.grad[0].sum(1).tolist() == [4.0, 0.0, 4.0]
    given = sample("cls_attention")
    given["q"].requires_grad_()
    scores = backend.cls_attention(**given)
    with pytest.raises(RuntimeError, match="has no gradient"):
        scores.sum().backward()
    given = sample("compact_kv_")
    given["keys"] = [key.float().requires_grad_() for key in given["keys"]]
    given["values"] = [value.float() for value in given["values"]]
    with pytest.raises(RuntimeError, match="must not require grad"):
        backend.compact_kv_(**given)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


@row(KIND, "a subclass of `Tensor`; an `nn.Parameter`", "treated as a plain tensor; overlaps are detected")
def subclass(backend):
    x = torch.randn(1, 3, 4)
    assert torch.equal(gather(backend, x.as_subclass(Plain)), gather(backend, x))
    assert torch.equal(gather(backend, torch.nn.Parameter(x)), gather(backend, x))
    cache = torch.nn.Parameter(torch.randn(1, 1, 4, 2), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"values\[0\] must not share memory with keys\[0\]"):
        compact(backend, [cache], [cache.data])


@row(KIND, "tensors made in `torch.inference_mode`, used outside of it", "supported, also in place")
def inference(backend):
    with torch.inference_mode():
        key, value = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2)
    want = key[:, :, [1, 3]].clone()
    compact(backend, [key], [value])
    assert same_bits(key[:, :, :2], want)


@row(KIND, "meta tensors", "by `torch.ops`: the shapes and dtypes of the results; by `backend=`: an error")
def meta(backend):
    for op in OPS:
        given = {name: _to_meta(value) for name, value in sample(op).items()}
        got = getattr(mk, op)(**given)
        want = getattr(mk, op)(**sample(op))
        for a, b in zip(_flat(got), _flat(want), strict=True):
            assert (a.device.type, a.dtype, a.shape) == ("meta", b.dtype, b.shape)


def _to_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_meta(item) for item in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _flat(result: Any) -> list[torch.Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, torch.Tensor) else list(result)


@row(KIND, "tensors on several devices", NAMED)
def devices(backend):
    if backend.name.endswith("_emulated"):
        pytest.skip("an emulated library has no other devices")
    for op in OPS:
        given = sample(op)
        for name, value in given.items():
            if name in deciding(op):
                continue
            if isinstance(value, list) and isinstance(value[0], torch.Tensor):
                changed = [*value[:-1], value[-1].to("meta")]
            elif isinstance(value, torch.Tensor):
                changed = value.to("meta")
            else:
                continue
            with pytest.raises(RuntimeError, match=rf"mustdrop::{op}: {name}.* must be on "):
                getattr(backend, op)(**{**given, name: changed})


@row(
    KIND, "a backend that does not exist, or does not serve the device", "`BackendError` with the names, or the reason"
)
def backends(backend):
    with pytest.raises(mk.backends.BackendError, match="there are"):
        mk.gather_tokens(torch.zeros(1, 2, 2), ints([[0]], torch.int64), ints([1]), backend="missing")
    with pytest.raises(mk.backends.BackendError, match="serves CUDA tensors"):
        mk.gather_tokens(torch.zeros(1, 2, 2), ints([[0]], torch.int64), ints([1]), backend="cuda")


# ---------------------------------------------------------------------------------------------- memory

MEMORY = "Memory of caches that are changed in place"


@row(MEMORY, "the same tensor twice in a list", NAMED)
def twice(backend):
    table_rows(backend, ("a layer twice",))


@row(MEMORY, "a tensor as key and as value", NAMED)
def key_as_value(backend):
    for op in IN_PLACE:
        given = sample(op)
        given["values"] = [given["values"][0], given["keys"][1], given["values"][2]]
        refused(backend, op, "values[1]", given)


@row(MEMORY, "views that overlap, with any strides", NAMED)
def overlap(backend):
    buffer = random_bits((2, 3, 20, 12), 1, torch.float32)
    flat = random_bits((500,), 2, torch.float32)
    pairs = [
        (buffer[..., :8], buffer[..., 4:]),  # four elements of each position
        (buffer[:, :, :10], buffer[:, :, 9:19]),  # one position
        (flat.as_strided((1, 2, 5, 4), (400, 100, 7, 1)), flat.as_strided((1, 2, 5, 4), (400, 90, 11, 1), 25)),
    ]
    for key, value in pairs:
        before = key.clone()
        # The same layouts are legal at other addresses; a cached layout must not make these legal.
        apart = [torch.empty_strided(t.shape, t.stride()).copy_(t) for t in (key, value)]
        compact(backend, *[[t] for t in apart], [[1, 3]] * len(key), [2] * len(key))
        with pytest.raises(RuntimeError, match=r"compact_kv_: values\[0\] must not share memory with keys\[0\]"):
            compact(backend, [key], [value], [[1, 3]] * len(key), [2] * len(key))
        assert same_bits(key, before)


@row(MEMORY, "interleaved views whose elements are disjoint", "legal: independent of each other")
def interleaved(backend):
    buffer = random_bits((2, 3, 20, 2, 8), 1, torch.float32)
    want = buffer[:, :, [1, 3]].clone()
    compact(backend, [buffer[..., 0, :]], [buffer[..., 1, :]], [[1, 3]] * 2, [2] * 2)
    assert same_bits(buffer[:, :, :2], want)


@row(MEMORY, "a tensor whose own elements overlap: expanded, or overlapping windows (`as_strided`)", NAMED)
def overlaps_itself(backend):
    table_rows(backend, ("expanded",))
    windows = random_bits((200,), 1, torch.float32).as_strided((1, 2, 10, 4), (1, 3, 4, 1))
    given = {"keys": [windows], "values": [torch.zeros(1, 2, 10, 4)], "keep": [ints([[1]], torch.int64)]}
    refused(backend, "compact_kv_", "keys[0]", {**given, "counts": [ints([1])]})


@row(MEMORY, "`keep`, `counts`, `block_table`, `seq_lens` inside a cache's memory", NAMED)
def keep_in_cache(backend):
    cache = torch.zeros(1, 1, 20, 8, dtype=torch.int64)
    given = {"keys": [cache], "values": [cache.clone()], "keep": [cache[0, 0, :1, :4]], "counts": [ints([2])]}
    refused(backend, "compact_kv_", "keep[0]", given)


@row(MEMORY, "`keep` and `counts` that share memory with each other, or are listed twice", "legal: they are only read")
def shared_keep(backend):
    keys, values = ([random_bits((1, 2, 8, 4), seed + i, torch.float32) for i in range(2)] for seed in (1, 3))
    keep, counts = ints([[1, 3]], torch.int64), ints([2])
    want = [key[:, :, [1, 3]].clone() for key in keys]
    backend.compact_kv_(keys, values, [keep, keep], [counts, counts])
    assert all(same_bits(key[:, :, :2], old) for key, old in zip(keys, want, strict=True))


@row(MEMORY, "inputs of the other operators that overlap or are expanded", "legal: they are only read; results are new")
def overlapping_inputs(backend):
    x = torch.randn(3, 4)
    assert torch.equal(gather(backend, x[None]), x[[2, 0]][None])
    wide = backend.gather_tokens(x[None].expand(2, -1, -1), ints([[2]] * 2, torch.int64), ints([1] * 2))
    assert torch.equal(wide, x[2].expand(2, 1, 4))
    assert wide.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


# ---------------------------------------------------------------------------------------------- values

VALUES = "Values on the device: nothing out of bounds is read or written"


@row(VALUES, "`keep` negative or past the end", "`gather_tokens`: zeros; compaction: this move is skipped")
def keep_outside(backend):
    for bad in (-1, 3, 2**62, -(2**63)):
        got = gather(backend, keep=((2, bad),))
        assert got[0, 0].tolist() == [8.0, 9.0, 10.0, 11.0]
        assert not got[0, 1].any()
    key, value = random_bits((1, 2, 8, 4), 1, torch.float32), random_bits((1, 2, 8, 4), 2, torch.float32)
    want = key[:, :, [1, 3]].clone()
    compact(backend, [key], [value], ((1, 3, 2**62, -5),), (4,))
    assert same_bits(key[:, :, :2], want)


def _bounded(backend, op: str, changes: dict) -> None:
    """A call with these arguments changes no byte outside its caches."""
    given = {**sample(op), **changes}
    caches = [*given["keys"], *given["values"]]
    outside = [t for t in tensors_in(given) if not any(t is cache for cache in caches)]
    buffers = []
    for name in ("keys", "values"):
        padded = [torch.nn.functional.pad(t, (1,) * 8) for t in given[name]]
        buffers += padded
        given[name] = [t[1:-1, 1:-1, 1:-1, 1:-1] for t in padded]
    watch, inputs = Watch(*given["keys"], *given["values"]), Watch(*outside)
    getattr(backend, op)(**given)
    assert watch.outside_unchanged()
    assert inputs.nothing_changed()


@row(VALUES, "`keep` repeated or not ascending", "`gather_tokens`: in that order; compaction: some of the old contents")
def keep_unsorted(backend):
    assert gather(backend, keep=((2, 2, 0),), counts=(3,))[0, :, 0].tolist() == [8.0, 8.0, 0.0]
    for op in IN_PLACE:
        _bounded(backend, op, {"keep": [ints([[9, 4, 4, 0], [3, 3, 8, 1]], torch.int64)], "counts": [ints([4, 4])]})


@row(VALUES, "`counts` negative or above the capacity of `keep`", "clamped to 0, to the capacity")
def counts_outside(backend):
    assert not gather(backend, counts=(-7,)).any()
    assert torch.equal(gather(backend, counts=(2**31 - 1,)), gather(backend))
    for op in IN_PLACE:
        _bounded(backend, op, {"counts": [ints([2**31 - 1, -(2**31)])]})


@row(VALUES, "`block_table` with blocks that do not exist", "padding (scores); such moves are skipped")
def table_outside(backend):
    bad = ints([[10**6, -1, 2], [2**31 - 1, -(2**31), 6]])
    _bounded(backend, "compact_paged_kv_", {"block_table": bad})
    given = sample("text_vision_scores_paged")
    got = backend.text_vision_scores_paged(**{**given, "block_table": bad})
    assert got.total.isfinite().all()


@row(VALUES, "`block_table` with a block listed twice", "compaction: some of the old contents, nothing outside")
def table_twice(backend):
    try:
        _bounded(backend, "compact_paged_kv_", {"block_table": ints([[5, 5, 5], [5, 3, 3]])})
    except RuntimeError as error:  # the emulation of CUDA reports that the two sequences race for the block
        assert "cuda_emulation: a race" in str(error)  # noqa: PT017


@row(VALUES, "`seq_lens` negative or beyond the table", "clamped to the extent of the table")
def seq_lens_outside(backend):
    for lengths in ([2**31 - 1, -(2**31)], [99, -1]):
        _bounded(backend, "compact_paged_kv_", {"seq_lens": ints(lengths)})
        given = {**sample("text_vision_scores_paged"), "seq_lens": ints(lengths)}
        given["k_cache"] = torch.ones_like(given["k_cache"])
        assert backend.text_vision_scores_paged(**given).total.isfinite().all()


@row(VALUES, "`cu_seqlens` that decrease or exceed the tensors", "clamped; a sequence of negative length is empty")
def cu_seqlens(backend):
    for bounds in ([0, 99, 200], [9, 3, 14], [-5, 4, 2**31 - 1], [14, 8, 0]):
        given = {**sample("text_vision_scores_varlen"), "lse": None}
        watch = Watch(*tensors_in(given))
        changes = {"cu_seqlens_q": ints(bounds), "cu_seqlens_k": ints(bounds)}
        got = backend.text_vision_scores_varlen(**{**given, **changes})
        assert got.total.isfinite().all()
        assert watch.nothing_changed()


@row(VALUES, "`max_seqlen_*` below a length", "rows past the bound are ignored, nothing outside is accessed")
def bounds_too_small(backend):
    for longest in (0, 1):
        given = {**sample("text_vision_scores_varlen"), "max_seqlen_q": longest, "max_seqlen_k": longest}
        assert backend.text_vision_scores_varlen(**given).total.isfinite().all()


@row(VALUES, "`token_types` other than 0 to 3", "text: kept, no query row")
def other_types(backend):
    types = torch.tensor([[7, 2, 255, 0]], dtype=torch.uint8)
    assert backend.select_topk(torch.zeros(1, 4), types, 0).keep.tolist() == [[0, 2, -1, -1]]


@row(
    VALUES,
    "NaN or infinity in scores",
    "top-k: NaN ranks lowest; thresholds: a NaN in `total` keeps the whole sequence",
)
def nan_scores(backend):
    types = torch.full((1, 4), 2, dtype=torch.uint8)
    scores = torch.tensor([[torch.nan, -torch.inf, torch.inf, 0.0]])
    assert backend.select_topk(scores, types, 3).keep.tolist() == [[1, 2, 3, -1]]
    assert backend.select_dual(scores, torch.zeros(1, 4), types, 1.0, 1.0).counts.tolist() == [4]


@row(VALUES, "NaN or infinity as a threshold", "IEEE comparison: nothing is below NaN")
def nan_threshold(backend):
    types, total = torch.full((1, 3), 2, dtype=torch.uint8), torch.ones(1, 3)
    assert backend.select_dual(total, total, types, torch.nan, 5.0).counts.tolist() == [3]
    assert backend.select_dual(total, total, types, torch.inf, torch.inf).counts.tolist() == [0]
    merged = backend.spatial_merge(torch.ones(1, 4, 2), [2, 2], [2, 2], torch.nan, num_prefix_tokens=0)
    assert merged.counts.tolist() == [4]


@row(VALUES, "`budgets` negative or above the number of tokens", "clamped to 0, to all")
def budgets_outside(backend):
    types = torch.full((2, 3), 2, dtype=torch.uint8)
    got = backend.select_topk(torch.zeros(2, 3), types, 1, budgets=ints([-(2**31), 2**31 - 1]))
    assert got.counts.tolist() == [0, 3]


@row(VALUES, "`sizes` of zero in a whole window", "0 / 0: the merged token is NaN, its neighbors are unaffected")
def zero_sizes(backend):
    sizes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    got = backend.spatial_merge(torch.ones(1, 4, 2), [1, 4], [1, 2], -1.0, num_prefix_tokens=0, sizes=sizes)
    assert got.tokens[0, 0].isnan().all()
    assert got.tokens[0, 1].tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------- sizes

SIZES = "Sizes that overflow 32 or 64 bits"


@row(SIZES, "`grid` whose product does not fit in 64 bits", NAMED)
def huge_grid(backend):
    for grid in ([2**32, 2**32], [2**63 - 1, 2], [2**62, 2**62, 2**62]):
        given = {"x": torch.zeros(1, 1, 4), "grid": grid, "window": [2] * len(grid)}
        refused(backend, "spatial_merge", "x", given)


@row(SIZES, "`num_prefix_tokens` near 2^63", f"`spatial_merge`: {NAMED}; `cls_attention`: everything is prefix")
def huge_prefix(backend):
    given = {"x": torch.zeros(1, 5, 4), "grid": [2, 2], "window": [2, 2], "num_prefix_tokens": 2**63 - 1}
    refused(backend, "spatial_merge", "x", given)
    q, k = torch.randn(1, 2, 4), torch.randn(1, 2, 5, 4)
    assert not backend.cls_attention(q, k, 1.0, num_prefix_tokens=2**62).any()


@row(
    SIZES,
    "`window` larger than the grid, up to 2^63 - 1",
    "cut at the border; no memory is allocated beyond the grid",
)
def huge_window(backend):
    x = torch.ones(1, 4, 4)
    for window in ([2**32, 2**32], [2**63 - 1, 2**63 - 1], [3, 2**62]):
        assert backend.spatial_merge(x, [2, 2], window, num_prefix_tokens=0).counts.tolist() == [1]
        cut = backend.spatial_merge(x, [2, 2], window, num_prefix_tokens=0, uniform=True)
        assert cut.counts.tolist() == [4], "with `uniform` a window that is cut does not merge"


@row(
    SIZES,
    "a sequence of 2^40 positions (expanded)",
    "CPU and reference: 64-bit addressing; CUDA: an error above 2^31",
)
def huge_length(backend):
    x = torch.arange(4.0).expand(1, 2**40, 4)
    keep, counts = ints([[2**39, 5, 2**40]], torch.int64), ints([3])
    if backend.name == "cuda_emulated":
        try:
            got = backend.gather_tokens(x, keep, counts)
        except RuntimeError as error:
            assert "mustdrop" in str(error)  # noqa: PT017
            return
    else:
        got = backend.gather_tokens(x, keep, counts)
    assert got[0].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2 + [[0.0] * 4]


@row(
    SIZES,
    "results that exceed memory (`capacity`, `max_query`, expanded batches)",
    "`RuntimeError`; nothing is modified",
)
def huge_results(backend):
    types = torch.full((1, 5), 2, dtype=torch.uint8)
    for capacity in (2**50, 2**62):
        with pytest.raises(RuntimeError):
            backend.select_topk(torch.zeros(1, 5), types, 1, capacity=capacity)
    with pytest.raises(RuntimeError):
        backend.text_vision_attention(**{**sample("text_vision_attention"), "max_query": 2**55})
    q, k = torch.randn(1, 1, 4).expand(2**45, 1, 4), torch.randn(1, 1, 5, 4).expand(2**45, 1, 5, 4)
    with pytest.raises(RuntimeError):
        backend.cls_attention(q, k, 1.0)


@row(SIZES, "`max_seqlen_*` up to 2^62", "a valid upper bound: nothing of that size is allocated")
def huge_bounds(backend):
    for op, names in (
        ("text_vision_scores_varlen", ("max_seqlen_q", "max_seqlen_k")),
        ("text_vision_scores_paged", ("max_seqlen_q",)),
    ):
        given = sample(op)
        exact = getattr(backend, op)(**copy.copy(given))
        loose = getattr(backend, op)(**{**given, **dict.fromkeys(names, 2**62)})
        torch.testing.assert_close(exact.total, loose.total, rtol=2e-5, atol=1e-6)


@row(SIZES, "`k` or `drop_multiple` up to 2^63 - 1", "valid numbers")
def huge_numbers(backend):
    types = torch.full((1, 5), 2, dtype=torch.uint8)
    assert backend.select_topk(torch.zeros(1, 5), types, 2**63 - 1).counts.tolist() == [5]
    assert backend.select_topk(torch.zeros(1, 5), types, 0, drop_multiple=2**63 - 1).counts.tolist() == [5]


@row(SIZES, "empty batch, sequence, heads, channels, lists", "an empty result, or zeros")
def empty(backend):
    backend.compact_kv_([], [], [], [])
    empty_batch = torch.from_numpy(np.zeros((0, 3, 4), dtype=np.float32))  # all strides are 0
    got = backend.gather_tokens(empty_batch, torch.from_numpy(np.zeros((0, 2), dtype=np.int64)), ints([]))
    assert tuple(got.shape) == (0, 2, 4)
    assert not backend.cls_attention(torch.zeros(2, 0, 4), torch.zeros(2, 0, 5, 4), 1.0).any()
    assert not backend.cls_attention(torch.zeros(2, 3, 0), torch.zeros(2, 3, 0, 0), 1.0).any()
