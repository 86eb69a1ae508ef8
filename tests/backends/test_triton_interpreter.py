# SPDX-License-Identifier: Apache-2.0
"""Limits of Triton's interpreter: the list, and tests of those that can be tested.

If a newer interpreter lifts a limit, a test here fails: remove the entry and its workaround.
"""

from __future__ import annotations

import pytest
import torch

from mustdrop_kernels.backends import triton as backend

if not backend.interpreted() or backend.version() is None:
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from mustdrop_kernels.backends.triton.numbers import narrow, widen

LIMITS = {
    "bfloat16 arithmetic": "it works on bits: numbers.py has its own conversions there, so Triton's conversion, and "
    "matrix products of bfloat16, run on a GPU only",
    "matrix instructions": "products use NumPy in float32; layouts and the order of sums depend on the compiler",
    "races": "programs and threads run in turn: barriers are checked in the compiled code (test_triton_compile.py)",
    "launches": "the bypass of Triton's argument analysis is not used: see test_triton_launch.py",
    "graphs and streams": "there is no stream: test_triton_host.py checks the host code of a call",
}


@triton.jit
def _double(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, value + value)


@triton.jit
def _to_bfloat16(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def _by_hand(x, out, back, N: tl.constexpr):
    i = tl.arange(0, N)
    rounded = narrow(tl.load(x + i), out.dtype.element_ty)
    tl.store(out + i, rounded)
    tl.store(back + i, widen(rounded))


@triton.jit
def _through_a_table(table, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(out + i, tl.load(x + i))


def test_bfloat16_arithmetic_is_still_a_limit():
    assert "bfloat16 arithmetic" in LIMITS
    x, out = torch.tensor([1.0, -2.5, 3.0, 8.0]).bfloat16(), torch.zeros(4, dtype=torch.bfloat16)
    _double[(1,)](x, out, 4)
    assert not torch.equal(out, x + x)


def test_bfloat16_is_still_truncated():
    x, out = torch.tensor([1.01171875, 2.0, 3.0, 4.0]), torch.zeros(4, dtype=torch.bfloat16)
    _to_bfloat16[(1,)](x, out, 4)
    assert not torch.equal(out, x.bfloat16())


def test_the_workaround_rounds_as_torch_does():
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e-40, 3.4e38, 1.01171875, 1.00390625, 65280.0])
    x = torch.cat([special, torch.randn(246) * 10.0 ** torch.randint(-38, 38, (246,))])
    out, back = torch.zeros(256, dtype=torch.bfloat16), torch.zeros(256)
    _by_hand[(1,)](x, out, back, 256)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_pointers_from_memory_are_no_limit():
    x, out = torch.randn(4), torch.zeros(4)
    _through_a_table[(1,)](torch.tensor([x.data_ptr()]), out, 4)
    assert torch.equal(out, x)
