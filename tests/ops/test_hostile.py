# SPDX-License-Identifier: Apache-2.0
"""Invalid and adversarial inputs on every backend: a specific error or defined behavior, never a write out of bounds.

"Refused" is a RuntimeError that names the operator and the argument, before any work; test_refusals.py has those of one
argument alone. The overlap test is exact (mustdrop_kernels/ops/overlap.py, csrc/common/overlap.h): interleaved views
with disjoint elements are legal, a single shared byte is an error.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

import mustdrop_kernels as mk
from mustdrop_kernels.ops import overlap

from .cases import Watch, random_bits, same_bits
from .sample_calls import deciding, sample, tensors_in
from .schemas import OPS
from .test_refusals import expect_refusal

IN_PLACE = ("compact_kv_", "compact_paged_kv_")
ANY_REFUSAL = (RuntimeError, TypeError, ValueError)


@pytest.fixture(autouse=True)
def _cpu_tensors(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend").device != "cpu":
        pytest.skip("the inputs are CPU tensors")


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


# ---------------------------------------------------------------------------------------------- of another kind


def test_no_tensor(backend):
    """`None`, a NumPy array, a number in the place of a tensor: `TypeError` or `RuntimeError` that names it."""
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


def test_stacked(backend):
    """One tensor in the place of a list of caches: taken apart along its first dimension, as Python does."""
    keys, values = (random_bits((2, 1, 3, 8, 4), seed, torch.float32) for seed in (1, 2))
    want = [key[:, :, [1, 3]].clone() for key in keys]
    compact(backend, keys, values)
    assert all(same_bits(key[:, :, :2], old) for key, old in zip(keys, want, strict=True))


@pytest.mark.filterwarnings("ignore")  # nested and quantized tensors are deprecated in torch
def test_not_strided(backend):
    """A sparse, nested or quantized tensor: an error of torch or of this package that names the operator."""
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)])
    quantized = torch.quantize_per_tensor(torch.zeros(1, 3, 4), 0.1, 0, torch.qint8)
    for x in (torch.eye(4)[None].to_sparse(), nested, quantized):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"gather_tokens|Nested"):
            backend.gather_tokens(x, ints([[0]] * x.size(0), torch.int64), ints([1] * x.size(0)))


def test_lazy(backend):
    """A lazy conjugate or negative (`x.conj()`, its `.imag`): materialized by torch, or an error that names the
    argument; in place always an error, memory unchanged."""
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


def test_requires_grad(backend):
    """Tensors that require a gradient: `spatial_merge` and `gather_tokens` have a gradient in `x`; the others raise in
    `backward`; in-place operators raise immediately."""
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


def test_subclass(backend):
    """A subclass of `Tensor`; an `nn.Parameter`: treated as a plain tensor; overlaps are detected."""
    x = torch.randn(1, 3, 4)
    assert torch.equal(gather(backend, x.as_subclass(Plain)), gather(backend, x))
    assert torch.equal(gather(backend, torch.nn.Parameter(x)), gather(backend, x))
    cache = torch.nn.Parameter(torch.randn(1, 1, 4, 2), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"values\[0\] must not share memory with keys\[0\]"):
        compact(backend, [cache], [cache.data])


def test_inference(backend):
    """Tensors made in `torch.inference_mode`, used outside of it: supported, also in place."""
    with torch.inference_mode():
        key, value = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2)
    want = key[:, :, [1, 3]].clone()
    compact(backend, [key], [value])
    assert same_bits(key[:, :, :2], want)


def test_meta(backend):
    """Meta tensors: the results have the shapes and dtypes of real ones."""
    for op in OPS:
        given = tree_map_only(torch.Tensor, lambda t: t.to("meta"), sample(op))
        got = getattr(mk, op)(**given)
        want = getattr(mk, op)(**sample(op))
        for a, b in zip(_flat(got), _flat(want), strict=True):
            assert (a.device.type, a.dtype, a.shape) == ("meta", b.dtype, b.shape)


def _flat(result: Any) -> list[torch.Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_devices(backend):
    """Tensors on several devices: refused."""
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


def test_backends(backend):
    """A backend that does not exist, or does not serve the device: `BackendError` with the names, or the reason."""
    with pytest.raises(mk.backends.BackendError, match="there are"):
        mk.gather_tokens(torch.zeros(1, 2, 2), ints([[0]], torch.int64), ints([1]), backend="missing")
    with pytest.raises(mk.backends.BackendError, match="serves CUDA tensors"):
        mk.gather_tokens(torch.zeros(1, 2, 2), ints([[0]], torch.int64), ints([1]), backend="cuda")


# ---------------------------------------------------------------------------------------------- memory


def test_overlap(backend):
    """Views that overlap, with any strides: refused."""
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


def test_interleaved(backend):
    """Interleaved views whose elements are disjoint: legal, independent of each other."""
    buffer = random_bits((2, 3, 20, 2, 8), 1, torch.float32)
    want = buffer[:, :, [1, 3]].clone()
    compact(backend, [buffer[..., 0, :]], [buffer[..., 1, :]], [[1, 3]] * 2, [2] * 2)
    assert same_bits(buffer[:, :, :2], want)


def test_overlaps_itself(backend):
    """A tensor whose own elements overlap: expanded, or overlapping windows (`as_strided`): refused."""
    windows = random_bits((200,), 1, torch.float32).as_strided((1, 2, 10, 4), (1, 3, 4, 1))
    given = {"keys": [windows], "values": [torch.zeros(1, 2, 10, 4)], "keep": [ints([[1]], torch.int64)]}
    refused(backend, "compact_kv_", "keys[0]", {**given, "counts": [ints([1])]})


def test_keep_in_cache(backend):
    """`keep`, `counts`, `block_table`, `seq_lens` inside a cache's memory: refused."""
    cache = torch.zeros(1, 1, 20, 8, dtype=torch.int64)
    given = {"keys": [cache], "values": [cache.clone()], "keep": [cache[0, 0, :1, :4]], "counts": [ints([2])]}
    refused(backend, "compact_kv_", "keep[0]", given)


def test_shared_keep(backend):
    """`keep` and `counts` that share memory with each other, or are listed twice: legal, since they are only read."""
    keys, values = ([random_bits((1, 2, 8, 4), seed + i, torch.float32) for i in range(2)] for seed in (1, 3))
    keep, counts = ints([[1, 3]], torch.int64), ints([2])
    want = [key[:, :, [1, 3]].clone() for key in keys]
    backend.compact_kv_(keys, values, [keep, keep], [counts, counts])
    assert all(same_bits(key[:, :, :2], old) for key, old in zip(keys, want, strict=True))


def test_overlapping_inputs(backend):
    """Inputs of the other operators that overlap or are expanded: legal, since they are only read; results are new."""
    x = torch.randn(3, 4)
    assert torch.equal(gather(backend, x[None]), x[[2, 0]][None])
    wide = backend.gather_tokens(x[None].expand(2, -1, -1), ints([[2]] * 2, torch.int64), ints([1] * 2))
    assert torch.equal(wide, x[2].expand(2, 1, 4))
    assert wide.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


# ---------------------------------------------------------------------------------------------- values


def test_keep_outside(backend):
    """`keep` negative or past the end: `gather_tokens` gives zeros, compaction skips the move."""
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


def test_keep_unsorted(backend):
    """`keep` repeated or not ascending: `gather_tokens` gives that order, compaction some of the old contents."""
    assert gather(backend, keep=((2, 2, 0),), counts=(3,))[0, :, 0].tolist() == [8.0, 8.0, 0.0]
    for op in IN_PLACE:
        _bounded(backend, op, {"keep": [ints([[9, 4, 4, 0], [3, 3, 8, 1]], torch.int64)], "counts": [ints([4, 4])]})


def test_counts_outside(backend):
    """Negative or above the capacity of `keep`: clamped to 0, to the capacity."""
    assert not gather(backend, counts=(-7,)).any()
    assert torch.equal(gather(backend, counts=(2**31 - 1,)), gather(backend))
    for op in IN_PLACE:
        _bounded(backend, op, {"counts": [ints([2**31 - 1, -(2**31)])]})


def test_table_outside(backend):
    """`block_table` with blocks that do not exist: padding (scores); such moves are skipped."""
    bad = ints([[10**6, -1, 2], [2**31 - 1, -(2**31), 6]])
    _bounded(backend, "compact_paged_kv_", {"block_table": bad})
    given = sample("text_vision_scores_paged")
    got = backend.text_vision_scores_paged(**{**given, "block_table": bad})
    assert got.total.isfinite().all()


def test_table_twice(backend):
    """`block_table` with a block listed twice: some of the old contents, nothing outside changes."""
    try:
        _bounded(backend, "compact_paged_kv_", {"block_table": ints([[5, 5, 5], [5, 3, 3]])})
    except RuntimeError as error:  # the emulation of CUDA reports that the two sequences race for the block
        assert "cuda_emulation: a race" in str(error)  # noqa: PT017


def test_seq_lens_outside(backend):
    """`seq_lens` negative or beyond the table: clamped to its extent."""
    for lengths in ([2**31 - 1, -(2**31)], [99, -1]):
        _bounded(backend, "compact_paged_kv_", {"seq_lens": ints(lengths)})
        given = {**sample("text_vision_scores_paged"), "seq_lens": ints(lengths)}
        given["k_cache"] = torch.ones_like(given["k_cache"])
        assert backend.text_vision_scores_paged(**given).total.isfinite().all()


def test_cu_seqlens(backend):
    """`cu_seqlens` that decrease or exceed the tensors: clamped; a sequence of negative length is empty."""
    for bounds in ([0, 99, 200], [9, 3, 14], [-5, 4, 2**31 - 1], [14, 8, 0]):
        given = {**sample("text_vision_scores_varlen"), "lse": None}
        watch = Watch(*tensors_in(given))
        changes = {"cu_seqlens_q": ints(bounds), "cu_seqlens_k": ints(bounds)}
        got = backend.text_vision_scores_varlen(**{**given, **changes})
        assert got.total.isfinite().all()
        assert watch.nothing_changed()


def test_bounds_too_small(backend):
    """`max_seqlen_*` below a length: rows past the bound are ignored, nothing outside is accessed."""
    for longest in (0, 1):
        given = {**sample("text_vision_scores_varlen"), "max_seqlen_q": longest, "max_seqlen_k": longest}
        assert backend.text_vision_scores_varlen(**given).total.isfinite().all()


def test_other_types(backend):
    """`token_types` other than 0 to 3: text, which is kept and no query row."""
    types = torch.tensor([[7, 2, 255, 0]], dtype=torch.uint8)
    assert backend.select_topk(torch.zeros(1, 4), types, 0).keep.tolist() == [[0, 2, -1, -1]]


def test_nan_scores(backend):
    """Top-k: NaN ranks lowest; thresholds: a NaN in `total` keeps the whole sequence."""
    types = torch.full((1, 4), 2, dtype=torch.uint8)
    scores = torch.tensor([[torch.nan, -torch.inf, torch.inf, 0.0]])
    assert backend.select_topk(scores, types, 3).keep.tolist() == [[1, 2, 3, -1]]
    assert backend.select_dual(scores, torch.zeros(1, 4), types, 1.0, 1.0).counts.tolist() == [4]


def test_nan_threshold(backend):
    """NaN or infinity as a threshold: compared by IEEE, so that nothing is below NaN."""
    types, total = torch.full((1, 3), 2, dtype=torch.uint8), torch.ones(1, 3)
    assert backend.select_dual(total, total, types, torch.nan, 5.0).counts.tolist() == [3]
    assert backend.select_dual(total, total, types, torch.inf, torch.inf).counts.tolist() == [0]
    merged = backend.spatial_merge(torch.ones(1, 4, 2), [2, 2], [2, 2], torch.nan, num_prefix_tokens=0)
    assert merged.counts.tolist() == [4]


def test_budgets_outside(backend):
    """Negative or above the number of tokens: clamped to 0, to all."""
    types = torch.full((2, 3), 2, dtype=torch.uint8)
    got = backend.select_topk(torch.zeros(2, 3), types, 1, budgets=ints([-(2**31), 2**31 - 1]))
    assert got.counts.tolist() == [0, 3]


def test_zero_sizes(backend):
    """Zero in a whole window: the merged token is NaN (0 / 0), its neighbors are unaffected."""
    sizes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    got = backend.spatial_merge(torch.ones(1, 4, 2), [1, 4], [1, 2], -1.0, num_prefix_tokens=0, sizes=sizes)
    assert got.tokens[0, 0].isnan().all()
    assert got.tokens[0, 1].tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------- sizes


def test_huge_grid(backend):
    """`grid` whose product does not fit in 64 bits: refused."""
    for grid in ([2**32, 2**32], [2**63 - 1, 2], [2**62, 2**62, 2**62]):
        given = {"x": torch.zeros(1, 1, 4), "grid": grid, "window": [2] * len(grid)}
        refused(backend, "spatial_merge", "x", given)


def test_huge_prefix(backend):
    """`num_prefix_tokens` near 2^63: refused by `spatial_merge`; for `cls_attention` everything is prefix."""
    given = {"x": torch.zeros(1, 5, 4), "grid": [2, 2], "window": [2, 2], "num_prefix_tokens": 2**63 - 1}
    refused(backend, "spatial_merge", "x", given)
    q, k = torch.randn(1, 2, 4), torch.randn(1, 2, 5, 4)
    assert not backend.cls_attention(q, k, 1.0, num_prefix_tokens=2**62).any()


def test_huge_window(backend):
    """`window` larger than the grid, up to 2^63 - 1: cut at the border; no memory is allocated beyond the grid."""
    x = torch.ones(1, 4, 4)
    for window in ([2**32, 2**32], [2**63 - 1, 2**63 - 1], [3, 2**62]):
        assert backend.spatial_merge(x, [2, 2], window, num_prefix_tokens=0).counts.tolist() == [1]
        cut = backend.spatial_merge(x, [2, 2], window, num_prefix_tokens=0, uniform=True)
        assert cut.counts.tolist() == [4], "with `uniform` a window that is cut does not merge"


def test_huge_length(backend):
    """A sequence of 2^40 positions (expanded): 64-bit addresses on the CPU, an error above 2^31 in CUDA."""
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


def test_huge_results(backend):
    """Results that exceed memory (`capacity`, `max_query`, expanded batches): `RuntimeError`; nothing is modified."""
    types = torch.full((1, 5), 2, dtype=torch.uint8)
    for capacity in (2**50, 2**62):
        with pytest.raises(RuntimeError):
            backend.select_topk(torch.zeros(1, 5), types, 1, capacity=capacity)
    with pytest.raises(RuntimeError):
        backend.text_vision_attention(**{**sample("text_vision_attention"), "max_query": 2**55})
    q, k = torch.randn(1, 1, 4).expand(2**45, 1, 4), torch.randn(1, 1, 5, 4).expand(2**45, 1, 5, 4)
    with pytest.raises(RuntimeError):
        backend.cls_attention(q, k, 1.0)


def test_huge_bounds(backend):
    """`max_seqlen_*` up to 2^62: valid upper bounds, for which nothing is allocated."""
    for op, names in (
        ("text_vision_scores_varlen", ("max_seqlen_q", "max_seqlen_k")),
        ("text_vision_scores_paged", ("max_seqlen_q",)),
    ):
        given = sample(op)
        exact = getattr(backend, op)(**copy.copy(given))
        loose = getattr(backend, op)(**{**given, **dict.fromkeys(names, 2**62)})
        torch.testing.assert_close(exact.total, loose.total, rtol=2e-5, atol=1e-6)


def test_huge_numbers(backend):
    """`k` or `drop_multiple` up to 2^63 - 1: valid numbers."""
    types = torch.full((1, 5), 2, dtype=torch.uint8)
    assert backend.select_topk(torch.zeros(1, 5), types, 2**63 - 1).counts.tolist() == [5]
    assert backend.select_topk(torch.zeros(1, 5), types, 0, drop_multiple=2**63 - 1).counts.tolist() == [5]


def test_empty(backend):
    """Empty batch, sequence, heads, channels, lists: an empty result, or zeros."""
    backend.compact_kv_([], [], [], [])
    empty_batch = torch.from_numpy(np.zeros((0, 3, 4), dtype=np.float32))  # all strides are 0
    got = backend.gather_tokens(empty_batch, torch.from_numpy(np.zeros((0, 2), dtype=np.int64)), ints([]))
    assert tuple(got.shape) == (0, 2, 4)
    assert not backend.cls_attention(torch.zeros(2, 0, 4), torch.zeros(2, 0, 5, 4), 1.0).any()
    assert not backend.cls_attention(torch.zeros(2, 3, 0), torch.zeros(2, 3, 0, 0), 1.0).any()


# ---------------------------------------------------------------------------------------------- overlap

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def views(draw):
    """A view of one byte buffer: shape, strides in elements, offset in bytes, bytes of an element."""
    shape = draw(SHAPES)
    strides = [draw(st.integers(1, 30)) for _ in shape]
    return shape, strides, draw(st.integers(0, 40)), draw(st.sampled_from([1, 2, 4]))


def addresses(view) -> np.ndarray:
    """Addresses of every byte of every element."""
    shape, strides, offset, element = view
    places = np.array(offset)
    for n, s in zip(shape, strides, strict=True):
        places = places[..., None] + np.arange(n) * s * element
    return (places[..., None] + np.arange(element)).ravel()


def form_of(view) -> overlap.Form:
    return overlap.form(tuple(view[0]), tuple(view[1]), view[3])


@settings(max_examples=400)
@drawn(views(), views())
def test_overlap_is_exact(first, second):
    a, b = addresses(first), addresses(second)
    assert overlap.overlaps_itself(form_of(first)) == (len(set(a)) < len(a))
    shared = bool(set(a) & set(b))
    assert overlap.share_memory(form_of(first), form_of(second), second[2] - first[2]) == shared
    assert overlap.share_memory(form_of(second), form_of(first), first[2] - second[2]) == shared


@settings(max_examples=150)
@drawn(st.data())
def test_overlap_in_the_operator(backend, data):
    """Two 4-D views of one buffer raise an error if and only if they share a byte, on every backend."""
    shape = [data.draw(st.integers(1, 3)) for _ in range(3)]
    buffer = torch.zeros(600, dtype=torch.uint8)

    def view():
        dim = data.draw(st.integers(1, 4))
        strides = [data.draw(st.integers(1, 40)) for _ in range(3)]
        return ([*shape, dim], [*strides, 1], data.draw(st.integers(0, 60)), 1)

    first, second = view(), view()
    a, b = addresses(first), addresses(second)
    legal = len(set(a)) == len(a) and len(set(b)) == len(b) and not set(a) & set(b)
    key, value = (buffer.as_strided(v[0], v[1], v[2]) for v in (first, second))
    keep, counts = torch.zeros(shape[0], 1, dtype=torch.int64), torch.ones(shape[0], dtype=torch.int32)
    if legal:
        backend.compact_kv_([key], [value], [keep], [counts])
    else:
        with pytest.raises(RuntimeError, match=r"compact_kv_: (keys|values)\[0\] must"):
            backend.compact_kv_([key], [value], [keep], [counts])


@pytest.mark.parametrize("layers", [1, 40])
def test_layers_between_each_other(layers):
    """Keys and values of all layers interleaved in one buffer block by block: no overlap."""
    buffer = torch.zeros(6, layers, 2, 4, 2, 8)
    keys, values = ([buffer[:, i, part] for i in range(layers)] for part in (0, 1))
    table, keep = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64)
    for backend in ("cpu", "reference"):
        mk.compact_paged_kv_(keys, values, table, [keep], [torch.ones(1, dtype=torch.int32)], backend=backend)
