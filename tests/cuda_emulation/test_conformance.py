# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on the emulated kernels in separate processes: under AddressSanitizer, and in other orders.

`make test` also runs it in its own process with race detection, as a backend of tests/ops (see its conftest).
"""

from __future__ import annotations

import pytest

from cuda_emulation import building
from cuda_emulation.suite import passed, run_suite

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))


def test_addresses():
    """A sample of every test's cases; address errors do not depend on the order of the threads."""
    assert passed(run_suite("address", sample=32)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("sanitizer", "seed"), [("address", 1), ("races", 2), ("races", 3)])
def test_everything(sanitizer, seed, capability):
    assert passed(run_suite(sanitizer, sample=1, seed=seed, capability=capability)) > 400
