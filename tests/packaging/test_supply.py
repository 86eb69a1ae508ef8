# SPDX-License-Identifier: Apache-2.0
"""No pickle, no network access, few dependencies: checked in the sources, and by runs without a network."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mustdrop_kernels"
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a source checkout")

# Modules and calls that load code with data.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
UNSAFE_CALLS = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("numpy", "load"), ("np", "load")}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
NETWORK = {"socket", "http", "urllib", "requests", "httpx", "aiohttp", "huggingface_hub", "ftplib", "ssl"}


def sources() -> list[Path]:
    folders = (PACKAGE, *(ROOT / name for name in ("bench", "hub", "tools", "training")))
    return [*(path for folder in folders for path in sorted(folder.rglob("*.py"))), ROOT / "setup.py"]


def findings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported = [node.module or ""]
        else:
            imported = []
        for name in imported:
            if name.split(".")[0] in UNSAFE_MODULES | NETWORK:
                yield f"{where} imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            if (called.value.id, called.attr) in UNSAFE_CALLS:
                yield f"{where} calls {called.value.id}.{called.attr}"
        elif isinstance(called, ast.Name) and called.id in UNSAFE_NAMES:
            yield f"{where} calls {called.id}"
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle", "weights_only"):
                yield f"{where} passes {keyword.arg}"


def test_nothing_loads_code_with_data_or_opens_a_connection() -> None:
    found = [line for path in sources() for line in findings(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "torch.load('x')", "import urllib.request", "f(allow_pickle=True)",
     "eval('1')"],
)  # fmt: skip
def test_the_search_finds(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "planted.py"
    path.write_text(line + "\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert list(findings(path))


def test_torch_is_the_only_dependency() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^dependencies = (\[.*\])$", text, re.MULTILINE)
    assert found is not None
    assert ast.literal_eval(found[1]) == ["torch>=2.10"]


def test_weights_are_loaded_from_safetensors_only() -> None:
    """Loads of checkpoints set use_safetensors; by default transformers falls back to a pickle."""
    calls = [
        (path, node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    loading = [
        (path, call) for path, call in calls
        if not ast.unparse(call.func).startswith(("AutoConfig.", "AutoProcessor.", "AutoTokenizer."))
    ]  # fmt: skip
    assert loading, "no load of a checkpoint was found"
    for path, call in loading:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options.get("use_safetensors") == "True", f"{path}: {ast.unparse(call)}"


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = refuse
import mustdrop_kernels, mustdrop_kernels.plans, mustdrop_kernels.integrations.transformers
from mustdrop_kernels.cli import main
sys.argv = ["mustdrop", *sys.argv[1:]]
main()
"""


DEMO = pytest.param(["demo", "--max-new-tokens", "1", "--out"], marks=pytest.mark.slow, id="demo")


@pytest.mark.parametrize("words", [pytest.param(["doctor", "--json"], id="doctor"), DEMO])
def test_without_a_network(words: list[str], tmp_path: Path) -> None:
    if words[-1] == "--out":
        words = [*words, str(tmp_path)]
    environment = {"HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = run_python("-c", OFFLINE, *words, folder=tmp_path, without="HF_", **environment)
    assert "a connection was opened" not in done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
