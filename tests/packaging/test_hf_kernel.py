# SPDX-License-Identifier: Apache-2.0
"""The layout of a kernel of the Hugging Face hub: it loads beside the installed package, under operators of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "hf_kernel.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TOOL.exists(), reason="not in a source checkout")]

# As the package `kernels` does it, where that is not installed.
BY_HAND = """
import importlib.util, json
(variant,) = (folder / "build").iterdir()
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
hub = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
"""
BY_KERNELS = """
from kernels import get_local_kernel
hub = get_local_kernel(folder, backend="cpu")
"""
CALL = """
import mustdrop_kernels as installed
x = torch.randn(1, 17, 8, requires_grad=True)
expected = installed.spatial_merge(x, [4, 4], [2, 2], 0.1).tokens
assert hub.__name__.startswith("_mustdrop_kernels_cpu_") and hub.__file__ != installed.__file__
assert torch.equal(hub.spatial_merge(x, [4, 4], [2, 2], 0.1).tokens, expected)
assert torch.equal(getattr(torch.ops, hub.__name__).spatial_merge(x, [4, 4], [2, 2], 0.1)[0], expected)
hub.spatial_merge(x, [4, 4], [2, 2], 0.1).tokens.sum().backward()
assert x.grad is not None and hub.backends.serving("cpu") == "cpu"
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it lies on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    environment = {**os.environ, "MUSTDROP_CUDA_ARCHS": ""}
    subprocess.run([sys.executable, TOOL, folder], check=True, env=environment, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(BY_HAND, id="by hand"),
        pytest.param(
            BY_KERNELS,
            id="by kernels",
            marks=pytest.mark.skipif(find_spec("kernels") is None, reason="the package kernels: make test-hf-kernel"),
        ),
    ],
)
def test_a_copy_beside_the_installed_package(load: str, repository: Path) -> None:
    code = f"import pathlib, sys, torch\nfolder = pathlib.Path({str(repository)!r})\n{load}{CALL}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
