# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests: hypothesis profiles, number of threads, a record of the outcomes; the command as a fixture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from record import pytest_configure  # noqa: F401  (a hook)

# CI and `make test` use "repeatable": the same examples each time.
# HYPOTHESIS_PROFILE=explore generates new ones.
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("repeatable", derandomize=True, max_examples=25, **_COMMON)
settings.register_profile("explore", max_examples=300, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# One thread per worker and child process under xdist, so that threads do not share cores. Otherwise two threads, so
# that work is split.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def mustdrop() -> Callable[..., Any]:
    """Runs ``mustdrop`` with these words in this process; returns click's ``Result``."""
    from typer.testing import CliRunner

    from mustdrop_kernels.cli.app import app

    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words], prog_name="mustdrop")
