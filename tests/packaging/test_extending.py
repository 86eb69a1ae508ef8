# SPDX-License-Identifier: Apache-2.0
"""docs/extending.md, "Add an operator": its blocks, applied to a copy of the repository, give an operator that passes.

A block with a title is a file or, in the language diff, a patch of one: hunks end at a line "@@", lines that begin with
a space are context.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import output_of_python

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
OP = "vision_counts"
BLOCK = re.compile(r'^(````?)(\w+) title="([^"]+)"\n(.*?)^\1$', flags=re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a source checkout")


def blocks() -> list[tuple[str, str, str]]:
    """Language, file and contents of each block with a title."""
    return [(language, file, text) for _, language, file, text in BLOCK.findall(PAGE.read_text())]


def apply(language: str, path: Path, text: str) -> None:
    if language != "diff":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return
    for hunk in text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] or "\n" for line in lines if line[0] in " -\n")
        after = "".join(line[1:] or "\n" for line in lines if line[0] in " +\n")
        contents = path.read_text()
        assert contents.count(before) == 1, f"{path}: {before!r}"
        path.write_text(contents.replace(before, after))


def test_an_operator_takes_seven_places() -> None:
    """A place is a file, or a folder of the operator."""
    places = {
        str(Path(file).parent) if OP in Path(file).parts or file.startswith("docs/") else file
        for _, file, _ in blocks()
    }
    assert len(places) == 7, sorted(places)


@pytest.mark.slow
def test_an_operator_by_the_page(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in filter(None, listed.split("\0")):
        if (ROOT / file).is_file() and not file.startswith("bench/results/"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, tmp_path / file)
    for language, file, text in blocks():
        apply(language, tmp_path / file, text)
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": paths, "PYTHONPATH": str(tmp_path), "MUSTDROP_TEST_BACKENDS": "cpu,reference"}

    def run(*words: str) -> str:
        return output_of_python(*words, folder=tmp_path, without="MUSTDROP_", **environment)

    run("setup.py", "-q", "build_ext", "--inplace")
    for folder in ("csrc", "mustdrop_kernels", "tests/ops"):
        run("-m", "ruff", "check", folder)
        run("-m", "ruff", "format", "--check", folder)
    run("-m", "mypy")
    assert "13 operators" not in run("-m", "mustdrop_kernels", "doctor")
    suite = ["tests/ops", "tests/fuzz", "tests/backends/test_registry.py", "tests/test_concurrency.py"]
    assert " passed" in run("-m", "pytest", "-q", "-x", "-n", "2", "-m", "not slow", "-k", OP, *suite)
    whole = ["tests/ops/test_schemas.py", "tests/backends/test_registry.py", "tests/backends/test_triton.py"]
    pages = ["tests/test_docs.py::test_every_operator_has_its_page", "tests/packaging/test_hf_project.py"]
    tools = ["tests/cli/test_doctor.py", "tests/test_imports.py", "tests/bench/test_run_on_gpu.py"]
    chosen = ["tests/ops/test_refusals.py::test_table_is_complete", "tests/ops/test_hostile.py", *whole, *pages, *tools]
    assert " passed" in run("-m", "pytest", "-q", "-x", "-n", "2", "-m", "not slow", *chosen)
