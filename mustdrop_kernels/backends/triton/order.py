# SPDX-License-Identifier: Apache-2.0
"""Order of all selections, for kernels: higher first, ties to the lower index, NaN last."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_key(x):  # [...] float32
    """Unsigned integer key that ascends with the order: NaN is 0, -0.0 equals +0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, key, 0)


@triton.jit
def kth_key(load: tl.constexpr, args, n, k, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr):
    """The k-th greatest key of the candidates, and the number of equal keys among the k greatest.

    A radix select: four passes over the row, each determines one byte of the key. ``load(args, column, n)`` returns the
    keys of some columns and the mask of candidates; k lies between 1 and the number of candidates.
    """
    digits = tl.arange(0, 256)
    prefix = tl.sum(digits * 0).to(tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, BLOCK if ONE_TILE else n, BLOCK):
            key, candidate = load(args, start + tl.arange(0, BLOCK), n)
            if step > 0:
                candidate = candidate & ((key >> (shift + 8)) == prefix)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=candidate)
        better = tl.sum(histogram) - tl.cumsum(histogram)  # [256]: candidates with a greater digit
        found = (better < k) & (k <= better + histogram)
        prefix = (prefix << 8) | tl.sum(tl.where(found, digits, 0)).to(tl.uint32)
        k -= tl.sum(tl.where(found, better, 0))
    return prefix, k
