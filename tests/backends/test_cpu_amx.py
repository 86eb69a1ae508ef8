# SPDX-License-Identifier: Apache-2.0
"""AMX tiles of bfloat16: the scalar emulation, and the compiled instructions."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import output_of_python
from sanitizers import variants

from mustdrop_kernels import _load

REPOSITORY = Path(__file__).parents[2]
SCORES = """
import json, torch, mustdrop_kernels
from mustdrop_kernels import _load
g = torch.Generator().manual_seed(0)
q, k = (torch.randn(1, 2, n, 64, generator=g).bfloat16() for n in (40, 200))
types = torch.full((1, 200), 2, dtype=torch.uint8)
types[:, 180:] = 3
total, peak = torch.ops.mustdrop.text_vision_scores(q, k, types, 0.125)
print(json.dumps([_load.cpu_capability(), total[0].tolist()]))
"""

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is x86-64's")


def test_the_library_multiplies_tiles() -> None:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    code = subprocess.run([objdump, "-d", str(_load.core.path)], check=True, capture_output=True, text=True).stdout
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in code


@pytest.fixture(scope="module")
def site() -> Path:
    """A build of the library with emulated tiles."""
    if _load.cpu_capability() != "avx512_bf16":
        pytest.skip(f"tiles are added to avx512_bf16, this machine has {_load.cpu_capability()}")
    return variants.build("amx")


@pytest.mark.slow
def test_tiles_are_used(site: Path, tmp_path: Path) -> None:
    """Tiles sum even and odd products separately, so that the results differ from avx512_bf16."""
    totals = []
    for level in ("amx_bf16", "avx512_bf16"):
        environment = variants.environment_with(site, MUSTDROP_CPU_CAPABILITY=level)
        capability, total = json.loads(output_of_python("-c", SCORES, folder=tmp_path, **environment))
        assert capability == level
        totals.append(total)
    assert totals[0] != totals[1]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_conformance(site: Path) -> None:
    files = [f"tests/ops/test_{name}.py" for name in ("text_vision_scores", "text_vision_packed")]
    files.append("tests/fuzz/test_fuzz.py")
    environment = variants.environment_with(site, MUSTDROP_CPU_CAPABILITY="amx_bf16", MUSTDROP_TEST_BACKENDS="cpu")
    command = variants.pytest_command([*files, "-m", "not slow", "-k", "cpu or test_fuzz"])
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
