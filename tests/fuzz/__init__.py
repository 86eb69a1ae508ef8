# SPDX-License-Identifier: Apache-2.0
"""A differential fuzzer: every operator, every backend of this machine, against the float64 oracle and one another.

A case is a small description of plain JSON values (sizes, layouts, seeds, options). Tensors are built from it in the
same way everywhere, so a case can be shrunk by hypothesis, kept in ``regressions/`` and replayed by a test.

- ``inputs``: tensors from descriptions. ``family``: what the fuzzer needs to know of an operator.
- ``merging``, ``scoring``, ``selecting``, ``moving``: the operators. ``families`` lists them.
- ``players``: who computes a case, here or in a process of its own (``child``).
- ``hunt``: draws cases, compares, shrinks. ``cli``: ``python -m tests.fuzz``, ``make fuzz``.
"""
