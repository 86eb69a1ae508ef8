# SPDX-License-Identifier: Apache-2.0
"""What `tools/check_cuda.py` reads out of the compiled CUDA kernels, one subject a module."""
