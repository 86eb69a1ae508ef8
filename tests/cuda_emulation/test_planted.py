# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in small kernels (planted.cpp) are caught; the same kernels without them pass."""

from __future__ import annotations

import ctypes
import functools
import subprocess

import pytest
from processes import run_python

from cuda_emulation import building

THREADS = 128
IN = list(range(100, 100 + THREADS))
SEEDS = range(12)

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))


@functools.cache
def library(sanitizer: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(building.build_alone(building.HERE / "planted.cpp", sanitizer)))
    loaded.planted_run.restype = ctypes.c_char_p
    return loaded


def run(name: str, right: bool, seed: int, sanitizer: str = "races") -> list[int] | str:
    """A kernel's results, or the emulation's error."""
    lib = library(sanitizer)
    lib.cuda_emulation_configure(ctypes.c_uint(seed), ctypes.c_int(90), ctypes.c_int(4))
    out = (ctypes.c_int * (THREADS * 4))()
    message = lib.planted_run(name.encode(), ctypes.c_bool(right), out)
    return list(out) if message is None else message.decode()


def in_a_process(name: str, right: bool) -> subprocess.CompletedProcess:
    """A run under AddressSanitizer, which ends the process."""
    path = building.build_alone(building.HERE / "planted.cpp", "address")
    code = (
        f"import ctypes; out = (ctypes.c_int * {THREADS * 4})(); planted = ctypes.CDLL({str(path)!r})\n"
        f"assert planted.planted_run({name.encode()!r}, ctypes.c_bool({right}), out) == 0\n"
        f"assert list(out)[:{THREADS}] == {IN}"
    )
    return run_python("-S", "-c", code, **building.preload("address"))


EXPECTED = {
    "reverse": IN[::-1],
    "sum": [2 * sum(IN) + THREADS] * THREADS,
    "neighbor": [IN[i ^ 1] for i in range(THREADS)],
    "store_outside": IN,
    "store_outside_shared": IN,
    "load_outside": IN,
    "divergent": IN,
    "unwritten": IN,
    "mask": IN,
    "copy": IN,
    "refill": [2 * value for value in IN[::-1]],
    "blocks": IN,
    "count": [3 * THREADS] + [0] * (THREADS - 1),
    **{
        f"{which}_cluster": [a + rank + IN[-1 - i] + (rank + 1) % 4 for rank in range(4) for i, a in enumerate(IN)]
        for which in ("first", "middle", "last")
    },
    "relaxed_cluster": [value + (rank + 1) % 4 + 1 for rank in range(4) for value in IN[::-1]],
    "overlap": [2 * value for value in IN],
    "leave": IN,
    **{f"{which}_handover": IN + [3, 1] + [0] * (THREADS - 2) + IN for which in ("read", "wait", "spread")},
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("sanitizer", ["none", "races"])
def test_without_the_bug(name, sanitizer):
    for seed in SEEDS:
        result = run(name, True, seed, sanitizer)
        assert isinstance(result, list), result
        wanted = EXPECTED[name]
        assert result[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reverse", "a race|reads unwritten shared memory"),
        ("sum", "a race"),
        ("neighbor", "a race"),
        ("copy", "a race"),
        ("refill", "a race"),
        ("blocks", "a race"),
        ("count", "a race"),
        ("divergent", "a thread left before others reached __syncthreads|wait forever"),
        ("unwritten", "reads unwritten shared memory"),
        ("mask", "wait forever"),
        ("first_cluster", "before the cluster's first barrier"),
        ("middle_cluster", "a race"),
        ("last_cluster", "still use its shared memory|whose threads have left"),
        ("relaxed_cluster", "a race"),
        ("overlap", "what the previous launch has written"),
        ("leave", "without waiting for the previous launch"),
        ("read_handover", "a race"),
        ("wait_handover", "a race"),
        ("spread_handover", "a race"),
    ],
)
def test_caught_whatever_the_order(name, words):
    """By CUDA's ordering rules, not by the drawn schedule: with every seed."""
    for seed in SEEDS:
        result = run(name, False, seed)
        assert isinstance(result, str), f"seed {seed} does not report it"
        assert any(word in result for word in words.split("|")), result


def test_a_race_names_both_sides():
    message = run("refill", False, 1)
    assert "of block 0 writes at +0x" in message
    assert "of block 0 reads at +0x" in message
    assert "with no barrier between them" in message


@pytest.mark.parametrize("name", ["reverse", "sum", "copy"])
def test_a_missing_barrier_gives_wrong_results_under_some_seed(name):
    """Without the race detector: some order of the threads shows the bug."""
    wanted = EXPECTED[name]
    wrong = [seed for seed in SEEDS if run(name, False, seed, "none")[: len(wanted)] != wanted]
    assert wrong, "no order of the threads shows the bug"


@pytest.mark.parametrize("name", ["store_outside", "store_outside_shared", "load_outside"])
def test_addresses_outside(name):
    right, wrong = in_a_process(name, True), in_a_process(name, False)
    assert right.returncode == 0, right.stderr
    assert wrong.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in wrong.stderr
    assert ("READ of size 4" if name == "load_outside" else "WRITE of size 4") in wrong.stderr
    assert f"{name}_kernel" in wrong.stderr


def test_the_order_depends_on_the_seed_alone():
    first, again = ([run("reverse", False, seed, "none") for seed in SEEDS] for _ in range(2))
    assert first == again
    assert len({tuple(numbers) for numbers in first}) > 1
