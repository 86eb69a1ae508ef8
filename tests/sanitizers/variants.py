# SPDX-License-Identifier: Apache-2.0
"""Builds variants of the CPU library and runs tests with them.

    python tests/sanitizers/variants.py asan [PYTEST ARGUMENTS]    # AddressSanitizer and UndefinedBehaviorSanitizer

A variant is a folder build/VARIANT/site for the front of the path: symbolic links to the package's files, and its own
library. Two more variants: coverage, for line_coverage.py, and amx, for tests/backends/test_cpu_amx.py.
"""

from __future__ import annotations

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
    "asan": ["-DMUSTDROP_SANITIZE=ON"],
    "coverage": ["-DMUSTDROP_COVERAGE=ON", "-DMUSTDROP_AMX_PLAIN=ON"],
    "amx": ["-DMUSTDROP_AMX_PLAIN=ON"],
}
CPU_SUITE = ["tests/ops", "-m", "not slow", "-k", "cpu-cpu"]


def build(variant: str) -> Path:
    """Build a variant; returns the folder for the front of the path."""
    folder = ROOT / "build" / variant
    (folder / "cmake").mkdir(parents=True, exist_ok=True)
    cmake = shutil.which("cmake", path=f"{BIN}{os.pathsep}{os.environ['PATH']}") or "cmake"
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    configure = [cmake, "-S", str(ROOT), "-B", str(folder / "cmake"), "-G", "Ninja", *OPTIONS[variant]]
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
    for entry in (ROOT / "mustdrop_kernels" / "lib").iterdir():
        (package / "lib" / entry.name).symlink_to(
            folder / "cmake" / entry.name if entry.stem == "libmustdrop" else entry
        )
    return folder / "site"


def environment_with(site: Path, **more: str) -> dict[str, str]:
    """The environment of a process that imports the variant."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **more}


def pytest_command(arguments: list[str], *before: str) -> list[str]:
    """pytest as a script: ``python -m`` would import this source tree and not the variant."""
    return [sys.executable, *before, str(BIN / "pytest"), "-q", "-p", "no:cacheprovider", *arguments]


def asan(arguments: list[str]) -> int:
    """Run the CPU backend's conformance suite, or the given tests; the first finding ends the process."""
    sanitizer = building.preload("address")
    sanitizer["ASAN_OPTIONS"] += ":log_path=stderr"
    more = {
        **sanitizer,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MUSTDROP_TEST_BACKENDS": "cpu",
        "MUSTDROP_EMULATION_SAMPLE": "0",
    }
    site = build("asan")
    done = subprocess.run(pytest_command(arguments or CPU_SUITE), cwd=ROOT, env=environment_with(site, **more))
    return done.returncode


def main() -> None:
    """The command line."""
    if sys.argv[1:2] != ["asan"]:
        sys.exit(f"usage: {Path(sys.argv[0]).name} asan [PYTEST ARGUMENTS]")
    sys.exit(asan(sys.argv[2:]))


if __name__ == "__main__":
    main()
