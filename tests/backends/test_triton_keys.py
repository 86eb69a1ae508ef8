# SPDX-License-Identifier: Apache-2.0
"""Cache keys depend on the kernel only, so that a process reuses the kernels that an earlier one compiled.

In Triton 3.6 a device function that reads a module variable makes the keys of its callers depend on which of them was
compiled first; `make test-triton-3.6` runs these tests with that version. In 3.4 and 3.9 the keys are always equal.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import output_of_python

from mustdrop_kernels.backends import triton as backend

if backend.interpreted():
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)
if backend.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_keys


def run_keys(command: str, direction: str, cache: Path) -> Any:
    """Output of triton_keys.py in a separate process."""
    return json.loads(output_of_python(triton_keys.__file__, command, direction, TRITON_CACHE_DIR=str(cache)))


def test_keys_do_not_depend_on_the_order(tmp_path):
    """Keys computed forward, backward, in random order, and with each function first; two import orders."""
    keys: dict[str, dict[str, str]] = {}  # of a function: each key, and the function whose key was computed first
    for direction in ("forward", "reversed"):
        for row in run_keys("keys", direction, tmp_path):
            for name, key in row["keys"].items():
                keys.setdefault(name, {})[key] = row["first"]
    assert len(keys) > 30
    assert {"scores_kernels.scores_kernel", "select._load_dual", "numbers.widen"} <= set(keys)
    assert {name: found for name, found in keys.items() if len(found) > 1} == {}


def _reads(function: Any) -> dict[str, Any]:
    """Module variables that a function reads."""
    names = {node.id for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}
    known = function.fn.__globals__
    return {name: known[name] for name in names - set(function.fn.__code__.co_varnames) if name in known}


def test_called_functions_read_no_variables():
    """Only launched kernels may read module variables, which keeps the keys equal in every version."""
    functions = triton_keys.functions().values()
    called = {id(value) for f in functions for value in _reads(f).values()}
    helpers = [f for f in functions if id(f) in called]
    assert len(helpers) > 15
    wrong = {
        f"{f.__name__}: {name}"
        for f in helpers
        for name, value in _reads(f).items()
        if not isinstance(value, (ModuleType, type(f)))
    }
    assert wrong == set()


def test_the_next_process_compiles_nothing(tmp_path):
    """Two processes call the operators in opposite orders."""
    first = run_keys("compile", "forward", tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    second = run_keys("compile", "reversed", tmp_path)
    assert len(first) > 15
    assert not any(first.values())
    assert sorted(second) == sorted(first)
    assert all(second.values())
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files
