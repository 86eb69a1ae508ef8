# SPDX-License-Identifier: Apache-2.0
"""bench/run_on_gpu.sh without a GPU: what it would do, that one failure leaves the rest, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "run_on_gpu.sh"


def run(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    search = f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True, text=True, env={**os.environ, "PATH": search, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


RUNS = {
    "quick": {"ops", "graph", "coverage", "suite-cuda", "suite-triton", "suite-cupy", "sanitizer-racecheck"},
    "suite": {"suite-cuda", "suite-triton", "suite-cupy"},
    "sanitize": {f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")},
    "bench": {"ops-bfloat16", "ops-float16", "ops-float32", "ops-video"},
    "e2e": {"e2e", "graph"},
    "decode": {"decode-tokens", "e2e-static"},
}


@pytest.mark.parametrize("name", RUNS)
def test_dry_run(name, tmp_path):
    done = run("--dry-run", name, OUT=str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    parts = dict(re.findall(r"^(\S+) +at most +(\d+) s: .+$", done.stdout, flags=re.MULTILINE))
    assert {"build", "facts", "doctor"} | RUNS[name] <= set(parts)
    assert all(0 < int(limit) < 600 for limit in parts.values())
    if name == "quick":
        assert run("--dry-run", OUT=str(tmp_path / "results")).stdout == done.stdout, "it is the default"
    assert not (tmp_path / "results").exists(), "a dry run writes nothing"


def test_the_scripts_that_it_names_exist():
    named = set(re.findall(r"\b(?:bench|tests)/[\w./]*\w", run("--dry-run", *RUNS, OUT="out").stdout))
    assert named
    assert all((ROOT / name).exists() for name in named), named


def test_wrong_usage():
    done = run("--fast")
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_without_a_gpu(tmp_path):
    done = run(OUT=str(tmp_path / "results"))
    assert done.returncode == 1
    assert "no NVIDIA GPU was found; --dry-run" in done.stderr


def test_a_failure_leaves_the_others(tmp_path):
    """With a Python that fails in one part and a compute-sanitizer that is content, every other part runs."""
    tools, out = tmp_path / "tools", tmp_path / "results"
    tools.mkdir()
    program(tools / "nvidia-smi", "exit 0")
    program(tools / "compute-sanitizer", 'case "$*" in *racecheck*) echo hazards; exit 9;; *) echo no errors;; esac')
    facts = '{"backends": ["cuda", "mine"]}'
    program(
        tools / "python",
        f"""case "$*" in
  *--facts*) echo '{facts}' > {out}/facts.json;;
  *--graph*) echo "the graph is broken"; exit 3;;
  *setup.py*|*"-m mustdrop_kernels"*|*gpu_once.py*|*"-m pytest"*) echo fine;;
  *) exec {sys.executable} "$@";;
esac""",
    )
    done = run(path=tools, OUT=str(out), PYTHON=str(tools / "python"))
    assert done.returncode == 1
    assert "the graph is broken" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    results = {part["part"]: part["result"] for part in summary["parts"]}
    assert results.pop("graph").startswith("FAILED (3)")
    assert results.pop("sanitizer-racecheck").startswith("FAILED (9)")
    results.pop("build")  # left out where there is no CMake
    assert {"ops", "suite-cuda", "suite-mine", "coverage", "sanitizer-initcheck"} <= set(results)
    assert set(results.values()) == {"ok"}
    assert summary["facts"]["backends"] == ["cuda", "mine"]
    text = (out / "summary.txt").read_text()
    assert "suite-mine" in text
    assert "===== ops\nfine\n" in (out / "log.txt").read_text()
    assert len(list(out.iterdir())) <= 8, "few files come back from a machine that is lent"


def test_every_operator_and_every_kernel_has_a_place():
    """gpu_once calls each operator, and finds the kernels of each folder that has launchers."""
    from mustdrop_kernels.backends import OPS

    spec = importlib.util.spec_from_file_location("gpu_once", ROOT / "bench" / "gpu_once.py")
    gpu_once = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_once)
    text = (ROOT / "bench" / "gpu_once.py").read_text()
    assert [op for op in OPS if f"mustdrop.{op}(" not in text] == []
    kernels = gpu_once.kernels_of_sources()
    launched = "".join(path.read_text() for path in (ROOT / "csrc").glob("*/*.cu"))
    launched += "".join(path.read_text() for path in (ROOT / "csrc").glob("*/*.h"))
    some = {"gather_kernel", "compact_kernel", "compact_chunks_kernel", "select_kernel", "merge_cluster_kernel"}
    assert some <= kernels
    assert [name for name in kernels if name.endswith("_kernel") and name not in launched] == []
