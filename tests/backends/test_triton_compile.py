# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel in every shipped configuration compiles for GPUs that are not here, and fits them.

One NVIDIA and one AMD target here; all of them in the slow tests and in `make check-triton`.
"""

from __future__ import annotations

import pytest

from mustdrop_kernels.backends import triton as backend

if backend.interpreted():
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)
if backend.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from mustdrop_kernels.backends.triton import configs, crosscompile

ORDINARY = ("sm90", "gfx942")


def _fits(target: str) -> None:
    problems = {}
    for unit in crosscompile.units(target):
        problem = crosscompile.problem(crosscompile.compile_unit(unit, target), target)
        if problem is not None:
            problems[unit.name] = problem
    assert not problems


@pytest.mark.parametrize("target", ORDINARY)
def test_every_kernel_fits(target):
    _fits(target)


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(set(crosscompile.TARGETS) - set(ORDINARY)))
def test_every_kernel_fits_other_targets(target):
    _fits(target)


@pytest.mark.parametrize("target", sorted(crosscompile.TARGETS))
def test_every_shipped_configuration_is_compiled(target, monkeypatch):
    """The calls that are compiled reach each entry of the tables: none is shipped unseen."""
    monkeypatch.setattr(configs, "SEEN", set())
    assert crosscompile.units(target)
    used = {(kernel, shape) for _, kernel, shape in configs.SEEN}
    shipped = {(kernel, shape) for kernel, classes in configs.DEFAULT.items() for shape in classes}
    assert used == shipped
    assert {(kernel, shape) for arch, kernel, shape in configs.SPECIAL if arch == target} <= shipped


def test_what_does_not_fit_is_told():
    fits = crosscompile.Resources(shared=48 * 1024, registers=128, spilled=0)
    assert all(crosscompile.problem(fits, target) is None for target in crosscompile.TARGETS)
    large = crosscompile.Resources(shared=100 * 1024, registers=128, spilled=0)
    assert "shared memory" in crosscompile.problem(large, "sm120")
    assert crosscompile.problem(large, "sm90") is None
    spilling = crosscompile.Resources(shared=0, registers=255, spilled=16)
    assert "spills" in crosscompile.problem(spilling, "sm90")
