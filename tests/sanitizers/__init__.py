# SPDX-License-Identifier: Apache-2.0
"""The CPU library under sanitizers: through the suite (``variants``), and from plain threads (``threads.cpp``)."""
