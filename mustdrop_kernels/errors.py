# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the command line and of what it calls."""

from __future__ import annotations


class Refusal(Exception):
    """The request cannot be served; the message is one sentence for the user."""
