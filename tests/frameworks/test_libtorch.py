# SPDX-License-Identifier: Apache-2.0
"""The C++ example builds against torch alone and calls an operator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mustdrop_kernels import _load

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "libtorch"
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.exists(), reason="not in a source checkout"),
    pytest.mark.skipif(CMAKE is None or shutil.which("g++") is None, reason="no CMake or no C++ compiler"),
]


def test_an_operator_from_cpp(tmp_path: Path) -> None:
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run([CMAKE, "-S", EXAMPLE, "-B", tmp_path, prefix], check=True, capture_output=True)
    subprocess.run([CMAKE, "--build", tmp_path], check=True, capture_output=True)
    done = subprocess.run([tmp_path / "merge", _load.core.path], check=True, capture_output=True, text=True)
    assert done.stdout == "17 tokens became 5\n"
    refused = subprocess.run([tmp_path / "merge", tmp_path / "none.so"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "none.so" in refused.stderr
