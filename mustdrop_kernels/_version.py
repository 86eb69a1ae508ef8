# SPDX-License-Identifier: Apache-2.0
"""Version of the package, below everything that reports it."""

__version__ = "0.1.0"
