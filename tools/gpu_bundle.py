# SPDX-License-Identifier: Apache-2.0
"""Bundle for bench/run_on_gpu.sh: everything that can be prepared without a GPU, in a folder for the GPU machine.

The CUDA library for that GPU, the wheels of the benchmark's baselines, and with --triton the compiled Triton kernels.
bench/run_on_gpu.sh unpacks the folder there and skips, with a reason, parts that do not match (other sources, another
Triton).
MUSTDROP_GPU_BUNDLE names another folder than gpu-bundle/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = runpy.run_path(str(ROOT / "mustdrop_kernels" / "_sources.py"))
FOLDER = Path(os.environ.get("MUSTDROP_GPU_BUNDLE") or ROOT / "gpu-bundle")
INSTALLED = ROOT / "mustdrop_kernels" / "lib"
DOCUMENT, FAILED, WHEELS, LIBRARIES = "bundle.json", "failed.txt", "wheels", "lib"
BASELINES = ("flash-colreduce==0.2.2", "flash-colsum==0.1.0")
MOST_BYTES = 40 << 20
CORES = 16  # of the GPU machine, for the printed command lines


@dataclasses.dataclass
class Unpacked:
    """Usable contents of the bundle."""

    commit: str | None = None
    site_packages: list[Path] = dataclasses.field(default_factory=list)
    triton_cache: str | None = None
    remarks: list[str] = dataclasses.field(default_factory=list)


# ------------------------------------------------------------------------------------------------- use


def unpack(site: Path) -> Unpacked:
    """Install the library in place and the wheels into ``site``, if there is a bundle."""
    if not (FOLDER / DOCUMENT).is_file():
        return Unpacked()
    found = Unpacked(commit=json.loads((FOLDER / DOCUMENT).read_text())["commit"])
    carried = SOURCES["record"](FOLDER / LIBRARIES) or {}
    if carried.get("sources") == SOURCES["digest"](ROOT):
        shutil.rmtree(INSTALLED, ignore_errors=True)
        shutil.copytree(FOLDER / LIBRARIES, INSTALLED)
    else:
        found.remarks.append("gpu-bundle: its library is of other sources and is not used")
    for wheel in sorted((FOLDER / WHEELS).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:  # pure Python
            archive.extractall(site)
    found.site_packages.append(site)
    for document in FOLDER.glob("triton-cache-*.json"):
        command = [sys.executable, "tools/triton_cache.py", str(document)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found.triton_cache = done.stdout.strip() or None
        found.remarks += [f"gpu-bundle: {line}" for line in done.stderr.splitlines()]
    return found


def is_prebuilt(archs: list[str]) -> bool:
    """True if the CUDA library for these targets, in place or in the bundle, was built from these sources."""
    return any(
        (SOURCES["record"](folder) or {}).get("cuda_archs") and SOURCES["made_of_these"](folder, ROOT, archs)
        for folder in (INSTALLED, FOLDER / LIBRARIES)
    )


# ------------------------------------------------------------------------------------------------- creation


def git_commit() -> str | None:
    """The commit of this tree, with "+" if files differ from it; None without a history."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def add_library(archs: str) -> str:
    """Build the libraries for CUDA targets, beside those in use."""
    folder = FOLDER / LIBRARIES
    if not SOURCES["made_of_these"](folder, ROOT, archs.split(";")):
        built = ROOT / "build" / "gpu-bundle"
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(built)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "MUSTDROP_CUDA_ARCHS": archs})
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(built / "mustdrop_kernels" / "lib", folder)
    return f"the libraries for {archs}"


def add_wheels() -> str:
    """Download the wheels of baselines; an unavailable baseline is left out of the benchmark."""
    folder = FOLDER / WHEELS
    folder.mkdir(exist_ok=True)
    missing = [one for one in BASELINES if not list(folder.glob(f"{one.replace('-', '_').replace('==', '-')}-*.whl"))]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    if missing and subprocess.run([*command, *missing]).returncode:
        return f"no wheels of {', '.join(missing)}: they could not be downloaded"
    return f"wheels of {', '.join(baseline.partition('==')[0] for baseline in BASELINES)}"


def add_triton(python: str, jobs: int) -> str:
    """Compile the Triton kernels with the Python and Triton of the GPU machine."""
    command = [python, "tools/precompile_triton.py", "--target", "sm90", "--out", str(FOLDER), "--jobs", str(jobs)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return "compiled Triton kernels"


def size(folder: Path) -> int:
    """Size of the files in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def command_lines(commit: str | None) -> str:
    """Command lines for the GPU machine."""
    variable = f"MUSTDROP_COMMIT={shlex.quote(commit)} " if commit else ""
    runs = "".join(f"  {variable}bench/run_on_gpu.sh {run}\n" for run in ("first", "second"))
    return f"Carry {FOLDER.name}/. On a machine with {CORES} cores (tests run in {CORES - 2} workers):\n{runs}"


def main() -> int:
    """Create the bundle and print its usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="90", help="CUDA targets (default: %(default)s)")
    parser.add_argument("--triton", metavar="PYTHON", help="compile the Triton kernels too, with this interpreter")
    parser.add_argument("--failed", type=Path, help="failed.txt of `first`: the tests that `second` begins with")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    try:
        parts = [add_library(options.archs), add_wheels()]
        if options.triton:
            parts.append(add_triton(options.triton, options.jobs))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{FOLDER.name} was not made: {error}", file=sys.stderr)
        return 1
    (FOLDER / FAILED).unlink(missing_ok=True)
    if options.failed:
        shutil.copy(options.failed, FOLDER / FAILED)
        parts.append(f"{len(options.failed.read_text().splitlines())} tests that failed before")
    commit = git_commit()
    document: dict[str, Any] = {"commit": commit, "sources": SOURCES["digest"](ROOT), "parts": parts}
    (FOLDER / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
    bytes_now = size(FOLDER)
    print(f"{FOLDER.name}: {bytes_now / 2**20:.1f} MiB: {'; '.join(parts)}")
    if bytes_now > MOST_BYTES:
        print(f"{FOLDER.name} is larger than the {MOST_BYTES >> 20} MiB that can be carried", file=sys.stderr)
        return 1
    print(command_lines(commit), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
