# SPDX-License-Identifier: Apache-2.0
"""What `bench/check_cuda.py` reads out of the compiled CUDA kernels, one subject a module."""
