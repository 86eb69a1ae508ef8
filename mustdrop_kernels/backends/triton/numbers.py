# SPDX-License-Identifier: Apache-2.0
"""Between element types and float32. Triton's interpreter has no bfloat16 arithmetic (it works on bits), cuts where it
should round, and loses subnormal values: there, and only there, bits are moved by hand."""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl

from . import interpreted

_INTERPRETED = tl.constexpr(interpreted())


def single(value: float) -> float:
    """The nearest float32: what a kernel gets of a Python float (the interpreter of older Tritons keeps the double)."""
    return ctypes.c_float(value).value


@triton.jit
def widen(x):  # [...] float32, float16 or bfloat16 -> float32
    """The same value in float32."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):  # [...] float32 -> dtype
    """Rounded to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):  # [M, K], [K, N], [M, N] float32 -> [M, N] float32
    """acc + a b, products of float32 in float32."""
    if _INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
