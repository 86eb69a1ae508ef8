# SPDX-License-Identifier: Apache-2.0
"""Options of the pytest-benchmark suites: shapes, dtypes, device and backends. `make bench` runs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mustdrop_kernels.bench.cases import CASES, Case
from mustdrop_kernels.bench.run import Candidate, Options, candidates, default_backends, plan
from mustdrop_kernels.bench.shapes import parse_shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mustdrop")
    group.addoption("--shapes", default="llava-1.5", help="as in mustdrop bench ops")
    group.addoption("--dtypes", default="float32", help="float32, bfloat16, float16, with commas between")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--backends", help="default: the one that serves the device")
    group.addoption("--compiled", action="store_true", help="with the baselines that torch.compile makes")
    group.addoption("--threads", type=int)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def _candidates(config: pytest.Config) -> Iterator[tuple[Case, Candidate]]:
    device = torch.device(config.getoption("--bench-device"))
    chosen = config.getoption("--backends")
    shapes = tuple(parse_shapes(config.getoption("--shapes")))
    dtypes = tuple(getattr(torch, name) for name in config.getoption("--dtypes").split(","))
    backends = tuple(chosen.split(",")) if chosen else default_backends(device.type)
    quick = not config.getoption("--compiled")
    options = Options(tuple(CASES), shapes, dtypes, device, backends, quick=quick)
    for case in dict.fromkeys(plan(options)):
        yield from ((case, one) for one in candidates(case, options))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "candidate" in metafunc.fixturenames:
        found = list(_candidates(metafunc.config))
        ids = [f"{case.label}-{one.name}".replace(" ", "-") for case, one in found]
        metafunc.parametrize(("case", "candidate"), found, ids=ids)
