# SPDX-License-Identifier: Apache-2.0
"""drop_tokens gives the same results whatever torch's defaults are: dtype, device, deterministic algorithms."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from ops.test_defaults import SETTINGS
from test_families import FAMILIES, assert_same_bits, configs, generate, inputs_of, model_of

import mustdrop_kernels
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

PACKAGE = Path(mustdrop_kernels.__file__).parent
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros"}
OF_MODELS = (
    "integrations",
    "ops",
    "plans",
    "report",
    "backends/reference",
    "stages.py",
    "placeholders.py",
    "parallel.py",
)


DEFAULTS = ("default dtype float64", "default device meta", "deterministic algorithms")


def results(model, inputs, config=None):
    context = contextlib.nullcontext() if config is None else drop_tokens(model, config)
    with torch.no_grad(), context as report:
        output, logits = generate(model, inputs), model(**inputs).logits
    return output, logits, None if report is None else report.last.to_dict()


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_torch_defaults(name, default):
    model, inputs = model_of(name), inputs_of(name)
    plain = results(model, inputs)
    try:
        with SETTINGS[default]():
            assert_same_bits(results(model, inputs)[0], plain[0])
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"plain generation: {error}")
    for settings in configs(name).values():
        config = MustDropConfig(**settings)
        output, logits, report = results(model, inputs, config)
        with SETTINGS[default]():
            again = results(model, inputs, config)
        assert_same_bits(again[0], output)
        assert torch.equal(again[1], logits)
        assert {**again[2], "milliseconds": {}} == {**report, "milliseconds": {}}


def test_every_new_tensor_names_its_device():
    """So that torch.set_default_device() does not move tensors of the host."""
    factories, found = {f"torch.{name}" for name in FACTORIES}, []
    for part in OF_MODELS:
        path = PACKAGE / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            created = [call for call in calls if ast.unparse(call.func) in factories]
            bare = [call for call in created if all(keyword.arg != "device" for keyword in call.keywords)]
            found += [f"{file.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)}" for call in bare]
    assert not found
