# SPDX-License-Identifier: Apache-2.0
"""Line coverage of the Python code and of csrc.

    python tests/sanitizers/line_coverage.py                     # every suite, then the report
    python tests/sanitizers/line_coverage.py --suites triton cpu # some of them, added to earlier counts
    python tests/sanitizers/line_coverage.py --suites            # the report alone
    python tests/sanitizers/line_coverage.py --json bench/results/coverage.json

Python is counted in every process that the tests start. The CPU library is counted at each level (AMX in plain C++),
the CUDA kernels in the emulation. The suite `vllm` needs the environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from variants import BIN, CPU_SUITE, ROOT, build, environment_with, pytest_command

from mustdrop_kernels.bench.machine import describe
from mustdrop_kernels.files import write_text

FOLDER = ROOT / "build" / "coverage"
EMULATED = ROOT / "build" / "cuda_emulation"
VLLM = ROOT / ".venv-vllm" / "bin"
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
NOT_HERE = (
    "packaging",
    "sanitizers",
    "cuda_emulation",
    "frameworks",
    "integrations/vllm_plugin",
    "backends/test_cpu_amx.py",
)
RUN = f"""
[run]
source = {ROOT / "mustdrop_kernels"}
data_file = {FOLDER / "data"}
parallel = true
concurrency = thread, multiprocessing
patch = subprocess, fork, _exit
sigterm = true
"""


def _pytest(*arguments: str, python: Path = BIN, **environment: str) -> int:
    command = [str(python / "python"), "-m", "coverage", "run", f"--rcfile={FOLDER / 'rc'}"]
    command += [str(python / "pytest"), "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment_with(FOLDER / "site", **environment)).returncode


def python_suite() -> int:
    """The Python code, except tests that need an interpreter or an environment of their own."""
    ignored = [f"--ignore=tests/{name}" for name in NOT_HERE]
    chosen = ["-k", "not cuda_emulated and not nvrtc_emulated"]
    return _pytest("-n", "2", "tests", *ignored, *chosen, MUSTDROP_EMULATION_SAMPLE="0")


def triton_suite() -> int:
    """The Triton kernels' lines, in Triton's interpreter."""
    only = {"TRITON_INTERPRET": "1", "MUSTDROP_TEST_BACKENDS": "triton"}
    return _pytest("-n", "2", "tests/ops", "tests/backends", "-k", "triton", **only)


def vllm_suite() -> int:
    """The plug-in, with vLLM's own processes."""
    subprocess.run([str(VLLM / "python"), "-m", "pip", "install", "-q", "coverage"], check=True)
    return _pytest("tests/integrations/vllm_plugin", python=VLLM)


def cpu_suite() -> int:
    """The CPU library, at each level."""
    more = {"MUSTDROP_TEST_BACKENDS": "cpu", "MUSTDROP_EMULATION_SAMPLE": "0"}
    site, status = FOLDER / "site", 0
    for level in LEVELS:
        environment = environment_with(site, MUSTDROP_CPU_CAPABILITY=level, **more)
        status |= subprocess.run(pytest_command(["-n", "2", *CPU_SUITE]), cwd=ROOT, env=environment).returncode
    return status


def cuda_suite() -> int:
    """The CUDA kernels and their launchers, in the emulation."""
    more = {"MUSTDROP_EMULATION_SAMPLE": "1", "MUSTDROP_EMULATION_SANITIZER": "coverage"}
    suite = ["tests/ops", "tests/cuda_emulation/test_paths.py", "-m", "not slow", "-k", "cuda_emulated or test_paths"]
    return subprocess.run(
        pytest_command(["-n", "2", *suite]), cwd=ROOT, env=environment_with(FOLDER / "site", **more)
    ).returncode


SUITES: dict[str, Callable[[], int]] = {
    "python": python_suite,
    "triton": triton_suite,
    "vllm": vllm_suite,
    "cpu": cpu_suite,
    "cuda": cuda_suite,
}


def report() -> dict[str, Any]:
    """Print the lines that were not reached; returns the document."""
    python = [sys.executable, "-m", "coverage"]
    settings = f"--rcfile={FOLDER / 'rc'}"
    if list(FOLDER.glob("data.*")):
        combine = [*python, "combine", "-q", "--append", settings]
        subprocess.run(combine, check=True, cwd=ROOT)
    subprocess.run([*python, "report", settings, "--show-missing", "--skip-covered"], check=True, cwd=ROOT)
    subprocess.run([*python, "json", settings, "-q", "-o", str(FOLDER / "python.json")], check=True, cwd=ROOT)
    gcovr = [str(BIN / "gcovr"), "--root", str(ROOT), "--filter", "csrc/", str(FOLDER / "cmake"), str(EMULATED)]
    gcovr += ["--merge-mode-functions=merge-use-line-min", "--gcov-ignore-parse-errors"]
    subprocess.run([*gcovr, "--json-summary", str(FOLDER / "csrc.json"), "--txt", "-"], check=True, cwd=ROOT)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe(torch.device("cpu"), 1),
        "csrc": _sums(
            {f["filename"]: (f["line_total"], f["line_covered"]) for f in _read("csrc")["files"] if f["line_total"]}
        ),
        "python": _sums(
            {
                name: (f["summary"]["num_statements"], f["summary"]["covered_lines"])
                for name, f in _read("python")["files"].items()
            }
        ),
    }


def _read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def _sums(files: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Numbers of lines and of reached lines; by file the number of those not reached."""
    lines, reached = (sum(numbers) for numbers in zip(*files.values(), strict=True))
    left = {name: total - found for name, (total, found) in sorted(files.items()) if found < total}
    return {"lines": lines, "reached": reached, "percent": round(100 * reached / lines, 1), "not_reached": left}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="*", choices=tuple(SUITES), help="these, added to earlier counts")
    parser.add_argument("--json", type=Path, help="write the sums there")
    options = parser.parse_args()
    chosen = options.suites
    build("coverage")
    (FOLDER / "rc").write_text(RUN)
    if chosen is None:
        for old in [*FOLDER.rglob("*.gcda"), *EMULATED.glob("*.gcda"), *FOLDER.glob("data*")]:
            old.unlink()
    status = 0
    for suite in SUITES if chosen is None else chosen:
        print(f"suite {suite}", flush=True)
        status |= SUITES[suite]()
    document = report()
    print({name: document[name]["percent"] for name in ("csrc", "python")})
    if options.json is not None:
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
