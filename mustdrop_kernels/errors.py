# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the command line and the code behind it."""

from __future__ import annotations


class Refusal(Exception):
    """The request cannot be served; the message is one sentence for the user."""


def first_line(error: BaseException) -> str:
    """First line of an error's message; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
