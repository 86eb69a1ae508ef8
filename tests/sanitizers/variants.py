# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU library another way, beside the usual one, and runs tests with it.

    python tests/sanitizers/variants.py asan [PYTEST ARGUMENTS]    # AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/sanitizers/variants.py coverage                   # lines of csrc and of the Python code

A variant is a folder build/VARIANT/site that is put first on the path: the package's files by symbolic links, and its
own library. There is one more, amx, for tests/backends/test_cpu_amx.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "tests"))

from cuda_emulation import building  # noqa: E402

OPTIONS = {
    "asan": "-DMUSTDROP_SANITIZE=ON",
    "coverage": "-DMUSTDROP_COVERAGE=ON",
    "amx": "-DMUSTDROP_AMX_PLAIN=ON",
}
LEVELS = ("baseline", "avx2", "avx512")
CPU_SUITE = ["tests/ops", "-m", "not slow", "-k", "cpu-cpu"]
# What runs Python in processes of its own would run it without counting.
PYTHON_SUITE = [
    "tests/ops", "tests/backends/test_registry.py", "tests/integrations", "tests/cli", "tests/bench", "tests/fuzz",
    "tests/test_account.py", "tests/test_config.py", "tests/test_engines.py", "tests/test_files.py",
    "tests/test_parallel.py", "tests/test_stages.py", "tests/test_concurrency.py",
    "--ignore=tests/integrations/vllm_plugin",
    "-m", "not slow", "-k", "not cuda_emulated and not triton",
]  # fmt: skip
TRITON_SUITE = ["tests/ops", "tests/backends", "-m", "not slow", "-k", "triton and not subprocess"]


def build(variant: str) -> Path:
    """The folder to put first on the path."""
    folder = ROOT / "build" / variant
    (folder / "cmake").mkdir(parents=True, exist_ok=True)
    cmake = shutil.which("cmake", path=f"{BIN}{os.pathsep}{os.environ['PATH']}") or "cmake"
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    configure = [cmake, "-S", str(ROOT), "-B", str(folder / "cmake"), "-G", "Ninja", OPTIONS[variant]]
    configure += [
        f"-DMUSTDROP_TORCH={building._torch()}",
        "-DMUSTDROP_CUDA_ARCHS=",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    compile_it = [cmake, "--build", str(folder / "cmake"), "--target", "mustdrop", "--parallel", jobs]
    subprocess.run(compile_it, check=True, env=environment, stdout=subprocess.DEVNULL)
    package = folder / "site" / "mustdrop_kernels"
    shutil.rmtree(package, ignore_errors=True)
    (package / "lib").mkdir(parents=True)
    for entry in (ROOT / "mustdrop_kernels").iterdir():
        if entry.name not in ("lib", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "lib" / "libmustdrop.so").symlink_to(folder / "cmake" / "libmustdrop.so")
    return folder / "site"


def environment_with(site: Path, **more: str) -> dict[str, str]:
    """The environment of a process that imports the variant."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **more}


def pytest_command(arguments: list[str], *before: str) -> list[str]:
    """pytest as a script: ``python -m`` would put this source tree before the variant."""
    return [sys.executable, *before, str(BIN / "pytest"), "-q", "-p", "no:cacheprovider", *arguments]


def asan(arguments: list[str]) -> int:
    """The CPU backend's conformance suite, or what is given; the first finding ends the process."""
    sanitizer = building.preload("address")
    # Results that no memory holds are refused, as without a sanitizer.
    sanitizer["ASAN_OPTIONS"] += ":allocator_may_return_null=1:log_path=stderr"
    more = {
        **sanitizer,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MUSTDROP_TEST_BACKENDS": "cpu",
        "MUSTDROP_EMULATION_SAMPLE": "0",
    }
    site = build("asan")
    done = subprocess.run(pytest_command(arguments or CPU_SUITE), cwd=ROOT, env=environment_with(site, **more))
    return done.returncode


def coverage() -> int:
    """Prints the share of lines, and what was not reached; writes build/coverage/summary.json."""
    site, folder = build("coverage"), ROOT / "build" / "coverage"
    for old in [*folder.rglob("*.gcda"), *folder.glob("data*")]:
        old.unlink()
    status = 0
    count = ["-m", "coverage", "run", "-p", f"--data-file={folder / 'data'}", f"--source={ROOT / 'mustdrop_kernels'}"]
    runs = [(PYTHON_SUITE, {"MUSTDROP_EMULATION_SAMPLE": "0"}), (TRITON_SUITE, {"TRITON_INTERPRET": "1"})]
    for suite, more in runs:
        chosen = {"MUSTDROP_TEST_BACKENDS": "triton"} if "TRITON_INTERPRET" in more else {}
        command = pytest_command(suite, *count)
        status |= subprocess.run(command, cwd=ROOT, env=environment_with(site, **more, **chosen)).returncode
    for level in LEVELS:
        more = {"MUSTDROP_CPU_CAPABILITY": level, "MUSTDROP_TEST_BACKENDS": "cpu", "MUSTDROP_EMULATION_SAMPLE": "0"}
        status |= subprocess.run(pytest_command(CPU_SUITE), cwd=ROOT, env=environment_with(site, **more)).returncode
    report(folder)
    return status


def report(folder: Path) -> None:
    """The tables, and their sums as JSON."""
    python = [sys.executable, "-m", "coverage"]
    data = f"--data-file={folder / 'data'}"
    subprocess.run([*python, "combine", data, *map(str, folder.glob("data.*"))], check=True, cwd=ROOT)
    subprocess.run([*python, "report", data, "--show-missing", "--skip-covered"], check=True, cwd=ROOT)
    subprocess.run([*python, "json", data, "-q", "-o", str(folder / "python.json")], check=True, cwd=ROOT)
    gcovr = [str(BIN / "gcovr"), "--root", str(ROOT), "--filter", "csrc/", str(folder / "cmake")]
    gcovr += ["--merge-mode-functions=merge-use-line-min", "--exclude-unreachable-branches", "--exclude-throw-branches"]
    subprocess.run([*gcovr, "--json-summary", str(folder / "csrc.json"), "--txt", "-"], check=True, cwd=ROOT)
    csrc = json.loads((folder / "csrc.json").read_text())
    lines = json.loads((folder / "python.json").read_text())["totals"]
    summary = {
        "csrc": {"lines": csrc["line_total"], "covered": csrc["line_covered"], "percent": csrc["line_percent"]},
        "python": {
            "lines": lines["num_statements"],
            "covered": lines["covered_lines"],
            "percent": round(lines["percent_covered"], 1),
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


def main() -> None:
    """The command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in OPTIONS:
        sys.exit(f"usage: {Path(sys.argv[0]).name} {'|'.join(OPTIONS)} [PYTEST ARGUMENTS]")
    sys.exit(asan(sys.argv[2:]) if sys.argv[1] == "asan" else coverage())


if __name__ == "__main__":
    main()
