# SPDX-License-Identifier: Apache-2.0
"""In-place compaction of dense and paged KV caches (MustDrop, stage 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import overlap
from .checks import Checker
from .contract import Call, define
from .dispatch import call

__all__ = ["compact_kv_", "compact_paged_kv_"]


def compact_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    align_end: bool = False,
    backend: str | None = None,
) -> None:
    """Compact the KV caches of all layers to the kept tokens, in place and in one call.

    MustDrop (arXiv 2411.10803), stage 3, output-aware cache. Slot i < counts takes the contents of slot keep[i]; slots
    past counts are unspecified. No second cache is allocated.

    Args:
        keys: per layer (B, Hk, L, D) of any dtype; L may differ between layers. A view serves a cache (B, L, Hk, D).
        values: per layer, like its key, with a head_dim of its own.
        keep: one tensor for all layers or one per layer: (B, K) int64, or (B, Hk, K) to select per head; ascending
            positions. A position outside the sequence is skipped.
        counts: one tensor for each of ``keep``: (B) or (B, Hk) int32.
        align_end: move the kept tokens to the last slots, L - counts .. L - 1, instead.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value, caches share memory with each other
            or with another argument, or a cache requires a gradient; the message names it. The caches are unchanged.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    args = (list(keys), list(values), list(keep), list(counts))
    call("compact_kv_", backend, *args, align_end=align_end)


def compact_paged_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    block_table: Tensor,
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    seq_lens: Tensor | None = None,
    align_end: bool = False,
    backend: str | None = None,
) -> None:
    """Compact the paged KV caches of all layers to the kept tokens, in place and in one call.

    MustDrop (arXiv 2411.10803), stage 3, output-aware cache. Position p of sequence b is at slot p % page_size of block
    block_table[b, p // page_size], with page_size = keys[0].shape[1]. Position i < counts takes the contents of
    position keep[i]. Blocks past ceil(counts / page_size) are free afterwards.

    Args:
        keys: per layer (blocks, page_size, Hk, D) of any dtype and any strides. The layouts of engines are views: NHD,
            HND, a token pool (page_size 1).
        values: per layer, like its key, with a head_dim of its own.
        block_table: (B, max_blocks) int32. It must not list blocks that other sequences share. Blocks outside the
            cache are skipped.
        keep: one tensor for all layers or one per layer: (B, K) int64, or (B, Hk, K) to select per head; ascending
            positions in the sequence. A position outside the cache is skipped.
        counts: one tensor for each of ``keep``: (B) or (B, Hk) int32.
        seq_lens: (B) int32, number of cached tokens of each sequence; required with ``align_end``.
        align_end: move the kept tokens to the last positions, seq_lens - counts .. seq_lens - 1, instead. Where the
            number d of dropped tokens is a multiple of page_size, the leading d / page_size blocks are free afterwards,
            and decoding continues with a block table without them and with seq_lens - d.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value, caches share memory with each other
            or with another argument, or a cache requires a gradient; the message names it. The caches are unchanged.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    args = (list(keys), list(values), block_table, list(keep), list(counts))
    call("compact_paged_kv_", backend, *args, seq_lens=seq_lens, align_end=align_end)


def _check_dense(a: Call) -> None:
    like = a.keys[0] if a.keys else (a.values[0] if a.values else torch.empty(0, device="cpu"))
    check = Checker(a, like)
    _check_caches(check, a, ("B", "Hk", "L", "D"), 1, any_strides=False)
    _check_lengths(check, a)
    if a.keys:
        _check_keep(check, a, a.keys[0].shape[0], [k.shape[1] for k in a.keys])
        _check_disjoint(check, a)


def _check_paged(a: Call) -> None:
    check = Checker(a, a.block_table)
    _check_caches(check, a, ("blocks", "page_size", "Hk", "D"), 2, any_strides=True)
    check.tensor("block_table", a.block_table, ("B", "max_blocks"), (torch.int32,))
    batch = a.block_table.shape[0]
    check(a.seq_lens is not None or not a.align_end, "seq_lens", "must be given with align_end")
    if a.seq_lens is not None:
        check.tensor("seq_lens", a.seq_lens, (batch,), (torch.int32,), any_strides=True)
    _check_lengths(check, a)
    if a.keys:
        check.at_least("keys[0]", a.keys[0].shape[1], 1)
        _check_keep(check, a, batch, [k.shape[2] for k in a.keys])
        _check_disjoint(check, a)


def _check_caches(check: Checker, a: Call, shape: Sequence[str], shared: int, any_strides: bool) -> None:
    """Check pairs of caches: 4-D, equal except for head_dim, not expanded; layers agree in ``shared`` dimensions."""
    keys, values = a.keys, a.values
    check(len(values) == len(keys), "values", f"must hold as many tensors as keys ({len(keys)}), got {len(values)}")
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        check.tensor(f"keys[{i}]", key, (*shape[:-1], "D"), any_strides=any_strides)
        check.tensor(f"values[{i}]", value, (*key.shape[:3], "D"), any_strides=any_strides)
        for d in range(shared):
            same = key.shape[d] == keys[0].shape[d]
            check(same, f"keys[{i}]", f"must agree with keys[0] in {shape[d]}, got {tuple(key.shape)}")
        for argument, t in ((f"keys[{i}]", key), (f"values[{i}]", value)):
            distinct = all(n <= 1 or s != 0 for n, s in zip(t.shape, t.stride(), strict=True)) or t.numel() == 0
            check(distinct, argument, f"must not be expanded (stride 0), got strides {t.stride()}")


def _check_lengths(check: Checker, a: Call) -> None:
    """Check the lengths of the lists of keep sets: one set for all layers or one per layer."""
    keep, counts, layers = a.keep, a.counts, len(a.keys)
    ok = len(keep) in (1, layers)
    check(ok, "keep", f"must hold one tensor or one per layer ({layers}), got {len(keep)}")
    check(len(counts) == len(keep), "counts", f"must hold as many tensors as keep ({len(keep)}), got {len(counts)}")


def _check_keep(check: Checker, a: Call, batch: int, heads: Sequence[int]) -> None:
    """Check keep sets, each (B, K) with (B) or (B, Hk, K) with (B, Hk)."""
    keep, counts = a.keep, a.counts
    for i, (indices, count) in enumerate(zip(keep, counts, strict=True)):
        served = heads if len(keep) == 1 else heads[i : i + 1]
        ok = indices.dim() in (2, 3)
        check(ok, f"keep[{i}]", f"must be (B, K) or (B, Hk, K), got {tuple(indices.shape)}")
        leading = (batch,) if indices.dim() == 2 else (batch, served[0])
        check.tensor(f"keep[{i}]", indices, (*leading, "K"), (torch.int64,))
        check.tensor(f"counts[{i}]", count, leading, (torch.int32,), any_strides=True)
        if indices.dim() == 3:
            same = all(h == served[0] for h in served)
            check(same, f"keep[{i}]", f"must be (B, K) where layers differ in heads, got {tuple(indices.shape)}")


def _check_disjoint(check: Checker, a: Call) -> None:
    """Check that caches do not share memory with one another or with index tensors.

    Tensors without an address (symbolic ones) are checked by the kernel.
    """
    claims = list(_claims(a))
    if all(overlap.has_address(t) for _, t, _ in claims):
        for argument, wrong in overlap.conflicts(claims):
            check(False, argument, wrong)


def _claims(a: Call) -> Iterator[overlap.Claim]:
    for name in ("keys", "values", "block_table", "keep", "counts", "seq_lens"):
        given = getattr(a, name, None)
        if isinstance(given, Tensor):
            yield name, given, False
        else:
            yield from ((f"{name}[{i}]", t, name in ("keys", "values")) for i, t in enumerate(given or ()))


def _fake(a: Call) -> None:
    return None


define(compact_kv_, _check_dense, _fake, writes=("keys", "values"))
define(compact_paged_kv_, _check_paged, _fake, writes=("keys", "values"))
