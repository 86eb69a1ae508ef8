# SPDX-License-Identifier: Apache-2.0
"""Cache keys of the Triton kernels as JSON, computed in a process that test_triton_keys.py starts.

python tests/backends/triton_keys.py keys forward|reversed
python tests/backends/triton_keys.py compile forward|reversed
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pkgutil
import random
import sys
from types import ModuleType
from typing import Any

from triton.runtime import JITFunction

from mustdrop_kernels.backends import triton as backend

SHUFFLED = 6  # random orders beside those that start with each function in turn


def modules(backwards: bool) -> list[ModuleType]:
    """Every file of the backend, imported in forward or reversed order."""
    names = sorted((module.name for module in pkgutil.iter_modules(backend.__path__)), reverse=backwards)
    return [importlib.import_module(f"{backend.__name__}.{name}") for name in names]


def functions(backwards: bool = False) -> dict[str, JITFunction]:
    """Every kernel and device function by name, in the order of the files."""
    found = [f for module in modules(backwards) for f in vars(module).values() if isinstance(f, JITFunction)]
    return {f"{f.__module__.rpartition('.')[2]}.{f.__name__}": f for f in found}


def _keys(order: list[str]) -> dict[str, str]:
    known = functions()
    return {name: known[name].cache_key for name in order}


def _orders(names: list[str]) -> list[list[str]]:
    """Forward, reversed, each function first, some at random."""
    shuffled = [random.Random(seed).sample(names, len(names)) for seed in range(SHUFFLED)]
    firsts = [[name, *(other for other in names if other != name)] for name in names]
    return [names, names[::-1], *firsts, *shuffled]


def keys(backwards: bool) -> list[dict[str, Any]]:
    """The keys in each order, each computed in a new child process."""
    result = []
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for order in _orders(list(functions(backwards))):
            result.append({"first": order[0], "keys": pool.apply(_keys, (order,))})
    return result


def compile_some(backwards: bool) -> dict[str, bool]:
    """Compile the launches of one call of each op, in forward or reversed order. Kernel -> whether the cache had it."""
    from mustdrop_kernels.backends.triton import crosscompile_calls, precompile

    result: dict[str, bool] = {}
    calls = list({call.func: call for call in crosscompile_calls.calls()}.values())
    with precompile.compiling("sm90", lambda folder, hit: result.update({folder.name: hit})):
        for call in reversed(calls) if backwards else calls:
            call()
    return result


if __name__ == "__main__":
    command, direction = sys.argv[1:]
    print(json.dumps({"keys": keys, "compile": compile_some}[command](direction == "reversed")))
