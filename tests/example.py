# SPDX-License-Identifier: Apache-2.0
"""Operators for tests that need some operator and no particular one: quick to run, each with a benchmark case."""

from __future__ import annotations

QUICK = ("gather_tokens", "select_topk", "select_dual")
