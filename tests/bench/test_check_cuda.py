# SPDX-License-Identifier: Apache-2.0
"""tools/check_cuda.py: what it reads out of a compiler's report, what it prints, and its status."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import check_cuda
import pytest
from cuda_static import compiling, known_faults, report, rules
from cuda_static.kernel import Code, Kernel, generic
from processes import output_of_python, run_python

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "check_cuda.py"

SOURCE = """
namespace mustdrop {
template <class Piece>
__global__ void copy_write_kernel(const Piece* from, Piece* to, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}
template __global__ void copy_write_kernel<uint4>(const uint4*, uint4*, int);
template __global__ void copy_write_kernel<unsigned>(const unsigned*, unsigned*, int);
}  // namespace mustdrop
"""
WIDE = "_ZN8mustdrop17copy_write_kernelI5uint4EEvPKT_PS2_i"
NARROW = "_ZN8mustdrop17copy_write_kernelIjEEvPKT_PS1_i"

PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NARROW}' for 'sm_90a'
ptxas info    : Function properties for {NARROW}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers
ptxas info    : Compile time = 6.494 ms
ptxas info    : Compiling entry function '{WIDE}' for 'sm_90a'
ptxas info    : Function properties for {WIDE}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 536 bytes cmem[0]
ptxas info    : Compile time = 2.303 ms
"""


def test_report():
    kernels = compiling.parse_ptxas(PTXAS, "90a", "gather")
    assert list(kernels) == [NARROW, WIDE]
    narrow, wide = kernels[NARROW], kernels[WIDE]
    assert (narrow.registers, narrow.shared_bytes, narrow.stack_bytes, narrow.spill_bytes) == (14, 0, 0, 0)
    assert (wide.registers, wide.shared_bytes, wide.stack_bytes, wide.spill_bytes) == (18, 1024, 16, 12)
    assert wide.target == "90a"
    assert wide.code is None
    if shutil.which("c++filt"):
        assert wide.name == "copy_write_kernel<uint4>"


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void mustdrop::gather_kernel<uint4, true>(mustdrop::GatherParameters)", "gather_kernel<uint4, true>"),
        ("void mustdrop::merge_write_kernel<mustdrop::half_t, (int)8>(mustdrop::M)", "merge_write_kernel<half_t, 8>"),
        ("mustdrop::merge_rank_kernel(mustdrop::MergeParameters)", "merge_rank_kernel"),
        ("void (anonymous namespace)::scale<(bool)1>(float*)", "scale<1>"),
    ],
)
def test_readable_names(signature, name):
    assert compiling.readable(signature) == name


def test_targets():
    assert [generic(target) for target in ("80", "90a", "100f", "ptx")] == ["80", "90", "100", "ptx"]
    assert check_cuda.TARGETS == ("80", "90", "100", "120", "ptx")


GOOD = Kernel("gather_kernel<uint4, true>", "90", "gather", 40, 0, 0, 0, Code(680, 4, 4, 0, None))


def test_table():
    other = replace(GOOD, target="80", registers=38, code=Code(672, 4, 2, 0, 5.25))
    text = report.kernel_table([GOOD, other], ["90", "80"]).splitlines()
    assert text[0].split()[:4] == ["registers", "sm_90", "sm_80", "|"]
    name = ["gather/gather_kernel<uint4,", "true>"]
    assert text[1].split() == [*name, "40", "38", "|", "680", "5.2", "0", "0", "0", "|", "4", "2", "0"]
    unread = report.kernel_table([replace(GOOD, code=None)], ["90"]).splitlines()
    assert unread[1].split() == [*name, "40", "|", "-", "-", "0", "0", "0", "|", "-", "-", "-"]


def test_table_of_faults():
    bad = replace(GOOD, spill_bytes=8)
    text = report.fault_table(rules.faults_of([bad, replace(GOOD, target="80")]), ["90", "80"]).splitlines()
    assert text[1].split() == ["spills", "gather/gather_kernel<uint4,", "true>", "8", "-"]
    assert report.fault_table([], ["90"]) == "no faults"


def test_every_cuda_source_is_found():
    found = compiling.find_sources(None)
    assert {p.parent.name for p in found} == {p.parent.name for p in (ROOT / "csrc").glob("*/cuda*.cu")} != set()
    assert {p.parent.name for p in compiling.find_sources("gather,select")} == {"gather", "select"}


def test_without_a_compiler(tmp_path):
    """It says that it was skipped, and why; asked for, it fails."""
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'no cicc here' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = output_of_python(SCRIPT, MUSTDROP_NVCC=str(broken))
    assert "skipped" in said
    assert "no cicc here" in said
    assert run_python(SCRIPT, "--require", MUSTDROP_NVCC=str(broken)).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["90", "90a", "ptx"])
def test_a_small_file_through_the_compiler(tmp_path, target):
    nvcc = compiling.find_nvcc()
    if nvcc is None or compiling.why_no_compiler(nvcc):
        pytest.skip("nvcc was not found, or cannot compile")
    nvdisasm = compiling.find_nvdisasm(nvcc)
    source = tmp_path / "copy" / "cuda.cu"
    source.parent.mkdir()
    source.write_text(SOURCE)
    kernels, problems = check_cuda.examine_all(nvcc, nvdisasm, [source], [target], 1)
    known = known_faults.parse(known_faults.LIST.read_text())
    assert problems == check_cuda.assess(kernels, ["copy"], [target], known, compiling.release_of(nvcc)) == []
    assert len(kernels) == 2
    assert all(4 < kernel.registers < 64 for kernel in kernels)
    if nvdisasm:
        assert sorted((k.code.load16, k.code.store16) for k in kernels) == [(0, 0), (1, 1)]
    source.write_text(SOURCE.replace("to[i] = from[i];", "{ int unused; to[i] = from[i]; }"))
    _, problems = check_cuda.examine_all(nvcc, nvdisasm, [source], [target], 1)
    assert "unused" in problems[0]
