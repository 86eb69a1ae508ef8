# SPDX-License-Identifier: Apache-2.0
"""Layout of a kernel for the Hugging Face hub: it loads beside the installed package, with its own operators."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import output_of_python, python_path

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "hub" / "hf_kernel.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TOOL.exists(), reason="not in a source checkout")]

# The loading of the package `kernels`, in case it is not installed.
BY_HAND = """
import importlib.util, json
(variant,) = (folder / "build").iterdir()
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
hub = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
"""
OLDER_KERNELS = """
import importlib, json
(variant,) = (folder / "build").iterdir()
sys.path.insert(0, str(variant))
older = importlib.import_module(json.loads((variant / "metadata.json").read_text())["name"].replace("-", "_"))
sys.path.remove(str(variant))
del sys.modules[older.__name__]
hub = sys.modules[json.loads((variant / "metadata.json").read_text())["id"]]
assert older.spatial_merge is hub.spatial_merge
"""
BY_KERNELS = """
from kernels import get_local_kernel
hub = get_local_kernel(folder, backend="cpu")
"""
# A user's call; the repository's local path replaces the download.
OF_THE_HUB = """
import os
os.environ |= {"LOCAL_KERNELS": f"someone/mustdrop-kernels={folder}", "HF_HUB_OFFLINE": "1"}
from kernels import get_kernel
hub = get_kernel("someone/mustdrop-kernels", version=1, backend="cpu")
"""
CALL = """
import mustdrop_kernels as installed
x = torch.randn(1, 17, 8, requires_grad=True)
expected = installed.spatial_merge(x, [4, 4], [2, 2], 0.1).tokens
assert hub.__name__.startswith("_mustdrop_kernels_cpu_") and hub.__file__ != installed.__file__
assert torch.equal(hub.spatial_merge(x, [4, 4], [2, 2], 0.1).tokens, expected)
assert torch.equal(getattr(torch.ops, hub.__name__).spatial_merge(x, [4, 4], [2, 2], 0.1)[0], expected)
hub.spatial_merge(x, [4, 4], [2, 2], 0.1).tokens.sum().backward()
assert x.grad is not None and {hub.backends.serving(op, "cpu") for op in hub.backends.OPS} == {"cpu"}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub")
    output_of_python(TOOL, folder, MUSTDROP_CUDA_ARCHS="")
    return folder


needs_kernels = pytest.mark.skipif(find_spec("kernels") is None, reason="the package kernels: make test-hf-kernel")


def run(code: str, folder: Path) -> None:
    output_of_python("-c", code, folder=folder, PYTHONPATH=python_path(ROOT))


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(BY_HAND, id="by hand"),
        pytest.param(OLDER_KERNELS, id="by older versions of kernels"),
        pytest.param(BY_KERNELS, id="get_local_kernel", marks=needs_kernels),
        pytest.param(OF_THE_HUB, id="get_kernel", marks=needs_kernels),
    ],
)
def test_a_copy_beside_the_installed_package(load: str, repository: Path) -> None:
    run(f"import pathlib, sys, torch\nfolder = pathlib.Path({str(repository)!r})\n{load}{CALL}", repository)


@needs_kernels
def test_metadata_is_valid(repository: Path) -> None:
    code = """
from pathlib import Path
from kernels._rust import Backend, Digest, DigestAlgorithm, Metadata
(variant,) = Path("build").iterdir()
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
assert metadata.id.startswith("_mustdrop_kernels_cpu_") and str(metadata.name) == "mustdrop-kernels"
assert metadata.backend.backend_type == Backend.CPU and metadata.version == 1
"""
    run(code, repository)


@needs_kernels
def test_the_documentation_s_code(repository: Path, tmp_path: Path) -> None:
    """The code of docs/install.md, in the repository that its command creates."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "hf").symlink_to(repository)
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/install.md").read_text(), re.DOTALL | re.MULTILINE)
    run(block, tmp_path)
