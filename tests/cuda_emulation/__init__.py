# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels and their launchers on the host: a backend for the conformance tests on machines without a GPU."""

from .backend import NAME, configure, register
from .build import EmulationError, why_not

__all__ = ["NAME", "EmulationError", "configure", "register", "why_not"]
