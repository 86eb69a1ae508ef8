# SPDX-License-Identifier: Apache-2.0
"""The cases of `mustdrop bench ops` for pytest-benchmark: its statistics, its storage, its comparisons.

Here the candidates run one after another; `mustdrop bench ops` interleaves them, so use its ratios.
"""

from __future__ import annotations

import functools
import gc

import pytest
import torch

from mustdrop_kernels.bench import check
from mustdrop_kernels.bench.cases import Case, Inputs
from mustdrop_kernels.bench.run import Candidate, backend_call, copies_of, default_backends
from mustdrop_kernels.bench.timing import Rotation


@functools.lru_cache(maxsize=1)  # the candidates of a case come one after another
def _copies(case: Case) -> list[Inputs]:
    gc.collect()
    return copies_of(case, case.inputs(), hot=False)


def _ours(case: Case) -> dict[str, torch.Tensor]:
    inputs = case.inputs()
    call = backend_call(case.op, case.device.type, default_backends(case.device.type)[0])
    return case.spec.canonical(call(inputs), inputs)


def test_op(benchmark, case: Case, candidate: Candidate) -> None:
    if candidate.why_not is not None:
        pytest.skip(candidate.why_not)
    benchmark.group = case.label
    with torch.inference_mode():
        call = candidate.call or candidate.baseline.build(case)
        if candidate.kind == "baseline":
            inputs = case.inputs()
            reason = check.difference(case, _ours(case), candidate.canonical(case, call(inputs), inputs))
            assert reason is None, reason
            del inputs
        rotation = Rotation(_copies(case))

        def once() -> None:
            call(rotation.take())
            if case.device.type == "cuda":
                torch.cuda.synchronize()

        benchmark(once)
    benchmark.extra_info.update(bytes=case.work.bytes, flops=case.work.flops, tokens=case.shape.length)
