# SPDX-License-Identifier: Apache-2.0
"""Cross-compilation: every Triton kernel in every shipped configuration compiles for every target and fits it.

A sample of kernels here; all of them, for all targets, in the slow tests and in `make check-triton`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mustdrop_kernels.backends import triton as backend

if backend.interpreted():
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)
if backend.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from mustdrop_kernels.backends.triton import configs, crosscompile

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(crosscompile.TARGETS))
def test_every_kernel_fits(target):
    problems = {}
    for unit in crosscompile.units(target):
        problem = crosscompile.problem(crosscompile.compile_unit(unit, target), target)
        if problem is not None:
            problems[unit.name] = problem
    assert not problems


def one_of(target: str, kernel: str, **constants: int) -> crosscompile.Unit:
    """A kernel in the first form that has these constants."""
    units = [unit for unit in crosscompile.units(target) if unit.kernel.__name__ == kernel]
    names = {unit: {unit.kernel.arg_names[i[0]]: value for i, value in unit.constants} for unit in units}
    return next(unit for unit in units if constants.items() <= names[unit].items())


@pytest.mark.parametrize("target", ["sm90", "gfx942", "gfx1100"])
def test_resources_are_read(target):
    needs = crosscompile.compile_unit(one_of(target, "scores_kernel", D=128, PAGE_SIZE=16), target)
    assert 32 < needs.registers <= crosscompile.TARGETS[target].registers
    assert needs.shared > 4096, "tiles of q and k are multiplied from there"
    assert crosscompile.problem(needs, target) is None


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("_compact_kernel", {"WIDTH": 128, "PAGE_SIZE": 0, "ALIGN_END": False}),
        ("_compact_kernel", {"WIDTH": 128, "PAGE_SIZE": 16, "ALIGN_END": True}),
        ("_gather_kernel", {"COLUMNS": 1024, "ALIGN_END": False}),
        ("_similarity_kernel", {"C": 1024}),
        ("_write_kernel", {"C": 1024}),
        ("_cls_scores_kernel", {"D": 64}),
    ],
    ids=str,
)
def test_rows_move_in_16_bytes(kernel, constants):
    """Accesses have 16 bytes; a mask that hides the alignment from the compiler costs eight times the instructions."""
    ptx = crosscompile.compiled(one_of("sm90", kernel, **constants), "sm90").asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert not re.search(r"ld\.global\.(b16|b8)\b", ptx)


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [("_compact_kernel", {"WIDTH": 128, "PAGE_SIZE": 0}), ("_plan_kernel", {"UNIFORM": False, "MERGED_FIRST": False})],
    ids=str,
)
def test_barriers_order_global_memory(kernel, constants):
    """Loads precede the stores that overwrite them, and stores of one warp are visible to loads of another.

    On AMD this requires fences of all memory around the barrier, not of shared memory only.
    """
    unit = one_of("gfx942", kernel, **constants)
    lines = crosscompile.compiled(unit, "gfx942").asm["llir"].splitlines()
    code = [line.strip() for line in lines if " fence " in f" {line}" or "@llvm.amdgcn.s.barrier()" in line]
    full = [
        i
        for i in range(1, len(code) - 1)
        if "s.barrier()" in code[i]
        and code[i - 1].startswith('fence syncscope("workgroup") release')
        and code[i + 1].startswith('fence syncscope("workgroup") acquire')
        and "mmra" not in code[i - 1] + code[i + 1]
    ]
    barriers = crosscompile.compiled(unit, "gfx942").asm["ttgir"].count("barrier all")
    assert len(full) >= max(barriers, 1)


@pytest.mark.parametrize("target", sorted(crosscompile.TARGETS))
def test_every_shipped_configuration_is_compiled(target, monkeypatch):
    """The compiled calls reach each entry of the tables."""
    monkeypatch.setattr(configs, "SEEN", set())
    assert crosscompile.units(target)
    used = {(kernel, shape) for _, kernel, shape in configs.SEEN}
    shipped = {(kernel, shape) for kernel, classes in configs.DEFAULT.items() for shape in classes}
    assert used == shipped
    assert {(kernel, shape) for arch, kernel, shape in configs.SPECIAL if arch == target} <= shipped


def test_exceeded_limits_are_reported():
    def needs(shared: int = 0, registers: int = 128, spilled: int = 0, num_warps: int = 4) -> crosscompile.Resources:
        return crosscompile.Resources(shared, registers, spilled, num_warps)

    assert all(crosscompile.problem(needs(48 * 1024), target) is None for target in crosscompile.TARGETS)
    assert "shared memory" in crosscompile.problem(needs(100 * 1024), "sm120")
    assert crosscompile.problem(needs(100 * 1024), "sm90") is None
    assert "spills 16" in crosscompile.problem(needs(registers=255, spilled=16), "sm90")
    assert "spills 16" in crosscompile.problem(needs(registers=128, spilled=16, num_warps=16), "sm90")
    assert "spills 400" in crosscompile.problem(needs(registers=96, spilled=400), "sm90")
    assert crosscompile.problem(needs(registers=96, spilled=40), "sm90") is None
    assert "registers in each of 16" in crosscompile.problem(needs(registers=160, num_warps=16), "sm90")
    assert "registers" in crosscompile.problem(needs(registers=300), "gfx1100")
    assert crosscompile.problem(needs(registers=300), "gfx942") is None


def test_the_command(tmp_path):
    """A row per kernel and target; the exit status is 1 if one does not fit."""
    file = tmp_path / "rows.json"
    code = (
        "import sys; from mustdrop_kernels.backends.triton import crosscompile; sys.path.insert(0, 'tools')\n"
        "import check_triton as check\n"
        "whole = crosscompile.units\n"
        "check.crosscompile.units = lambda target: [u for u in whole(target) if u.kernel.__name__ == '_rank_kernel']\n"
        "class Here:\n"
        "    def __init__(self, *_): pass\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): pass\n"
        "    def map(self, function, jobs, chunksize): return map(function, jobs)\n"
        "check.ProcessPoolExecutor = Here\n"
        f"sys.argv = ['check_triton.py', '--targets', 'sm80,gfx950', '--json', {str(file)!r}]\n"
        "if sys.stdin.read(): crosscompile.STACK, crosscompile.TARGETS['sm80'] = 0, crosscompile.Target(\n"
        "    'cuda', 80, 32, 108, 4, 255, 2048)\n"
        "sys.exit(check.main())\n"
    )
    for stdin, status, wrong in (("", 0, []), ("small", 1, ["sm80"])):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=REPOSITORY, input=stdin, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        rows = json.loads(file.read_text())["kernels"]
        assert [row["target"] for row in rows] == ["sm80", "gfx950"]
        assert all(row["registers"] > 0 and "_rank_kernel" in row["kernel"] for row in rows)
        assert [row["target"] for row in rows if row["problem"]] == wrong
        assert ("WRONG: sm80" in done.stderr) == bool(wrong)
