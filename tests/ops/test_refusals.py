# SPDX-License-Identifier: Apache-2.0
"""Invalid arguments raise a RuntimeError that names the op and the argument, before any work.

The operators' test files list the invalid values of each argument, as REFUSALS and REFUSED_TOGETHER. Every backend
raises the same message as the reference backend, and so do the fakes, which torch.compile calls.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mustdrop_kernels
from mustdrop_kernels.ops.contract import CONTRACTS

from .cases import Watch
from .sample_calls import deciding, sample, tensors_in
from .schemas import OPS

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def collected(name: str) -> list:
    """The values of ``name`` in the operators' test files."""
    files = [file for file in Path(__file__).parent.glob("test_*.py") if f"\n{name} = " in file.read_text()]
    return [getattr(importlib.import_module(f".{file.stem}", __package__), name) for file in sorted(files)]


TABLE = {op: rows for refusals in collected("REFUSALS") for op, rows in refusals.items()}
TOGETHER = [row for rows in collected("REFUSED_TOGETHER") for row in rows]
ROWS = [(op, argument, wrong) for op, rows in TABLE.items() for argument, ways in rows.items() for wrong in ways]


def broken(op: str, argument: str, wrong: str, device: str) -> dict[str, Any]:
    given = sample(op, device)
    given[argument] = TABLE[op][argument][wrong](given.get(argument))
    return given


def broken_together(op: str, changes: dict[str, Any], device: str) -> dict[str, Any]:
    given = sample(op, device)
    return {**given, **{name: new(given[name]) if callable(new) else new for name, new in changes.items()}}


def refusal(op: str, given: dict) -> str | None:
    """The message of the reference backend; None if it accepts the call."""
    try:
        getattr(mustdrop_kernels, op)(**given, backend="reference")
    except RuntimeError as error:
        return str(error)
    return None


def expect_refusal(call: Callable, op: str, argument: str, given: dict, expected: str | None = None) -> None:
    """``expected``: the reference backend's message, if it cannot be called with the same tensors."""
    watch = Watch(*tensors_in(given)) if all(type(t) is torch.Tensor for t in tensors_in(given)) else None
    with pytest.raises(RuntimeError) as refused:
        call(**given)
    message = str(refused.value)
    assert message.startswith(f"mustdrop::{op}: {argument}"), message
    rest = message.removeprefix(f"mustdrop::{op}: {argument}")
    assert rest[0] in " [", f"must name {argument}: {message}"
    assert len(rest) > 10, f"must describe the error: {message}"
    assert watch is None or watch.nothing_changed()
    assert message == (refusal(op, given) if expected is None else expected)


def test_table_is_complete():
    """The table covers every argument of every op except floats and bools, which accept any value."""
    assert set(TABLE) == set(OPS)
    for op in OPS:
        arguments = getattr(torch.ops.mustdrop, op).default._schema.arguments
        able = {a.name for a in arguments if str(a.type) not in ("float", "bool")}
        assert set(TABLE[op]) == able


@pytest.mark.parametrize("op", OPS)
def test_the_sample_is_accepted(backend, op):
    getattr(backend, op)(**sample(op, backend.device))


@pytest.mark.parametrize(("op", "argument", "wrong"), ROWS)
def test_refused(backend, op, argument, wrong):
    expect_refusal(getattr(backend, op), op, argument, broken(op, argument, wrong, backend.device))


@pytest.mark.parametrize(("op", "argument", "changes"), TOGETHER)
def test_refused_together(backend, op, argument, changes):
    expect_refusal(getattr(backend, op), op, argument, broken_together(op, changes, backend.device))


@pytest.mark.parametrize("op", OPS)
def test_the_same_argument_is_refused_first(backend, op):
    """Two invalid arguments at once, every pair of rows: all backends check in the reference backend's order."""
    rows = [(argument, wrong) for argument, ways in TABLE[op].items() for wrong in ways]
    for (first_name, first_wrong), (second_name, second_wrong) in itertools.combinations(rows, 2):
        if first_name == second_name:
            continue
        given = broken(op, first_name, first_wrong, backend.device)
        given[second_name] = TABLE[op][second_name][second_wrong](given.get(second_name))
        expected = refusal(op, given)
        if expected is None:  # two changes that are consistent with each other
            continue
        with pytest.raises(RuntimeError) as refused:
            getattr(backend, op)(**given)
        assert str(refused.value) == expected, (first_name, first_wrong, second_name, second_wrong)


@pytest.mark.parametrize("op", OPS)
def test_refused_on_fakes(op, device):
    """The whole table on fake tensors, except for errors that depend on addresses."""
    mode = FakeTensorMode()

    def fake(t: Any) -> Any:
        if isinstance(t, list):
            return [fake(item) for item in t]
        return mode.from_tensor(t) if isinstance(t, torch.Tensor) else t

    rows = [
        (argument, broken(op, argument, wrong, device))
        for o, argument, wrong in ROWS
        if o == op and "twice" not in wrong
    ]
    rows += [(argument, broken_together(op, changes, device)) for o, argument, changes in TOGETHER if o == op]
    for argument, given in rows:
        expected = refusal(op, given)
        with mode:
            fakes = {name: fake(v) for name, v in given.items()}
            expect_refusal(getattr(mustdrop_kernels, op), op, argument, fakes, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("op", OPS)
def test_tensors_on_another_device(backend, op):
    if backend.device != "cuda":
        pytest.skip("the second device is the CPU")
    for name, argument in sample(op, "cuda").items():
        if name in deciding(op):
            continue
        given = sample(op, "cuda")
        if isinstance(argument, torch.Tensor):
            given[name] = argument.cpu()
        elif isinstance(argument, list) and isinstance(argument[0], torch.Tensor):
            given[name] = [argument[0].cpu(), *argument[1:]]
        else:
            continue
        expect_refusal(getattr(backend, op), op, name, given)


def test_the_same_memory_as_key_and_value(backend):
    for op in (op for op, contract in CONTRACTS.items() if contract.writes):
        given = sample(op, backend.device)
        given["values"] = [given["values"][0], given["keys"][1], given["values"][2]]
        expect_refusal(getattr(backend, op), op, "values[1]", given)


@pytest.mark.parametrize("op", OPS)
def test_the_schema_excludes_other_types(op):
    """torch raises for a missing argument and for an argument of another type; no backend is called."""
    for given in ((), ("text",)):
        with pytest.raises((RuntimeError, TypeError), match=r"missing value for argument|Expected a value of type"):
            getattr(torch.ops.mustdrop, op)(*given)
