# SPDX-License-Identifier: Apache-2.0
"""Autotuning of tile sizes, enabled by MUSTDROP_AUTOTUNE=1.

The first call of a kernel in a new shape class runs the operator with every candidate of ``configs.CANDIDATES`` and
keeps the fastest. Results are stored in ``$XDG_CACHE_HOME/mustdrop_kernels`` (else ``~/.cache/mustdrop_kernels``) in a
file named after the versions of this package and of Triton, so another version tunes again. Entries name the
architecture, so machines may share the file. In-place operators are not tuned: they cannot run twice on one input.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.testing

from ..._version import __version__
from ...files import write_text
from . import configs
from .configs import Config, Key
from .launch import Plans


def cache_file() -> Path:
    """Path of the tuning results."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mustdrop_kernels" / f"tiles-{__version__}-triton-{triton.__version__}.json"


def _read(file: Path) -> dict[Key, Config]:
    """Stored results; empty if the file is absent or malformed."""
    try:
        text = json.loads(file.read_text())
        return {
            tuple(key.split("/")): Config(tuple(e["tiles"].items()), e["num_warps"], e["num_stages"])
            for key, e in text.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"mustdrop_kernels: {file} is not read, its tiles are searched again: {error!r}")
        return {}


def load() -> None:
    """Load stored results."""
    configs.TUNED.update(_read(cache_file()))


def save() -> None:
    """Merge with results that other processes have stored, and replace the file atomically."""
    file = cache_file()
    found = {**_read(file), **configs.TUNED}
    text = {
        "/".join(key): {"tiles": dict(c.tiles), "num_warps": c.num_warps, "num_stages": c.num_stages}
        for key, c in sorted(found.items())
    }
    write_text(file, json.dumps(text, indent=1))


def measure(run: Callable[[], Any]) -> float:
    """Time of one run in milliseconds."""
    return float(triton.testing.do_bench(run, return_mode="median"))


def tuned(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an operator: its calls tune kernels in shape classes without an entry."""
    load()

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = operator(*args, **kwargs)
        new = [key for key in sorted(configs.SEEN) if key not in configs.TUNED and key[1] in configs.CANDIDATES]
        for key in new:
            _search(key, lambda: operator(*args, **kwargs))
        if new:
            save()
        return result

    return call


def _search(key: tuple[str, str, str], run: Callable[[], Any]) -> None:
    _, kernel, shape_class = key
    times: dict[Config, float] = {}
    for candidate in dict.fromkeys((configs.shipped(key), *configs.CANDIDATES[kernel])):
        _use(key, candidate)
        try:
            run()
            times[candidate] = measure(run)
        except Exception as error:  # too large for this device, or not compilable there
            warnings.warn(f"mustdrop_kernels: {kernel} ({shape_class}) cannot use {candidate}: {error}")
    _use(key, min(times, key=times.__getitem__) if times else configs.shipped(key))


def _use(key: tuple[str, str, str], config: Config) -> None:
    configs.TUNED[key] = config
    Plans.forget_all()
