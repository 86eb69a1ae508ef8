# SPDX-License-Identifier: Apache-2.0
"""torch's global settings change no bit of a result: default dtype and device, deterministic algorithms, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from mustdrop_kernels.ops.contract import CONTRACTS
from mustdrop_kernels.ops.samples import outcome

from .cases import same_bits
from .sample_calls import sample
from .schemas import OPS


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def precision(value: str) -> AbstractContextManager:
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


def flag(module: Any, name: str, value: Any) -> AbstractContextManager:
    return setting(lambda: getattr(module, name), lambda new: setattr(module, name, new), value)


SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "default device cpu": lambda: torch.device("cpu"),
    "deterministic algorithms": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul precision high": lambda: precision("high"),
    "matmul precision medium": lambda: precision("medium"),
    "TF32": lambda: flag(torch.backends.cuda.matmul, "allow_tf32", True),
    "reduced precision reductions": lambda: flag(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True
    ),
    "bfloat16 inside oneDNN": lambda: flag(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "anomaly mode": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("op", OPS)
def test_results(backend, op):
    def results(context: AbstractContextManager) -> dict[str, torch.Tensor]:
        call, given = getattr(backend, op), sample(op, backend.device)
        given.pop("sizes", None)  # whose default is made by the operator
        with context:
            result = call(**given)
        return outcome(op, given, result)

    want = results(nullcontext())
    for name, context in SETTINGS.items():
        for part, value in results(context()).items():
            assert same_bits(value, want[part]), f"{part} with {name}"


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("op", [op for op, contract in CONTRACTS.items() if contract.gradient])
def test_gradients(backend, op):
    def gradient(context: AbstractContextManager) -> torch.Tensor:
        call, given = getattr(backend, op), sample(op, backend.device)
        x = given.pop("x").requires_grad_()
        with context:
            result = call(x, **given)
            (result if isinstance(result, torch.Tensor) else result[0]).square().sum().backward()
        return x.grad

    want = gradient(nullcontext())
    for name, context in SETTINGS.items():
        if name not in ("inference mode", "no grad"):
            assert same_bits(gradient(context()), want), name
