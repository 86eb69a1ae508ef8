# SPDX-License-Identifier: Apache-2.0
"""Accuracy of dropping: questions about pictures, methods, scoring."""

FULL = "full"
"""Name of the method that keeps all tokens."""
