# SPDX-License-Identifier: Apache-2.0
"""Durations, sizes and factors as text."""

from __future__ import annotations


def duration(us: float) -> str:
    """Three digits, in a unit that fits: "85.1 us", "1.24 ms"."""
    for limit, unit, factor in ((1e3, "us", 1.0), (1e6, "ms", 1e-3), (float("inf"), "s", 1e-6)):
        if us < limit:
            return f"{us * factor:.3g} {unit}" if us * factor < 100 else f"{us * factor:.0f} {unit}"
    raise AssertionError


def size(count: float | None) -> str:
    """Bytes, in a unit that fits."""
    if count is None:
        return ""
    for limit, unit in ((1e3, "B"), (1e6, "kB"), (1e9, "MB")):
        if count < limit:
            return f"{count / limit * 1e3:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"


def factor(value: float) -> str:
    """Two digits from 10 on, two decimals below."""
    return f"{value:.0f}x" if value >= 10 else f"{value:.2f}x"
