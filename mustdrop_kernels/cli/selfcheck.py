# SPDX-License-Identifier: Apache-2.0
"""A tiny input for each operator, run on every backend that serves it and compared with the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops

YARDSTICK = "reference"
_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 results; a wrong kernel is off by far more

Outcome = tuple[tuple[str, Tensor], ...]


@dataclass(frozen=True)
class Check:
    """What one operator did on one backend and device."""

    op: str
    device: str
    backend: str
    status: str
    """"passes", "differs" or "fails"."""
    detail: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Plain JSON types."""
        return asdict(self)


class _Inputs:
    """Two sequences of 12 positions (the second padded on the left), 4 query heads on 2 key heads of 8, 4x4 patches."""

    scale = 8**-0.5

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        def integers(rows: Any, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(rows, dtype=dtype, device=device)

        self.patches = normal(2, 17, 8)  # (B, 1+N, C)
        # The first window's patches look alike: it merges by threshold.
        self.patches[:, [1, 2, 5, 6]] = self.patches[:, 1:2] + 0.01 * self.patches[:, [1, 2, 5, 6]]
        self.q = normal(2, 4, 12, 8)  # (B, Hq, L, D)
        self.k = normal(2, 2, 12, 8)  # (B, Hk, L, D)
        self.types = integers([[1, 1] + [2] * 7 + [3] * 3, [0, 0, 1] + [2] * 6 + [3] * 3], torch.uint8)  # (B, L)
        self.protected = self.types.new_zeros(2, 12, dtype=torch.bool)  # (B, L)
        self.protected[:, 4] = True
        self.cu_seqlens = integers([0, 12, 24])  # (B+1)
        self.block_table = integers([[4, 0, 2], [1, 5, 3]])  # (B, max_blocks)
        self.seq_lens = integers([12, 12])  # (B)
        self.keep = integers([[0, 3, 5, 11], [2, 4, 9, -1]], torch.int64)  # (B, K)
        self.counts = integers([4, 3])  # (B)

    def packed(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (B*L, H, D)."""
        return x.transpose(1, 2).flatten(0, 1)

    def paged(self) -> Tensor:
        """The keys in blocks of 4 slots: (blocks, slots, Hk, D)."""
        cache = self.k.new_zeros(6, 4, 2, 8)
        blocks = self.k.transpose(1, 2).reshape(2, 3, 4, 2, 8)
        cache[self.block_table.long()] = blocks
        return cache


def _named(result: Any) -> Outcome:
    if isinstance(result, Tensor):
        return (("result", result),)
    return tuple(zip(result._fields, result, strict=True))


def _compacted(backend: str, given: _Inputs) -> Outcome:
    keys, values = given.k.clone(), given.k.neg()
    ops.compact_kv_([keys], [values], [given.keep], [given.counts], backend=backend)
    return tuple(
        (f"{name} of sequence {b}", cache[b, :, :count])
        for name, cache in (("keys", keys), ("values", values))
        for b, count in enumerate(given.counts.tolist())
    )


def _compacted_paged(backend: str, given: _Inputs) -> Outcome:
    keys, values = given.paged(), given.paged().neg()
    ops.compact_paged_kv_([keys], [values], given.block_table, [given.keep], [given.counts], backend=backend)
    return tuple(
        (f"{name} of sequence {b}", cache[given.block_table[b].long()].flatten(0, 1)[:count])
        for name, cache in (("keys", keys), ("values", values))
        for b, count in enumerate(given.counts.tolist())
    )


def _scores(given: _Inputs) -> ops.Scores:
    return ops.text_vision_scores(given.q, given.k, given.types, given.scale, backend=YARDSTICK)


# op -> (backend, inputs) -> named results
_CASES: dict[str, Callable[[str, _Inputs], Outcome]] = {
    "spatial_merge": lambda b, i: _named(ops.spatial_merge(i.patches, (4, 4), (2, 2), 0.8, backend=b)),
    "cls_attention": lambda b, i: _named(ops.cls_attention(i.q[:, :2, 0], i.k, i.scale, backend=b)),
    "text_vision_scores": lambda b, i: _named(ops.text_vision_scores(i.q, i.k, i.types, i.scale, backend=b)),
    "text_vision_scores_varlen": lambda b, i: _named(
        ops.text_vision_scores_varlen(
            i.packed(i.q), i.packed(i.k), i.types.flatten(), i.cu_seqlens, i.cu_seqlens, 12, 12, i.scale, backend=b
        )
    ),
    "text_vision_scores_paged": lambda b, i: _named(
        ops.text_vision_scores_paged(
            i.packed(i.q), i.paged(), i.block_table, i.seq_lens, i.types, i.cu_seqlens, 12, i.scale, backend=b
        )
    ),
    "text_vision_attention": lambda b, i: _named(ops.text_vision_attention(i.q, i.k, i.types, i.scale, 3, backend=b)),
    "select_dual": lambda b, i: _named(
        ops.select_dual(*_scores(i), i.types, 0.14, 0.2, protected=i.protected, backend=b)
    ),
    "select_topk": lambda b, i: _named(ops.select_topk(_scores(i).total, i.types, 3, protected=i.protected, backend=b)),
    "dual_attention_select": lambda b, i: _named(
        ops.dual_attention_select(i.q, i.k, i.types, i.scale, 0.14, 0.2, protected=i.protected, backend=b)
    ),
    "topk_attention_select": lambda b, i: _named(
        ops.topk_attention_select(i.q, i.k, i.types, i.scale, 3, protected=i.protected, backend=b)
    ),
    "gather_tokens": lambda b, i: _named(ops.gather_tokens(i.patches, i.keep, i.counts, backend=b)),
    "compact_kv_": _compacted,
    "compact_paged_kv_": _compacted_paged,
}


def _difference(found: Outcome, expected: Outcome) -> str | None:
    """The first result that is not the reference's, None where all are."""
    for (name, value), (_, wanted) in zip(found, expected, strict=True):
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            return f"{name} is {tuple(value.shape)} {value.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
        if wanted.is_floating_point():
            if not torch.allclose(value, wanted, **_TOLERANCE, equal_nan=True):
                return f"{name} is off by up to {(value - wanted).abs().max().item():.2g}"
        elif not torch.equal(value, wanted):
            return f"{name} is {value.tolist()}, not {wanted.tolist()}"
    return None


def check(op: str, device: str, backend: str) -> Check:
    """Run one operator on one backend. Never raises: what goes wrong is the result."""
    try:
        expected = _CASES[op](YARDSTICK, _Inputs(device))
        found = _CASES[op](backend, _Inputs(device))
        difference = _difference(found, expected)
    except Exception as error:
        return Check(op, device, backend, "fails", f"{type(error).__name__}: {error}".splitlines()[0])
    return Check(op, device, backend, "passes" if difference is None else "differs", difference)


def check_all(device: str) -> list[Check]:
    """Every operator on every backend that serves it on this device."""
    checks = []
    for op in backends.OPS:
        for name, backend in backends.registered().items():
            try:
                serves = backend.why_not(op, device) is None
            except Exception as error:
                checks.append(Check(op, device, name, "fails", f"why_not: {type(error).__name__}: {error}"))
                continue
            if serves and name != YARDSTICK:
                checks.append(check(op, device, name))
    return checks
