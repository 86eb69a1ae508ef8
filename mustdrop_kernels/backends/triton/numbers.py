# SPDX-License-Identifier: Apache-2.0
"""Conversions between element types and float32. Triton's interpreter has no bfloat16 arithmetic (it works on bits),
truncates instead of rounding, and loses subnormal values; in the interpreter only, conversions are done on the bits.

The interpreter gets functions of its own instead of a branch on a module variable. In general, device functions take
constants as arguments or literals: with Triton 3.6 a module variable makes a kernel's cache key depend on the first
kernel that the process compiled, so that another process misses the cache (tests/backends/test_triton_keys.py).
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl

from . import interpreted


def single(value: float) -> float:
    """The nearest float32, as a kernel receives a Python float (the interpreter of older Tritons keeps the double)."""
    return ctypes.c_float(value).value


if interpreted():

    @triton.jit
    def widen(x):  # [...] float32, float16 or bfloat16 -> float32
        """The same value in float32."""
        if x.dtype == tl.bfloat16:
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return x.to(tl.float32)

    @triton.jit
    def narrow(x, dtype: tl.constexpr):  # [...] float32 -> dtype
        """Rounded to the nearest, ties to even."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
            return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def dot(a, b, acc):  # [M, K], [K, N], [M, N] float32 -> [M, N] float32
        """acc + a b, products of float32 in float32."""
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")

else:

    @triton.jit
    def widen(x):  # [...] float32, float16 or bfloat16 -> float32
        """The same value in float32."""
        return x.to(tl.float32)

    @triton.jit
    def narrow(x, dtype: tl.constexpr):  # [...] float32 -> dtype
        """Rounded to the nearest, ties to even."""
        return x.to(dtype)

    @triton.jit
    def dot(a, b, acc):  # [M, K], [K, N], [M, N] float32 -> [M, N] float32
        """acc + a b, products of float32 in float32."""
        return tl.dot(a, b, acc, input_precision="ieee")
