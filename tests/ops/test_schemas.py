# SPDX-License-Identifier: Apache-2.0
"""Agreement of the Python functions, the registry and the backends with the schemas of the contract."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import mustdrop_kernels
from mustdrop_kernels import backends

from .sample_calls import sample
from .schemas import OPS, SCHEMAS


@pytest.mark.parametrize("op", OPS)
def test_schema(op):
    registered = getattr(torch.ops.mustdrop, op).default._schema
    assert str(registered) == str(torch._C.parse_schema(SCHEMAS[op]))


def test_token_types_of_the_kernels():
    header = Path(__file__).resolve().parents[2] / "csrc" / "common" / "token_types.h"
    found = re.findall(r"\bk(\w+)Token = (\d+);", header.read_text())
    assert {name.upper(): int(value) for name, value in found} == {t.name: t.value for t in mustdrop_kernels.TokenType}


def test_token_types_in_triton():
    """Literals there, since a called function reads no variable."""
    text = (Path(mustdrop_kernels.__file__).parent / "backends" / "triton" / "token_types.py").read_text()
    found = dict(re.findall(r"def is_(\w+)\(kind\):\n.*\n    return kind ([!=]= \d)", text))
    types = mustdrop_kernels.TokenType
    assert found == {"token": f"!= {types.PADDING}", "vision": f"== {types.VISION}", "query": f"== {types.QUERY}"}


def test_there_are_no_other_ops():
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mustdrop::")}
    assert names == {f"mustdrop::{op}" for op in OPS}
    overloads = {s.overload_name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mustdrop::")}
    assert overloads == {""}


def test_registry_lists_the_ops():
    assert set(backends.OPS) == set(OPS)


def test_token_type_constants():
    kinds = mustdrop_kernels.TokenType
    assert (kinds.PADDING, kinds.TEXT, kinds.VISION, kinds.QUERY) == (0, 1, 2, 3)


@pytest.mark.parametrize("op", OPS)
def test_python_function_has_the_schema_s_arguments(op):
    """Same names, order, defaults and keyword-only arguments as the schema, plus the keyword backend."""
    parameters = list(inspect.signature(getattr(mustdrop_kernels, op)).parameters.values())
    arguments = torch._C.parse_schema(SCHEMAS[op]).arguments
    assert [p.name for p in parameters] == [a.name for a in arguments] + ["backend"]
    assert parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters[-1].default is None
    for parameter, argument in zip(parameters[:-1], arguments, strict=True):
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only, parameter.name
        if argument.has_default_value():
            assert parameter.default == argument.default_value, parameter.name
        else:
            assert parameter.default is inspect.Parameter.empty, parameter.name


@pytest.mark.parametrize("op", OPS)
def test_python_function_names_its_results(op, device):
    result = getattr(mustdrop_kernels, op)(**sample(op, device))
    names = [r.name for r in torch._C.parse_schema(SCHEMAS[op]).returns]
    if len(names) > 1:
        assert list(result._fields) == names
    else:
        assert isinstance(result, torch.Tensor) if names else result is None
    assert getattr(mustdrop_kernels, op).__doc__


@pytest.mark.parametrize("op", OPS)
def test_backend_takes_the_schema_s_arguments(backend, op):
    """A backend's implementation takes the op's arguments by position, and keyword-only ones by name."""
    registered = backends.registered()[backend.name]
    if registered.why_not(op, backend.device) is not None:
        pytest.skip(registered.why_not(op, backend.device))
    arguments = torch._C.parse_schema(SCHEMAS[op]).arguments
    given = sample(op, backend.device)
    positional = [given[a.name] for a in arguments if not a.kwarg_only and a.name in given]
    keywords = {a.name: given[a.name] for a in arguments if a.kwarg_only and a.name in given}
    registered.implementation(op)(*positional, **keywords)
    defaults = {a.name: a.default_value for a in arguments if a.kwarg_only}
    if op != "compact_paged_kv_":
        registered.implementation(op)(*positional, **defaults)


@pytest.mark.parametrize("op", OPS)
def test_every_backend_serves_or_gives_a_reason(op, device):
    for name, registered in backends.registered().items():
        reason = registered.why_not(op, device)
        assert reason is None or (isinstance(reason, str) and reason.strip()), name
