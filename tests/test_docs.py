# SPDX-License-Identifier: Apache-2.0
"""Checks of docs/: the site builds without a warning, the code runs, the messages are those that are raised."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import setuptools
import tiny_llava
import torch
from processes import output_of_python, run_python

import mustdrop_kernels as mk
from mustdrop_kernels import _load, backends, cli
from mustdrop_kernels.integrations.transformers import drop_tokens
from mustdrop_kernels.integrations.vllm import settings
from mustdrop_kernels.ops import registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="not in a source checkout")

# Tests that run the commands which take long or change the environment.
RUN_ELSEWHERE = {
    "pip install .": "tests/packaging/test_install.py",
    "pip install '.[demo]'": "Makefile, with every extra",
    "pip install 'setuptools>=77' cmake ninja": "Makefile",
    "pip install --no-build-isolation .": "tests/packaging/test_install.py",
    "MUSTDROP_CUDA_ARCHS=90 pip install .": "tests/packaging/test_install.py",
    "pip install 'mustdrop_kernels[cupy]'": "Makefile, with every extra",
    "pip install 'mustdrop_kernels[cupy12]'": "by hand: the other CUDA",
    "make wheel": "tests/packaging/test_install.py",
    "make test-wheel": "by hand, before a release: docs/release.md",
    "python hub/hf_kernel.py build/hf": "tests/packaging/test_hf_kernel.py",
    "python hub/hf_kernel.py --project build/hf-project": "tests/packaging/test_hf_project.py",
    "mustdrop demo --max-new-tokens 2": "tests/cli/test_demo.py",
    # A 7B model: tests/integrations/vllm_plugin/test_http.py runs the command in a real vLLM.
    """vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"architectures": """
    """["MustDropLlavaForConditionalGeneration"], "mustdrop": {"preset": "budget-128"}}'""": "make test-vllm",
    "MUSTDROP_VLLM=budget-128 vllm serve llava-hf/llava-1.5-7b-hf": "make test-vllm",
    "MUSTDROP_VLLM=small-64 vllm serve mustdrop_kernels/evaluation/model --dtype float32": "make test-vllm",
}
# Pages whose code requires packages that are not installed in the main environment.
PYTHON_ELSEWHERE = {"install.md": "make test-hf-kernel"}
# Of the C++ example: tests/frameworks/test_libtorch.py.
CPP = ("cmake -S examples/libtorch", "cmake --build build/libtorch", "build/libtorch/merge")


# Files and changes of files, in docs/extending.md: tests/packaging/test_extending.py.
FILES = re.compile(r"^(````?)\w+ title=.*?^\1$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    text = FILES.sub("", (DOCS / page).read_text())
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = {line.strip() for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()}
    return sorted(line for line in lines if line and not line.startswith(CPP))


@pytest.mark.parametrize("command", [c for c in commands() if c not in RUN_ELSEWHERE])
def test_command_runs(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[0] == "mustdrop", f"{command} is run by no test"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True)


def test_commands_run_elsewhere_exist() -> None:
    assert set(RUN_ELSEWHERE) <= set(commands())


def _plan_of_an_engine(model: str, *, hf_overrides: dict[str, Any], **engine: int) -> None:
    """Stub of vLLM's LLM: the plug-in must support the model's name and accept the plan."""
    (architecture,) = hf_overrides["architectures"]
    assert architecture in (ROOT / "mustdrop_kernels/integrations/vllm/plugin.py").read_text()
    settings.parse(hf_overrides["mustdrop"])


def _settings_of_a_request(*, extra_args: dict[str, Any], **parameters: int) -> None:
    """Stub of vLLM's SamplingParams: the settings must be valid in an engine with four pruning layers."""
    settings.of_request(mk.MustDropConfig.preset("budget-128"), extra_args, layers=32)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in PYTHON_ELSEWHERE])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in sequence."""
    if "jax" in (DOCS / page).read_text():
        pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    space: dict[str, Any] = {}
    if page == "engines.md" and find_spec("vllm") is None:
        stub = types.SimpleNamespace(LLM=_plan_of_an_engine, SamplingParams=_settings_of_a_request)
        monkeypatch.setitem(sys.modules, "vllm", stub)
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"docs/{page}, Python block {number}", "exec"), space)


def test_every_block_is_of_a_language_that_is_run() -> None:
    texts = [FILES.sub("", (DOCS / page).read_text()) for page in PAGES]
    found = {match for text in texts for match in re.findall(r"^```(\w*)\n", text, re.MULTILINE)}
    assert found <= {"python", "bash", "text", "json", "math"} | {""}  # "" ends a block; the site builds formulas


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    output_of_python("-m", "mkdocs", "build", "--strict", "-d", tmp_path, folder=ROOT, **quiet)
    assert "<table>" in (tmp_path / "ops" / "spatial_merge.html").read_text()


def test_every_image_has_an_alternative_text() -> None:
    for page in PAGES:
        assert "![](" not in (DOCS / page).read_text(), page


def test_the_figures_of_the_method_are_current(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runpy.run_path(str(ROOT / "tools/method_figures.py"))["main"](tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "method").iterdir()}


def test_every_operator_has_its_page() -> None:
    for op in backends.OPS:
        text = (DOCS / "ops" / f"{op}.md").read_text()
        assert f"::: mustdrop_kernels.{op}" in text
        assert [h for h in ("## Example", "## Numerics", "## Complexity", "## Backends") if h not in text] == []


def test_every_result_is_on_the_page_about_benchmarks() -> None:
    rows = re.findall(r"^\| `([\w.-]+\.json)` \| `(.*)` \|$", (DOCS / "benchmarks.md").read_text(), re.MULTILINE)
    results = {path.name: json.loads(path.read_text()) for path in (ROOT / "bench/results/cpu").glob("*.json")}
    commands = {name: result["command"] for name, result in results.items()}  # words, or a line
    assert dict(rows) == {name: line if isinstance(line, str) else " ".join(line) for name, line in commands.items()}


# ------------------------------------------------------------------------------------------------ troubleshooting

VISION = torch.full((1, 1), 2, dtype=torch.uint8)


def _broken(folder: Path, content: bytes | None) -> None:
    library = _load.Library("libmustdrop")
    library.path = folder / "libmustdrop.so"
    if content is not None:
        library.path.write_bytes(content)
    library.load()
    raise RuntimeError(library.problem)


def _old_instruction_set(_: Path) -> None:
    code = "import torch, mustdrop_kernels as mk; mk.spatial_merge(torch.ones(1, 5, 4), [2, 2], [2, 2])"
    done = run_python("-c", code, MUSTDROP_CPU_CAPABILITY="sse9")
    raise RuntimeError(done.stdout + done.stderr)


def _no_cupy(_: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(backends.cupy, "find_spec", lambda name: None)
        raise RuntimeError(backends.registered()["cupy"].why_not(backends.OPS[0], "cuda"))


def _old_gpu(_: Path) -> None:
    pytest.importorskip("cupy")
    from mustdrop_kernels.backends.cupy import gpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        gpu.Gpu._architecture(0)


def _no_nvcc(_: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        arguments = runpy.run_path(str(ROOT / "setup.py"))["cuda_arguments"]
        patch.setitem(arguments.__globals__, "find_nvcc", lambda: None)
        patch.setenv("MUSTDROP_CUDA_ARCHS", "90")
        arguments()


def _no_command_line(_: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rich", "typer"):
            patch.setitem(sys.modules, name, None)
        cli.main()


def _twice(_: Path) -> None:
    model = tiny_llava.model(layers=16)
    with drop_tokens(model), drop_tokens(model):
        pass


def _in_chunks(_: Path) -> None:
    model = tiny_llava.model(layers=16)
    inputs = tiny_llava.processor()(images=tiny_llava.picture(), text=tiny_llava.PROMPT, return_tensors="pt")
    with drop_tokens(model):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


def _gradient_of_a_choice(_: Path) -> None:
    q, k = torch.rand(1, 2, 4, requires_grad=True), torch.rand(1, 2, 5, 4)
    mk.cls_attention(q, k, 0.5).sum().backward()


RAISED: dict[str, Callable[[Path], Any]] = {
    "libmustdrop.so was not built": lambda folder: _broken(folder, None),
    "libmustdrop.so could not be loaded": lambda folder: _broken(folder, b"not a library"),
    "no backend named": lambda _: backends.get("tritn"),
    "backend 'cuda'": lambda _: mk.select_topk(torch.ones(1, 1), VISION, 1, backend="cuda"),
    "MUSTDROP_CPU_CAPABILITY": _old_instruction_set,
    "cupy is not installed": _no_cupy,
    "a device of compute capability": _old_gpu,
    "no CUDA library": _no_nvcc,
    "mustdrop: the command line": _no_command_line,
    "mustdrop::spatial_merge": lambda _: mk.spatial_merge(torch.ones(1, 8, 5).mT, [2, 2], [2, 2]),
    "mustdrop::select_topk": lambda _: mk.select_topk(torch.ones(1, 1), VISION, 1, budgets=torch.ones(1).long()),
    "mustdrop::cls_attention": _gradient_of_a_choice,
    "drop_tokens is active": _twice,
    "prefill_chunk_size": _in_chunks,
}


def messages() -> list[str]:
    return re.findall(r"^## `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_message_is_raised(message: str, tmp_path: Path) -> None:
    (raising,) = (function for begin, function in RAISED.items() if message.startswith(begin))
    pattern = ".*".join(map(re.escape, message.split("...")))
    with pytest.raises((Exception, SystemExit), match=pattern):
        raising(tmp_path)


def test_every_message_is_on_the_page() -> None:
    assert len(messages()) == len(RAISED)


def test_links_are_valid() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", FILES.sub("", (DOCS / page).read_text())):
            assert ((DOCS / page).parent / target).exists(), f"{page}: {target}"
