# SPDX-License-Identifier: Apache-2.0
"""Differential fuzzer: every operator on every backend of this machine, against the float64 oracle and each other.

A case is a small description of plain JSON values (sizes, layouts, seeds, options). Tensors are built from it
deterministically, so a case can be shrunk by hypothesis, stored in ``regressions/`` and replayed by a test.

- ``inputs``: tensors from descriptions. ``family``: the fuzzer's interface of an operator.
- ``merging``, ``scoring``, ``selecting``, ``moving``: the operators. ``dropping``: drop_tokens on tiny models, whose
  oracle is the masked reference. ``families`` lists them.
- ``runners``: the backends under test, in this process or in a child process (``child``).
- ``search``: generates cases, compares, shrinks. ``cli``: ``python -m tests.fuzz``, ``make fuzz``.
"""
