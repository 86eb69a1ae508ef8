# SPDX-License-Identifier: Apache-2.0
"""gather_tokens, compact_kv_, compact_paged_kv_: every comparison is bit by bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ops import oracle
from ops.cases import as_bytes
from torch import Tensor

from .family import Family
from .inputs import HEAD_DIMS, MOVABLE, SEEDS, Case, integers, laid, laid_in_place, layouts, numbers, random_bits, sizes

HUGE = (2**62, -(2**62), 2**32 + 3, 10**6)


# ---------------------------------------------------------------------------------------------- gather_tokens


@st.composite
def _gathers(draw: st.DrawFn) -> Case:
    trailing = draw(st.lists(st.integers(0, 9), max_size=2))
    if draw(st.booleans()):
        trailing.append(draw(st.sampled_from([1, 16, 33, 64, 128])))
    batch = draw(st.integers(0, 3))
    capacity = draw(st.integers(0, 40))
    return {
        "shape": [batch, draw(st.integers(0, 40)), *trailing],
        "dtype": draw(MOVABLE),
        "layout": draw(layouts(2 + len(trailing), last=bool(trailing))),
        "capacity": capacity,
        "keep_layout": draw(layouts(2)),
        "reach": draw(st.sampled_from([0, 0, 2, 2**40])),  # how far indices exceed the sequence
        "counts": draw(st.lists(st.integers(-3, capacity + 4), min_size=batch, max_size=batch)),
        "align_end": draw(st.booleans()),
        "seed": draw(SEEDS),
    }


def _build_gather(case: Case) -> dict[str, Any]:
    batch, length = case["shape"][:2]
    reach, capacity = case["reach"], case["capacity"]
    x = laid(random_bits(case["shape"], case["seed"], case["dtype"]), case["layout"])
    low, high = -reach, max(length + reach, 1 - reach)
    keep = torch.from_numpy(numbers(case["seed"], 1).integers(low, high, (batch, capacity)))
    return {
        "x": x,
        "keep": laid(keep, case["keep_layout"]),
        "counts": integers(case["counts"], shape=(batch,)),
        "align_end": case["align_end"],
    }


def _rows(x: Tensor) -> np.ndarray:
    """(B, L, ...) -> (B, L, bytes)."""
    return as_bytes(x.reshape(*x.shape[:2], math.prod(x.shape[2:])))


def _check_gather(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    x, keep, counts = arguments["x"], arguments["keep"], arguments["counts"]
    if "want" not in memo:
        memo["want"] = oracle.gather_tokens(_rows(x), keep.numpy(), counts.numpy(), case["align_end"])
    (got,) = answer
    assert got.dtype == x.dtype, f"dtype {got.dtype}"
    assert tuple(got.shape) == (x.shape[0], keep.shape[1], *x.shape[2:]), f"shape {tuple(got.shape)}"
    assert (_rows(got) == memo["want"]).all(), "bits differ from those of the kept tokens"
    return False


# ---------------------------------------------------------------------------------------------- keep sets


@st.composite
def _keep_sets(draw: st.DrawFn, batch: int) -> Case:
    """Keep sets: shared or per layer, for all heads or per head."""
    return {
        "per_layer": draw(st.booleans()),
        "per_head": draw(st.booleans()),
        "capacity": draw(st.integers(0, 70)),
        "share": draw(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])),
        "tail": draw(st.sampled_from([-1, -1, *HUGE, 0])),  # entries past the chosen positions
        "excess": draw(st.sampled_from([0, 0, 0, 3, 10**9])),  # counts beyond the chosen positions
        "rubbish": draw(st.integers(0, 9)) == 0,  # any indices in any order: only the outside is compared
        "seed": draw(SEEDS),
    }


def _build_keep(described: Case, layer: int, batch: int, heads: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """keep (B, K) or (B, Hk, K), counts (B) or (B, Hk); positions are below each sequence's length."""
    rng = numbers(described["seed"], layer)
    lead = (batch, heads) if described["per_head"] else (batch,)
    capacity = described["capacity"]
    keep = np.full((*lead, capacity), described["tail"], dtype=np.int64)
    counts = np.zeros(lead, dtype=np.int64)
    for place in np.ndindex(*lead):
        length = lengths[place[0]]
        chosen = min(capacity, length, int(rng.integers(0, int(described["share"] * length) + 1)))
        keep[place][:chosen] = np.sort(rng.permutation(length)[:chosen])
        # A tail of zeros does not ascend: counts must not exceed the chosen positions then.
        counts[place] = chosen + (described["excess"] if described["tail"] != 0 else 0)
    if described["rubbish"]:
        keep = rng.choice(np.array([*HUGE, -1, 0, 1, 2, 3, 5, 8, 13, 40, 70]), keep.shape)
        counts = rng.choice(np.array([-5, 0, 1, 4, capacity, 2**31 - 1, -(2**31)]), counts.shape)
    return torch.from_numpy(keep), torch.from_numpy(counts.astype(np.int32))


# ---------------------------------------------------------------------------------------------- compact_kv_


@st.composite
def _compactions(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(0, 3))
    layers = draw(st.sampled_from([1, 1, 2, 3]))
    long = sizes(0, 63, 65, 128, 200)
    interleaved = draw(st.sampled_from([None, None, "batch", "slot", "element"]))
    one_length = draw(long)
    return {
        "shape": [batch, draw(st.integers(0, 3)), one_length],
        "lengths": [draw(long) if draw(st.integers(0, 3)) == 0 else one_length for _ in range(layers)],
        "dims": [draw(HEAD_DIMS) for _ in range(2)],
        "dtype": draw(MOVABLE),
        "layout": draw(layouts(4)),
        "interleaved": interleaved,
        "keep": draw(_keep_sets(batch)),
        "align_end": draw(st.booleans()),
        "seed": draw(SEEDS),
    }


def _pair(shape: list[int], dims: list[int], seed: int, dtype: str, layout: Case | None, interleaved: str | None):
    """Keys and values of a layer; views of one buffer if they are interleaved."""
    if interleaved is None:
        return tuple(laid_in_place([*shape, dim], seed + i, dtype, layout) for i, dim in enumerate(dims))
    dim = dims[0]
    if interleaved == "batch":
        both = random_bits([shape[0], 2, *shape[1:], dim], seed, dtype)
        return both[:, 0], both[:, 1]
    if interleaved == "slot":
        both = random_bits([*shape, 2, dim], seed, dtype)
        return both[..., 0, :], both[..., 1, :]
    both = random_bits([*shape, dims[0] + dims[1]], seed, dtype)
    return both[..., : dims[0]], both[..., dims[0] :]


def _build_compaction(case: Case) -> dict[str, Any]:
    batch, heads, _ = case["shape"]
    keys, values, keep, counts = [], [], [], []
    for layer, length in enumerate(case["lengths"]):
        seed = case["seed"] + 2 * layer
        key, value = _pair(
            [batch, heads, length], case["dims"], seed, case["dtype"], case["layout"], case["interleaved"]
        )
        keys.append(key)
        values.append(value)
        if layer == 0 or case["keep"]["per_layer"]:
            # One set for layers of different length: positions are within the shortest one.
            longest = length if case["keep"]["per_layer"] else min(case["lengths"])
            k, c = _build_keep(case["keep"], layer, batch, heads, [longest] * batch)
            keep.append(k)
            counts.append(c)
    return {"keys": keys, "values": values, "keep": keep, "counts": counts, "align_end": case["align_end"]}


def _check_compaction(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    caches = [*arguments["keys"], *arguments["values"]]
    _same_form(caches, answer)
    if _unspecified(case):
        return False
    if "want" not in memo:
        memo["want"] = [
            oracle.compact_kv(as_bytes(t), *_set_of(arguments, i), case["align_end"]) for i, t in enumerate(caches)
        ]
    _same_bytes(memo["want"], answer)
    return False


def _unspecified(case: Case) -> bool:
    """True if only memory outside of the caches is compared.

    The contents are unspecified for sets that do not ascend, or that end in invalid positions, so that with
    `align_end` the others would not all move towards the end.
    """
    keep = case["keep"]
    return keep["rubbish"] or (case["align_end"] and keep["excess"] > 0 and keep["tail"] != 0)


def _set_of(arguments: dict[str, Any], cache: int) -> tuple[np.ndarray, np.ndarray]:
    shared = len(arguments["keep"]) == 1
    layer = 0 if shared else cache % len(arguments["keys"])
    return arguments["keep"][layer].numpy(), arguments["counts"][layer].numpy()


def _same_form(caches: list[Tensor], answer: list[Tensor]) -> None:
    assert len(answer) == len(caches), f"{len(answer)} caches"
    for i, (old, new) in enumerate(zip(caches, answer, strict=True)):
        assert new.dtype == old.dtype, f"cache {i}: {new.dtype}"
        assert new.shape == old.shape, f"cache {i}: {tuple(new.shape)}"


def _same_bytes(wanted: list[tuple[np.ndarray, np.ndarray]], answer: list[Tensor]) -> None:
    for i, ((want, told), new) in enumerate(zip(wanted, answer, strict=True)):
        assert (as_bytes(new) == want)[told].all(), f"cache {i}: a specified slot holds something else"


# ---------------------------------------------------------------------------------------------- compact_paged_kv_


@st.composite
def _paged_compactions(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 40), max_size=3))
    return {
        "lengths": lengths,
        "slots": draw(st.sampled_from([*range(1, 10), 16])),
        "heads": draw(st.integers(0, 3)),
        "layers": draw(st.sampled_from([1, 1, 2, 3])),
        "dims": [draw(HEAD_DIMS) for _ in range(2)],
        "dtype": draw(MOVABLE),
        "layout": draw(layouts(4, last=False)),
        "interleaved": draw(st.sampled_from([None, None, "batch", "slot", "element"])),
        "keep": draw(_keep_sets(len(lengths))),
        "spare": draw(st.integers(0, 3)),
        "bad_blocks": draw(st.lists(st.sampled_from([-1, 10**6, -(2**31), 2**31 - 1]), max_size=2)),
        "bad_ends": draw(st.integers(0, 9)) == 0,  # seq_lens of any value: only the outside is compared
        "align_end": draw(st.booleans()),
        "seed": draw(SEEDS),
    }


def _build_paged(case: Case) -> dict[str, Any]:
    slots, heads, lengths = case["slots"], case["heads"], case["lengths"]
    rng = numbers(case["seed"], 7)
    needed = [-(-n // slots) for n in lengths]
    blocks = sum(needed) + case["spare"]
    order = rng.permutation(blocks)
    table = np.full((len(lengths), max(needed, default=0) + 1), -9, dtype=np.int64)
    used = 0
    for b, n in enumerate(needed):
        table[b, :n] = order[used : used + n]
        used += n
    for bad in case["bad_blocks"]:
        if table.size:
            table[tuple(rng.integers(0, table.shape))] = bad
    keys, values, keep, counts = [], [], [], []
    for layer in range(case["layers"]):
        seed = case["seed"] + 2 * layer
        key, value = _pair(
            [blocks, slots, heads], case["dims"], seed, case["dtype"], case["layout"], case["interleaved"]
        )
        keys.append(key)
        values.append(value)
        if layer == 0 or case["keep"]["per_layer"]:
            k, c = _build_keep(case["keep"], layer, len(lengths), heads, lengths)
            keep.append(k)
            counts.append(c)
    ends = rng.choice(np.array([-(2**31), -1, 0, 5, 200, 2**31 - 1]), len(lengths)) if case["bad_ends"] else lengths
    return {
        "keys": keys,
        "values": values,
        "block_table": torch.from_numpy(table.astype(np.int32)),
        "keep": keep,
        "counts": counts,
        "seq_lens": integers([int(n) for n in ends], shape=(len(lengths),)) if case["align_end"] else None,
        "align_end": case["align_end"],
    }


def _check_paged(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    caches = [*arguments["keys"], *arguments["values"]]
    _same_form(caches, answer)
    if _unspecified(case) or (case["bad_ends"] and case["align_end"]):
        return False
    if "want" not in memo:
        ends = arguments["seq_lens"].numpy() if case["align_end"] else None
        table = arguments["block_table"].numpy()
        memo["want"] = [
            oracle.compact_paged_kv(as_bytes(t), table, *_set_of(arguments, i), ends, case["align_end"])
            for i, t in enumerate(caches)
        ]
    _same_bytes(memo["want"], answer)
    return False


FAMILIES = (
    Family("gather_tokens", _gathers(), _build_gather, _check_gather),
    Family("compact_kv_", _compactions(), _build_compaction, _check_compaction, ("keys", "values")),
    Family("compact_paged_kv_", _paged_compactions(), _build_paged, _check_paged, ("keys", "values")),
)
