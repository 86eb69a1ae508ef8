# SPDX-License-Identifier: Apache-2.0
"""Layers that run eagerly beside a compiled model have vLLM's own kernels."""

from __future__ import annotations

import contextlib
import types

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import engines  # noqa: F401 - sets vLLM's environment
import torch
from engines import ASKS, PLANS, engine, generate
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.ir.op import IrOp
from vllm.model_executor.custom_op import CustomOp

from mustdrop_kernels.integrations.vllm import eager_kernels
from mustdrop_kernels.integrations.vllm.eager_kernels import EagerKernels


@CustomOp.register("mustdrop_test_add")
class Add(CustomOp):
    """Its kernel has another result than its plain code."""

    def forward_native(self, x):
        return x + 1

    def forward_cpu(self, x):
        return x + 2


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    platform = types.SimpleNamespace(is_cpu=lambda: False, import_ir_kernels=lambda: None)
    monkeypatch.setattr(eager_kernels, "current_platform", platform)


def block(custom_ops):
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=custom_ops))):
        layers = torch.nn.Sequential(Add(), torch.nn.Identity(), Add())
        return layers, EagerKernels(layers)


def test_kernels_run_inside_the_block(as_on_a_gpu):
    layers, kernels = block(["none"])
    assert layers(0) == 2
    with contextlib.suppress(ZeroDivisionError), kernels.enabled():
        assert layers(0) == 4
        raise ZeroDivisionError
    assert layers(0) == 2


def test_kernels_that_are_enabled_stay(as_on_a_gpu):
    layers, kernels = block(["all"])
    assert kernels._modules == []
    with kernels.enabled():
        assert layers(0) == 4


def test_kernels_of_the_ir_come_first(as_on_a_gpu, monkeypatch):
    """An operator with a kernel, one without, and one whose kernel comes first already."""
    chosen = {}

    class Op:
        def __init__(self, name, providers, priority):
            self.name, self.providers, self.priority = name, providers, priority

        def supported_providers(self):
            return self.providers

        def get_priority(self):
            return self.priority

        @contextlib.contextmanager
        def set_priority(self, priority):
            chosen[self.name] = priority
            yield
            del chosen[self.name]

    ops = [Op("norm", ["native", "vllm_c"], ["native"]), Op("add", ["native"], ["native"])]
    ops.append(Op("fused", ["native", "vllm_c"], ["vllm_c", "native"]))
    monkeypatch.setattr(IrOp, "registry", {op.name: op for op in ops})
    with block(["none"])[1].enabled():
        assert chosen == {"norm": ["vllm_c", "native"]}
    assert chosen == {}


def test_dropping_steps_of_a_compiled_model(checkpoint, transformers_of, monkeypatch):
    """The kernels are enabled while their layers run, and disabled in all other steps."""
    entered, states = EagerKernels.enabled, []

    @contextlib.contextmanager
    def recorded(self):
        with entered(self):
            states.append("eager")
            yield
        states.append("compiled")

    monkeypatch.setattr(EagerKernels, "enabled", recorded)
    plan = PLANS["all stages"]
    expected = [transformers_of.generate(ask, plan, 8)[0] for ask in ASKS]
    with engine(checkpoint, plan, enforce_eager=False) as llm:
        assert generate(llm, ASKS, 8) == expected
    assert states == ["eager", "compiled"]
