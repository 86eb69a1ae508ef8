# SPDX-License-Identifier: Apache-2.0
"""Build script, which runs CMake. The metadata is in pyproject.toml.

Environment:
  MUSTDROP_CUDA_ARCHS  CUDA targets, such as "80;90;100;120". Default: those of the GPUs present, else none.
  MUSTDROP_NVCC        path of nvcc; default: $CUDACXX, $CUDA_HOME/bin/nvcc, PATH, /usr/local/cuda/bin/nvcc.
  MUSTDROP_CMAKE_ARGS  further arguments for CMake, such as "-DMUSTDROP_WERROR=ON".
                       An in-place build reuses libraries whose digest of sources matches, from any machine.
  MUSTDROP_PORTABLE    1: without the module _native, so that one wheel serves every Python (py3-none); `make wheel`.
  MAX_JOBS             parallel compile jobs; default: the number of cores.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PORTABLE = os.environ.get("MUSTDROP_PORTABLE") == "1"
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{'any' if PORTABLE else sys.implementation.cache_tag}"
LIBRARY_FOLDER = "lib"  # mustdrop_kernels/lib holds libmustdrop and its companions
HEADERS = "kernels"  # below it: the CUDA kernels as text
SOURCES = runpy.run_path(str(ROOT / "mustdrop_kernels" / "_sources.py"))
find_nvcc = SOURCES["find_nvcc"]
CMAKE_ARGS = os.environ.get("MUSTDROP_CMAKE_ARGS", "")


def archs_of_gpus_present() -> str:
    """Compute capabilities of this machine's GPUs as CUDA targets ("80;90"), empty without a GPU."""
    return ";".join(SOURCES["targets_of_gpus"]())


def wanted_archs() -> str:
    """CUDA targets: MUSTDROP_CUDA_ARCHS, else those of the GPUs present."""
    asked = os.environ.get("MUSTDROP_CUDA_ARCHS")
    return archs_of_gpus_present() if asked is None else asked.strip()


def cuda_arguments() -> list[str]:
    """CMake arguments of the CUDA library; prints the reason if it is not built."""
    asked = os.environ.get("MUSTDROP_CUDA_ARCHS")
    archs = wanted_archs()
    if not archs:
        print("mustdrop: no CUDA library (no GPU found; MUSTDROP_CUDA_ARCHS=80;90 builds for others)")
        return []
    nvcc = find_nvcc()
    if nvcc is None:
        message = f"mustdrop: no CUDA library for {archs}: nvcc was not found (set MUSTDROP_NVCC or CUDA_HOME)"
        if asked is not None:
            raise SystemExit(message)
        print(message + "; on a GPU Triton is used")
        return []
    print(f"mustdrop: building the CUDA library for {archs} with {nvcc}")
    return [f"-DMUSTDROP_CUDA_ARCHS={archs}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]


SHARED_HEADERS = ("common/token_types.h", "spatial_merge/norms.h")  # of CPU and CUDA kernels


def kernel_headers() -> list[Path]:
    """Headers of the CUDA kernels relative to csrc/, which the backend `cupy` compiles at run time."""
    paths = [*(ROOT / "csrc").glob("*/*.cuh"), *(ROOT / "csrc" / name for name in SHARED_HEADERS)]
    return sorted(path.relative_to(ROOT / "csrc") for path in paths)


class CMakeBuild(build_ext):
    """Build all libraries in one CMake run and install them into the package."""

    def run(self) -> None:
        folder = ROOT / "mustdrop_kernels" / LIBRARY_FOLDER
        archs = [target for target in wanted_archs().split(";") if target]
        if self.inplace and SOURCES["made_of_these"](folder, ROOT, archs, CMAKE_ARGS):
            print(f"mustdrop: the libraries in {folder.relative_to(ROOT)} were built from these sources and are used")
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        self.configure()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([self.cmake(), "--build", str(BUILD), "--parallel", jobs], check=True)
        if not self.editable_mode:
            self.put_libraries(Path(self.build_lib) / "mustdrop_kernels")

    def copy_extensions_to_source(self) -> None:
        """Hook of setuptools for in-place and editable builds."""
        self.put_libraries(ROOT / "mustdrop_kernels")

    @staticmethod
    def put_libraries(package: Path) -> None:
        folder = package / LIBRARY_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("libmustdrop*"), *package.glob("_native*.so")):
            old.unlink()
        cache = (BUILD / "CMakeCache.txt").read_text()
        targets = re.search("^MUSTDROP_CUDA_ARCHS:.*?=(.*)$", cache, re.MULTILINE)
        archs = [target for target in (targets[1] if targets else "").split(";") if target]
        for library in BUILD.glob("libmustdrop*.so"):
            if archs or library.stem != "libmustdrop_cuda":  # otherwise it is from an earlier build
                shutil.copy2(library, folder)
        for module in BUILD.glob("_native*.so"):
            shutil.copy2(module, package)
        shutil.rmtree(folder / HEADERS, ignore_errors=True)
        for header in kernel_headers():
            (folder / HEADERS / header).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / "csrc" / header, folder / HEADERS / header)
        SOURCES["write_record"](folder, ROOT, archs, CMAKE_ARGS)

    def configure(self) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        arguments = [
            f"-DMUSTDROP_VERSION={self.distribution.get_version()}",
            f"-DMUSTDROP_TORCH={torch_folder()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMUSTDROP_NATIVE={'OFF' if PORTABLE else 'ON'}",
            f"-DMUSTDROP_LINE_INFO={'OFF' if PORTABLE else 'ON'}",
            "-DMUSTDROP_CUDA_ARCHS=",
            *cuda_arguments(),
            *shlex.split(CMAKE_ARGS),
        ]
        if pybind11 := pybind11_folder():
            arguments.append(f"-Dpybind11_DIR={pybind11}")
        command = [self.cmake(), "-S", str(ROOT), "-B", str(BUILD), *arguments]
        if not (BUILD / "CMakeCache.txt").exists() and (ninja := find_ninja()):
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(command, check=True)

    @staticmethod
    def cmake() -> str:
        found = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if found is None:
            raise SystemExit("mustdrop: CMake was not found; `pip install cmake` gives it")
        return found

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "mustdrop_kernels"
        libraries = (*package.glob(f"{LIBRARY_FOLDER}/*.so"), package / LIBRARY_FOLDER / SOURCES["RECORD"])
        headers = package.glob(f"{LIBRARY_FOLDER}/{HEADERS}/*/*.*h")
        return [str(p) for p in (*libraries, *headers, *package.glob("_native*.so"))]

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY_FOLDER, "libmustdrop.so")


class Wheel(bdist_wheel):
    """The operator libraries do not depend on Python: without `_native` one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        native = any(Path(self.bdist_dir or "").glob("mustdrop_kernels/_native*.so"))
        return (python, abi, platform) if native else ("py3", "none", platform)


def options() -> dict[str, dict[str, str]]:
    """Version suffix of a portable wheel with the CUDA library: 0.1.0+cu130."""
    nvcc = find_nvcc()
    if not (PORTABLE and nvcc and os.environ.get("MUSTDROP_CUDA_ARCHS")):
        return {}
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    return {"egg_info": {"tag_build": f"+cu{release[1]}{release[2]}"}} if release else {}


def torch_folder() -> Path:
    """torch's package folder, without importing torch (which takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("mustdrop: torch was not found; install it first (torch >= 2.10)")
    return Path(spec.origin).parent


def pybind11_folder() -> str | None:
    if importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    return pybind11.get_cmake_dir()


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


setup(
    ext_modules=[Extension("mustdrop_kernels.libmustdrop", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    options=options(),
)
