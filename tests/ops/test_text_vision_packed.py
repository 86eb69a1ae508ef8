# SPDX-License-Identifier: Apache-2.0
"""text_vision_scores_varlen and text_vision_scores_paged against the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import (
    PADDING,
    QUERY,
    TEXT,
    VISION,
    Watch,
    expected,
    f64,
    generator,
    in_buffer,
    normal,
    prompt,
    types_tensor,
)
from .changes import DOUBLE, HALF, INT, set_to, to_dtype, to_shape, with_gaps
from .tolerance import assert_scores


def cumulative(lengths: list[int], device: str) -> Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)


@dataclass
class Packed:
    q: Tensor  # (total_q, Hq, D)
    k: Tensor  # (total_k, Hk, D)
    types: Tensor  # (total_k)
    cu_q: Tensor
    cu_k: Tensor
    scale: float
    lengths: list
    op = "text_vision_scores_varlen"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.types, self.cu_q, self.cu_k

    @property
    def arguments(self) -> tuple:
        longest_q = max((q for q, _ in self.lengths), default=0)
        longest_k = max((k for _, k in self.lengths), default=0)
        return *self.tensors, longest_q, longest_k, self.scale

    def lse(self) -> Tensor:
        """(Hq, total_q) float32."""
        out = np.full((self.q.shape[1], len(self.q)), -math.inf)
        bounds = zip(oracle.spans(self.cu_q, len(self.q)), oracle.spans(self.cu_k, len(self.k)), strict=True)
        for (q0, q1), (k0, k1) in bounds:
            q, k = f64(self.q[q0:q1]).transpose(1, 0, 2), f64(self.k[k0:k1]).transpose(1, 0, 2)
            out[:, q0:q1] = oracle.log_sum_exp(q, k, self.types[k0:k1].cpu().numpy(), self.scale)
        return expected(out).float().to(self.q.device)


def packed(
    lengths: list[tuple[int, int]], heads=(4, 2), dim=16, dtype=torch.float32, device="cpu", seed=0, types=None
) -> Packed:
    """``lengths``: (length_q, length_k) per sequence."""
    total_q, total_k = sum(q for q, _ in lengths), sum(k for _, k in lengths)
    if types is None:
        types = [prompt(k, images=1 + i % 2, pad=min(k // 3, i), side="right") for i, (_, k) in enumerate(lengths)]
    return Packed(
        normal((total_q, heads[0], dim), 2 * seed, dtype, device, 1.5),
        normal((total_k, heads[1], dim), 2 * seed + 1, dtype, device, 1.5),
        types_tensor([[t for row in types for t in row]], device).reshape(-1),
        cumulative([q for q, _ in lengths], device),
        cumulative([k for _, k in lengths], device),
        1 / math.sqrt(dim),
        lengths,
    )


def check(backend, case: Packed | Paged, lse=None) -> np.ndarray:
    watch = Watch(*case.tensors, lse)
    got = getattr(backend, case.op)(*case.arguments, lse=lse)
    assert watch.nothing_changed()
    total, peak = getattr(oracle, case.op)(*map(f64, case.tensors), case.scale, None if lse is None else f64(lse))
    assert_scores(got, total, peak)
    return total


@pytest.mark.parametrize(
    ("heads", "dim"), [((1, 1), 1), ((4, 1), 7), ((4, 4), 80), ((14, 2), 64), ((2, 2), 128), ((2, 1), 256)]
)
def test_varlen_shapes(backend, heads, dim, dtype, with_lse):
    case = packed([(20, 20), (1, 17), (9, 33), (2, 2)], heads, dim, dtype, backend.device)
    total = check(backend, case, case.lse() if with_lse else None)
    assert (total > 0).any()


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [(0, 0)],
        [(1, 1)],
        [(0, 5), (3, 3)],
        [(5, 5), (0, 0), (4, 9), (0, 7)],
        [(7, 3), (2, 2)],  # more rows than keys: the first rows precede the sequence
        [(3, 0), (4, 4)],
        [(65, 65), (63, 130)],
    ],
    ids=str,
)
def test_varlen_lengths(backend, lengths):
    case = packed(lengths, device=backend.device)
    check(backend, case)
    check(backend, case, case.lse())


def test_varlen_equals_dense(backend):
    """A packed batch of one sequence equals the dense op."""
    case = packed([(40, 50)], (4, 2), 32, device=backend.device)
    dense = backend.text_vision_scores(
        case.q.transpose(0, 1)[None], case.k.transpose(0, 1)[None], case.types[None], case.scale
    )
    got = backend.text_vision_scores_varlen(*case.arguments)
    torch.testing.assert_close(got.total, dense.total[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(got.peak, dense.peak[0], rtol=2e-5, atol=1e-6)


def test_varlen_views(backend, dtype):
    case = packed([(9, 12), (5, 5)], (4, 2), 24, dtype, backend.device)
    lse = case.lse()
    case.q, case.k, case.types = in_buffer(case.q, (1, 0, 2)), in_buffer(case.k), in_buffer(case.types)
    check(backend, case)
    check(backend, case, in_buffer(lse, (1, 0)))


def test_varlen_outside_every_sequence(backend):
    """Rows before the first and after the last sequence are not read, and zero in the result."""
    case = packed([(6, 8), (4, 4)], device=backend.device, types=[prompt(8), prompt(4)])
    start = torch.full((3, 4, 16), math.nan, device=backend.device)
    case.q = torch.cat([start, case.q, start])
    case.k = torch.cat([start[:, :2], case.k, start[:, :2]])
    case.types = torch.nn.functional.pad(case.types, (3, 3), value=QUERY)
    case.cu_q, case.cu_k = case.cu_q + 3, case.cu_k + 3
    total = check(backend, case)
    assert total.any()
    assert np.isfinite(total).all()


def test_varlen_larger_maxima(backend):
    """max_seqlen_* are upper bounds, not sizes."""
    case = packed([(6, 8), (4, 4)], device=backend.device)
    q, k, types, cu_q, cu_k, _, _, scale = case.arguments
    exact = backend.text_vision_scores_varlen(*case.arguments)
    loose = backend.text_vision_scores_varlen(q, k, types, cu_q, cu_k, 100, 4000, scale)
    torch.testing.assert_close(exact.total, loose.total, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(exact.peak, loose.peak, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cu_q", [[0, 6, 10], [0, 99, 200], [6, 3, 10], [-5, 4, 10], [2**31 - 1, -(2**31), 3], [10, 6, 0]]
)
@pytest.mark.parametrize("cu_k", [[0, 8, 12], [0, 99, 200], [9, 3, 12], [-7, 5, 12], [2**31 - 1, -(2**31), 3]])
def test_varlen_garbage_on_the_device(backend, cu_q, cu_k):
    """Lengths that decrease or exceed the tensors are clamped; nothing outside is read (it is NaN) or written."""
    case = packed([(6, 8), (4, 4)], device=backend.device, types=[prompt(8), prompt(4)])
    case.q, case.k, case.types = in_buffer(case.q), in_buffer(case.k), in_buffer(case.types)
    case.cu_q = torch.tensor(cu_q, dtype=torch.int32, device=backend.device)
    case.cu_k = torch.tensor(cu_k, dtype=torch.int32, device=backend.device)
    case.lengths = [(10, 12)]  # bounds that hold for the clamped lengths
    check(backend, case)
    watch = Watch(case.q, case.k, case.types, case.cu_q, case.cu_k)
    q, k, types, cq, ck, _, _, scale = case.arguments
    for longest in (0, 1, 50):
        got = backend.text_vision_scores_varlen(q, k, types, cq, ck, longest, longest, scale)
        assert tuple(got.total.shape) == (12,)
        assert got.total.isfinite().all()
    assert watch.nothing_changed()


# ---------------------------------------------------------------------------------------------- paged


@dataclass
class Paged:
    q: Tensor  # (total_q, Hq, D)
    k_cache: Tensor  # (blocks, slots, Hk, D)
    table: Tensor  # (B, max_blocks)
    seq_lens: Tensor  # (B)
    types: Tensor  # (B, max_len)
    cu_q: Tensor
    longest_q: int
    scale: float
    op = "text_vision_scores_paged"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.table, self.seq_lens, self.types, self.cu_q

    @property
    def arguments(self) -> tuple:
        return *self.tensors, self.longest_q, self.scale

    def lse(self) -> Tensor:
        """(Hq, total_q) float32."""
        out = np.full((self.q.shape[1], len(self.q)), -math.inf)
        slots = self.k_cache.shape[1]
        for b, (q0, q1) in enumerate(oracle.spans(self.cu_q, len(self.q))):
            length = int(self.seq_lens[b])
            where = [(int(self.table[b, p // slots]), p % slots) for p in range(length)]
            k = np.array([f64(self.k_cache[w]) for w in where]).reshape(length, *self.k_cache.shape[2:])
            q, types = f64(self.q[q0:q1]).transpose(1, 0, 2), self.types[b, :length].cpu().numpy()
            out[:, q0:q1] = oracle.log_sum_exp(q, k.transpose(1, 0, 2), types, self.scale)
        return expected(out).float().to(self.q.device)


def paged(
    lengths: list[tuple[int, int]], heads=(4, 2), dim=16, slots=4, dtype=torch.float32, device="cpu", seed=0, spare=3
) -> Paged:
    """Shuffled blocks; unlisted blocks and slots past the end hold NaN, the table's tail out-of-range values."""
    batch = len(lengths)
    max_len = max((k for _, k in lengths), default=0) + 2
    max_blocks = -(-max_len // slots) + 1
    needed = [-(-k // slots) for _, k in lengths]
    order = torch.randperm(sum(needed) + spare, generator=generator(seed)).tolist()
    cache = torch.full((len(order), slots, heads[1], dim), math.nan, dtype=dtype)
    table = torch.full((batch, max_blocks), -7, dtype=torch.int32)
    types = torch.full((batch, max_len), VISION, dtype=torch.uint8)
    keys = normal((sum(k for _, k in lengths), heads[1], dim), 2 * seed + 1, dtype, "cpu", 1.5)
    used = start = 0
    for b, (_, length) in enumerate(lengths):
        table[b, : needed[b]] = torch.tensor(order[used : used + needed[b]], dtype=torch.int32)
        used += needed[b]
        types[b, :length] = types_tensor([prompt(length, images=1 + b % 2, pad=min(b, length // 3))])[0]
        for p in range(length):
            cache[table[b, p // slots], p % slots] = keys[start + p]
        start += length
    return Paged(
        normal((sum(q for q, _ in lengths), heads[0], dim), 2 * seed, dtype, device, 1.5),
        cache.to(device),
        table.to(device),
        torch.tensor([k for _, k in lengths], dtype=torch.int32, device=device),
        types.to(device),
        cumulative([q for q, _ in lengths], device),
        max((q for q, _ in lengths), default=0),
        1 / math.sqrt(dim),
    )


LENGTHS = [(20, 20), (1, 17), (9, 33), (2, 2)]


@pytest.mark.parametrize(
    ("heads", "dim", "slots"),
    [((1, 1), 1, 1), ((4, 1), 7, 3), ((4, 4), 80, 16), ((14, 2), 64, 4), ((2, 2), 128, 64)],
)
def test_paged_shapes(backend, heads, dim, slots, dtype, with_lse):
    case = paged(LENGTHS, heads, dim, slots, dtype, backend.device)
    total = check(backend, case, case.lse() if with_lse else None)
    assert (total > 0).any()


@pytest.mark.parametrize(
    "lengths", [[], [(0, 0)], [(1, 1)], [(0, 5), (3, 3)], [(5, 5), (0, 0), (4, 9)], [(7, 3), (2, 2)]], ids=str
)
@pytest.mark.parametrize("slots", [1, 4])
def test_paged_lengths(backend, lengths, slots):
    case = paged(lengths, slots=slots, device=backend.device)
    check(backend, case)
    check(backend, case, case.lse())


def layouts(cache: Tensor) -> dict[str, Tensor]:
    """The same cache in the layouts of engines: block-major heads, transposed keys, half of an interleaved buffer."""
    blocks, slots, heads, dim = cache.shape
    interleaved = torch.full((blocks, 2, slots, heads, dim), math.nan, dtype=cache.dtype, device=cache.device)
    interleaved[:, 0] = cache
    inner = torch.full((blocks, slots, heads, 2, dim), math.nan, dtype=cache.dtype, device=cache.device)
    inner[..., 1, :] = cache
    return {
        "HND": in_buffer(cache, (0, 2, 1, 3)),
        "transposed": in_buffer(cache, (0, 2, 3, 1)),
        "layers between blocks": in_buffer(cache, (0, 1, 2, 3), margin=2),
        "half of a block": interleaved[:, 0],
        "half of a slot": inner[..., 1, :],
    }


@pytest.mark.parametrize("layout", ["HND", "transposed", "layers between blocks", "half of a block", "half of a slot"])
@pytest.mark.parametrize("slots", [1, 4])
def test_paged_layouts(backend, layout, dtype, slots):
    case = paged(LENGTHS[:3], (4, 2), 24, slots, dtype, backend.device)
    case.k_cache = layouts(case.k_cache)[layout]
    case.q, case.types = in_buffer(case.q), in_buffer(case.types)
    case.table = in_buffer(case.table)
    check(backend, case)


def test_paged_equals_varlen(backend):
    lengths = [(20, 20), (5, 33)]
    case = paged(lengths, (4, 2), 32, 4, device=backend.device)
    rows = [(int(case.table[b, p // 4]), p % 4) for b, (_, n) in enumerate(lengths) for p in range(n)]
    k = torch.stack([case.k_cache[row] for row in rows])
    types = torch.cat([case.types[b, :n] for b, (_, n) in enumerate(lengths)])
    flat = backend.text_vision_scores_varlen(
        case.q, k, types, case.cu_q, cumulative([20, 33], backend.device), 20, 33, case.scale
    )
    got = backend.text_vision_scores_paged(*case.arguments)
    torch.testing.assert_close(got.total[0, :20], flat.total[:20], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(got.peak[1, :33], flat.peak[20:], rtol=2e-5, atol=1e-6)


def test_paged_shared_blocks(backend):
    """Two sequences that share their first block (prefix caching) read the same keys."""
    case = paged([(5, 9), (5, 9)], device=backend.device)
    case.table[1, 0] = case.table[0, 0]
    case.types[1] = case.types[0]
    check(backend, case)


@pytest.mark.parametrize("seq_lens", [[20, 9], [99, 9], [-4, 9], [2**31 - 1, -(2**31)], [0, 0]], ids=str)
@pytest.mark.parametrize("bad_block", [-1, 10**6, -(2**31), 2**31 - 1])
def test_paged_garbage_on_the_device(backend, seq_lens, bad_block):
    """Lengths out of range are clamped; positions in nonexistent blocks are padding, as key and as query."""
    case = paged([(6, 20), (4, 9)], device=backend.device)
    case.k_cache.nan_to_num_(0.5)
    case.table[:, 5:] = 0
    case.table[0, 2] = bad_block
    case.table[1, 2] = bad_block  # position 8, the last row of the second sequence, no query row then
    case.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=backend.device)
    case.k_cache = in_buffer(case.k_cache)
    total = check(backend, case)
    assert np.isfinite(total).all()


def test_paged_backward_rows(backend):
    case = paged([(6, 20), (4, 9)], device=backend.device)
    for cu_q in ([0, 99, 5], [9, 3, 10], [-5, 4, 2**31 - 1]):
        case.cu_q = torch.tensor(cu_q, dtype=torch.int32, device=backend.device)
        case.longest_q = 10
        check(backend, case)


def test_paged_types_wider_than_the_table(backend):
    """max_len may exceed the extent of the table: positions past it are padding."""
    case = paged([(6, 8)], slots=4, device=backend.device)
    case.table = case.table[:, :2].contiguous()
    case.types = torch.full((1, 30), VISION, dtype=torch.uint8, device=backend.device)
    case.types[0, 0], case.types[0, 6:8] = TEXT, QUERY
    case.seq_lens.fill_(30)
    case.types[0, 28:] = QUERY
    check(backend, case)


def test_padding_inside_a_block(backend):
    case = paged([(8, 8)], device=backend.device)
    case.types[0, :8] = types_tensor([[PADDING, TEXT, VISION, PADDING, VISION, QUERY, PADDING, QUERY]])[0].to(
        backend.device
    )
    case.k_cache[case.table[0, 0].long(), 0] = math.nan
    case.k_cache[case.table[0, 0].long(), 3] = math.nan
    total = check(backend, case)
    assert np.isfinite(total).all()
    assert total.any()


@pytest.mark.slow
def test_large(backend, dtype):
    check(backend, packed([(671, 671), (100, 900)], (4, 2), 128, dtype, backend.device))
    check(backend, paged([(671, 671), (100, 900)], (4, 2), 128, 16, dtype, backend.device))


def test_same_bits_every_run(backend, check_same_bits, dtype):
    flat = packed([(60, 90), (1, 33), (20, 20)], (6, 2), 64, dtype, backend.device)
    pages = paged([(60, 90), (1, 33), (20, 20)], (6, 2), 64, 16, dtype, backend.device)
    check_same_bits(lambda: backend.text_vision_scores_varlen(*flat.arguments))
    check_same_bits(lambda: backend.text_vision_scores_paged(*pages.arguments))


# ---------------------------------------------------------------------------------------------- invalid arguments

PACKED_Q = {
    "rank 2": to_shape(9, 32),
    "rank 4": to_shape(1, 9, 4, 8),
    "integers": INT,
    "float64": DOUBLE,
    "last dimension with gaps": with_gaps,
}
CU = {"int64": INT, "rank 2": to_shape(1, 3), "float32": to_dtype(torch.float32)}
PACKED_LSE = {
    "float64": DOUBLE,
    "rows first": to_shape(9, 4),
    "rank 3": to_shape(1, 4, 9),
    "heads of k": to_shape(2, 9),
}
REFUSALS = {
    "text_vision_scores_varlen": {
        "q": PACKED_Q,
        "k": {
            "rank 4": to_shape(1, 14, 2, 8),
            "another head_dim": to_shape(14, 2, 9),
            "heads that do not divide": to_shape(14, 3, 8),
            "no heads": to_shape(14, 0, 8),
            "another dtype": HALF,
            "last dimension with gaps": with_gaps,
        },
        "token_types": {"rank 2": to_shape(2, 14), "another length": to_shape(13), "int64": INT, "gaps": with_gaps},
        "cu_seqlens_q": {**CU, "empty": to_shape(0)},
        "cu_seqlens_k": {**CU, "another batch": to_shape(4)},
        "max_seqlen_q": {"negative": set_to(-1)},
        "max_seqlen_k": {"negative": set_to(-1)},
        "lse": PACKED_LSE,
    },
    "text_vision_scores_paged": {
        "q": PACKED_Q,
        "k_cache": {
            "rank 3": to_shape(7, 2, 8),
            "rank 5": to_shape(7, 1, 4, 2, 8),
            "another head_dim": to_shape(7, 4, 2, 9),
            "heads that do not divide": to_shape(7, 4, 3, 8),
            "blocks without slots": to_shape(7, 0, 2, 8),
            "another dtype": HALF,
        },
        "block_table": {"int64": INT, "rank 1": to_shape(3), "another batch": to_shape(3, 3)},
        "seq_lens": {"int64": INT, "rank 2": to_shape(2, 1), "another batch": to_shape(3)},
        "token_types": {"rank 1": to_shape(9), "another batch": to_shape(3, 9), "int64": INT, "gaps": with_gaps},
        "cu_seqlens_q": {**CU, "empty": to_shape(0)},
        "max_seqlen_q": {"negative": set_to(-1)},
        "lse": PACKED_LSE,
    },
}
