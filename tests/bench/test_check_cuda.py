# SPDX-License-Identifier: Apache-2.0
"""bench/check_cuda.py: what it reads out of a compiler's report and a disassembly, recorded here, and that it minds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "check_cuda.py"


def load():
    spec = importlib.util.spec_from_file_location("check_cuda", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_cuda = load()

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

DISASSEMBLY = f"""	.target	sm_90a

	.section	.text.{WIDE},"ax",@progbits
	.align	128
        .global         {WIDE}
{WIDE}:
.text.{WIDE}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R11, SR_TID.X ;
        /*0030*/                   ISETP.GE.AND P0, PT, R11, UR5, PT ;
        /*0040*/               @P0 EXIT ;
        /*0080*/                   LDG.E.128.CONSTANT R8, desc[UR6][R2.64] ;
.L_x_2:
        /*0090*/                   IMAD.WIDE R4, R11, 0x10, R8 ;
        /*00a0*/                   LDG.E.128 R12, desc[UR6][R4.64] ;
        /*00d0*/                   ISETP.GE.AND P0, PT, R11, UR5, PT ;
        /*00e0*/                   STG.E.128 desc[UR6][R2.64], R12 ;
        /*00f0*/              @!P0 BRA `(.L_x_2) ;
        /*0100*/                   EXIT ;
.L_x_3:
        /*0110*/                   BRA `(.L_x_3);
        /*0120*/                   NOP;
.L_x_5:

	.section	.nv.constant0,"a"
"""


def test_report():
    kernels = check_cuda.parse_ptxas(PTXAS, "90a", "gather")
    assert list(kernels) == [NARROW, WIDE]
    narrow, wide = kernels[NARROW], kernels[WIDE]
    assert (narrow.registers, narrow.shared_bytes, narrow.stack_bytes, narrow.spill_bytes) == (14, 0, 0, 0)
    assert (wide.registers, wide.shared_bytes, wide.stack_bytes, wide.spill_bytes) == (18, 1024, 16, 12)
    assert wide.target == "90a"
    assert wide.load16 is None
    if shutil.which("c++filt"):
        assert wide.name == "copy_write_kernel<uint4>"


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void mustdrop::gather_kernel<uint4, true>(mustdrop::GatherParameters)", "gather_kernel<uint4, true>"),
        (
            "void mustdrop::merge_write_kernel<mustdrop::half_t, (int)8>(mustdrop::M)",
            "merge_write_kernel<half_t, 8>",
        ),
        ("mustdrop::merge_rank_kernel(mustdrop::MergeParameters)", "merge_rank_kernel"),
        ("void (anonymous namespace)::scale<(bool)1>(float*)", "scale<1>"),
    ],
)
def test_readable_names(signature, name):
    assert check_cuda.readable(signature) == name


def test_instructions_count_in_loops_alone():
    functions = dict(check_cuda.sections(DISASSEMBLY.splitlines()))
    assert list(functions) == [WIDE]
    assert check_cuda.count_instructions(functions[WIDE]) == {"load16": 1, "store16": 1, "matrix": 0}
    forwards = [line.replace("(.L_x_2)", "(.L_x_3)") for line in functions[WIDE]]
    assert check_cuda.count_instructions(forwards) == {"load16": 0, "store16": 0, "matrix": 0}


def test_a_block_that_branches_back_from_behind_the_loop():
    code = """.L_x_1:
        /*0000*/              @P1 BRA `(.L_x_9) ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   BRA.U UP0, `(.L_x_1) ;
        /*0030*/                   STG.E.128 desc[UR6][R2.64], R12 ;
        /*0040*/                   EXIT ;
.L_x_9:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R2.64] ;
        /*0060*/                   BRA `(.L_x_2) ;"""
    assert check_cuda.count_instructions(code.splitlines()) == {"load16": 1, "store16": 0, "matrix": 1}


@pytest.fixture
def good():
    return check_cuda.Kernel("gather_kernel<uint4, true>", "90a", "gather", 40, 0, 0, 0, load16=4, store16=4, matrix=0)


def test_a_good_kernel(good):
    assert check_cuda.judge([good], ["gather"], ["90a"]) == []
    assert check_cuda.judge([replace(good, name="select_kernel<float>", load16=0, store16=0)], [], []) == []
    unread = replace(good, load16=None, store16=None, matrix=None)
    assert check_cuda.judge([unread], ["attention_scores"], ["90a"]) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"stack_bytes": 16}, "16 bytes of local memory"),
        ({"load16": 0}, "no 16-byte load"),
        ({"store16": 0}, "no 16-byte store"),
        ({"name": "score_kernel<half_t, 64>", "load16": 0, "matrix": 8}, "feeds its matrix instructions"),
        ({"name": "merge_similarity_kernel<float, 4>", "load16": 0}, "no 16-byte load"),
    ],
)
def test_what_is_refused(good, change, what):
    problems = check_cuda.judge([replace(good, **change)], ["gather"], ["90a"])
    assert len(problems) == 1
    assert what in problems[0]
    assert problems[0].startswith("sm_90a: ")


def test_scores_need_matrix_instructions(good):
    plain = replace(good, folder="attention_scores", name="score_kernel<float, 64>")
    half = replace(plain, name="score_kernel<half_t, 64>", matrix=8)
    brain = replace(plain, name="score_kernel<bfloat16_t, 64>", matrix=8)
    assert check_cuda.judge([plain, half, brain], ["attention_scores"], ["90a"]) == []
    (problem,) = check_cuda.judge([plain, half, replace(brain, matrix=0)], ["attention_scores"], ["90a"])
    assert "no kernel of bfloat16_t with matrix instructions" in problem


def test_table(good):
    other = replace(good, target="80", registers=38, store16=2)
    text = check_cuda.table([good, other], ["90a", "80"]).splitlines()
    assert text[0].split()[:3] == ["registers", "sm_90a", "sm_80"]
    assert text[1].split() == ["gather_kernel<uint4,", "true>", "40", "38", "0", "0", "0", "|", "4", "2", "0"]


def test_every_cuda_source_is_found():
    found = check_cuda.find_sources(None)
    assert {p.parent.name for p in found} == {p.parent.name for p in (ROOT / "csrc").glob("*/cuda*.cu")} != set()
    assert {p.parent.name for p in check_cuda.find_sources("gather,select")} == {"gather", "select"}


def test_without_a_compiler(tmp_path):
    """It says that it was skipped, and why; asked for, it fails."""
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'no cicc here' >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = {**os.environ, "MUSTDROP_NVCC": str(broken)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "skipped" in done.stdout
    assert "no cicc here" in done.stdout
    done = subprocess.run([sys.executable, str(SCRIPT), "--require"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["90a", "ptx"])
def test_a_small_file_through_the_compiler(tmp_path, target):
    nvcc = check_cuda.find_nvcc()
    if nvcc is None or check_cuda.why_no_compiler(nvcc):
        pytest.skip("nvcc was not found, or cannot compile")
    nvdisasm = check_cuda.find_nvdisasm(nvcc)
    source = tmp_path / "copy" / "cuda.cu"
    source.parent.mkdir()
    source.write_text(SOURCE)
    kernels, problems = check_cuda.examine_all(nvcc, nvdisasm, [source], [target], 1)
    assert problems == check_cuda.judge(kernels, ["copy"], [target]) == []
    assert len(kernels) == 2
    assert all(4 < kernel.registers < 64 for kernel in kernels)
    if nvdisasm:
        assert sorted((k.load16, k.store16) for k in kernels) == [(0, 0), (1, 1)]
    source.write_text(SOURCE.replace("to[i] = from[i];", "{ int unused; to[i] = from[i]; }"))
    _, problems = check_cuda.examine_all(nvcc, nvdisasm, [source], [target], 1)
    assert "unused" in problems[0]
