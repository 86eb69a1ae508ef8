# SPDX-License-Identifier: Apache-2.0
"""Checks of the README: its code runs, its commands and files exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llava
from processes import output_of_python

from mustdrop_kernels.bench import serving

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="not in a source checkout")

# Tests that run commands of the README; the others are run below.
RUN_ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "pip install .": "tests/packaging/test_install.py",
    "pip install '.[demo]'": "Makefile, with every extra",
    "MUSTDROP_CUDA_ARCHS=90 pip install .": "tests/packaging/test_install.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def test_commands_run_elsewhere_exist() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command, where in RUN_ELSEWHERE.items():
        assert command in commands()
        if where == ".ci/run":
            assert re.search(rf"^{command}\b", script, flags=re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in commands() if c not in RUN_ELSEWHERE] if README.exists() else [])
def test_command_runs(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[0] == "mustdrop", f"{command} is run by no test"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert shutil.which("mustdrop", path=path)
    subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True)


@pytest.mark.parametrize("number", range(len(blocks("python")) if README.exists() else 0))
def test_python_runs(number: int) -> None:
    inputs = tiny_llava.processor()(images=tiny_llava.picture(), text=tiny_llava.PROMPT, return_tensors="pt")
    space = {"model": tiny_llava.model(layers=16), "inputs": inputs}
    exec(compile(blocks("python")[number], f"README.md, Python block {number}", "exec"), space)


def test_it_has_at_most_150_lines() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_figures_are_those_of_the_results() -> None:
    """Figures of `mustdrop bench serving` with 32 concurrent requests, as in docs/benchmarks.md."""
    sheet = serving.sheet(serving.read(ROOT / "bench/results/cpu/serving.json"))
    lines = [dict(zip(sheet.columns, cells, strict=True)) for cells in sheet.rows if cells[0] == "32"]
    arms = "all", "dropped", "smaller images"
    full, dropped, smaller = (next(line for line in lines if line["image tokens"] == name) for name in arms)
    rate, other = (re.search(r"\((.*)x\)", line["requests/s"])[1] for line in (dropped, smaller))
    first, plain, small = (line["first token"].split(" ±")[0] for line in (dropped, full, smaller))
    blocks = [line["while decoding"] for line in (dropped, full, smaller)]
    text = README.read_text()
    assert f"**{rate}x** the requests per second (smaller images: {other}x)" in text
    assert f"the first token after **{first}** instead of {plain} ({small})" in text
    assert "**{}** cache blocks in use while decoding instead of {} ({})".format(*blocks) in text


def test_the_documentation_begins_with_the_same_commands() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert [command for command in commands() if command not in index] == []


def test_tables_are_current() -> None:
    """Run `make figures` after a new measurement."""
    output_of_python("tools/figures.py", "--check", folder=ROOT)


def test_links_are_valid() -> None:
    targets = re.findall(r"\]\(((?!http)[^)#]+)\)", README.read_text())
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []
