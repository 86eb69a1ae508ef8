# SPDX-License-Identifier: Apache-2.0
"""Between element types and float32. Triton's interpreter has no bfloat16 arithmetic (it works on bits), cuts where it
should round, and loses subnormal values: there, and only there, bits are moved by hand.

For the interpreter other functions are defined, rather than the same ones with a variable to ask. In general, a
function that kernels call gets constants as arguments or holds them as literals: with Triton 3.6 a variable of the
module makes the cache key of a kernel depend on which kernel of the process was compiled first, and the next process
does not find what this one has compiled (tests/backends/test_triton_keys.py).
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl

from . import interpreted


def single(value: float) -> float:
    """The nearest float32: what a kernel gets of a Python float (the interpreter of older Tritons keeps the double)."""
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
