# SPDX-License-Identifier: Apache-2.0
"""Analyses of compiled CUDA kernels for `tools/check_cuda.py`, one subject a module."""
