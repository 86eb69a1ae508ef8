# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels and launchers emulated on the host: a backend for the conformance tests without a GPU."""

from .backend import NAME, configure, configure_for, emulated, library
from .building import EmulationError, why_not

__all__ = ["NAME", "EmulationError", "configure", "configure_for", "emulated", "library", "why_not"]
