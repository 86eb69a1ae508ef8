# SPDX-License-Identifier: Apache-2.0
"""The list of known faults of tools/check_cuda.py: what it lets pass, and that it only shrinks."""

from __future__ import annotations

import pytest
from cuda_static import known_faults, rules
from cuda_static.kernel import Code, Kernel

LIST = """
# a comment
nvcc 13.0   # the compiler
rule         kernels                            80   90
exponentials attention_scores/score_kernel<*, 1>  -   31
divisions    spatial_merge/merge_rank_kernel     6    8
"""


def kernel(path: str, target: str, **faults: int) -> Kernel:
    """A kernel with these faults."""
    folder, name = path.split("/")
    return Kernel(name, target, folder, 40, 0, 0, 0, Code(680, 4, 4, 0, None, faults))


SCORE, RANK = "attention_scores/score_kernel<float, 1>", "spatial_merge/merge_rank_kernel"
FOLDERS = ("attention_scores", "spatial_merge")


def compare(*kernels: Kernel, folders=FOLDERS, compiler="13.0") -> list[str]:
    """Problems of kernels with the list above."""
    return known_faults.compare(known_faults.parse(LIST), kernels, rules.faults_of(kernels), folders, compiler)


def today(target: str = "90") -> list[Kernel]:
    """Kernels that fit the list."""
    return [kernel(SCORE, target, exponentials=31), kernel(RANK, target, divisions=8)]


def test_known_faults_pass():
    assert compare(*today()) == []
    assert compare(kernel(SCORE, "80"), kernel(RANK, "80", divisions=6)) == []


@pytest.mark.parametrize("target", ["90", "90a"])
def test_suffixes_of_targets_do_not_matter(target):
    assert compare(*today(target)) == []


def test_a_new_fault():
    (problem,) = compare(*today(), kernel("select/select_kernel<float>", "90", exponentials=9))
    assert problem.startswith("sm_90: select/select_kernel<float>: 9 exponentials")
    assert problem.endswith("this is new")


def test_a_known_fault_on_a_new_target():
    problems = compare(*today(), kernel(SCORE, "80", exponentials=31), kernel(RANK, "80", divisions=6))
    assert len(problems) == 1
    assert problems[0].startswith(f"sm_80: {SCORE}: 31 exponentials")


def test_spills_are_faults_like_the_others():
    score, rank = today()
    spilling = Kernel(score.name, "90", score.folder, 128, 0, 8, 4, score.code)
    problems = compare(spilling, rank)
    assert len(problems) == 2
    assert "spills 4 bytes; this is new" in problems[0]
    assert "8 bytes of local memory; this is new" in problems[1]


def test_more_than_is_known():
    (problem,) = compare(kernel(SCORE, "90", exponentials=32), today()[1])
    assert "32 exponentials" in problem
    assert problem.endswith("known_faults.txt allows 31")


def test_a_fault_that_is_gone():
    (problem,) = compare(kernel(SCORE, "90"), today()[1])
    assert "known_faults.txt:5 (exponentials attention_scores/score_kernel<*, 1>)" in problem
    assert "gone from all its kernels" in problem
    assert problem.endswith("remove the line, or its count for 90")


def test_a_fault_that_is_gone_from_one_of_its_kernels():
    (problem,) = compare(*today(), kernel("attention_scores/score_kernel<half_t, 1>", "90"))
    assert "gone from score_kernel<half_t, 1>" in problem


def test_a_fault_that_is_gone_from_one_target():
    (problem,) = compare(*today(), kernel(SCORE, "80"), kernel(RANK, "80"))
    assert problem.startswith("sm_80: ")
    assert RANK in problem


def test_a_kernel_that_is_gone():
    other = kernel("spatial_merge/merge_assign_kernel", "90")
    (problem,) = compare(today()[0], other)
    assert "there is no such kernel; remove the line, or its count for 90" in problem


def test_less_than_is_known():
    """A smaller count is a problem with the compiler of the list only: other compilers may emit fewer."""
    score = today()[0]
    (problem,) = compare(score, kernel(RANK, "90", divisions=7))
    assert "8 have become 7; lower the count" in problem
    assert compare(score, kernel(RANK, "90", divisions=7), compiler="12.9") == []


def test_what_was_not_checked_is_not_reported():
    assert compare(kernel(SCORE, "100")) == []  # another target
    assert compare(today()[0], folders=("attention_scores",)) == []  # another folder
    assert compare(today()[0]) == []  # the folder did not compile
    assert compare(today()[0], Kernel("merge_rank_kernel", "90", "spatial_merge", 40, 0, 0, 0)) == []  # no disassembly


@pytest.mark.parametrize(
    "line", ["unknown a/b 1 2", "divisions a/b 1", "divisions a/b x 2", "divisions a/b 0 2", "divisions 1 2"]
)
def test_a_line_that_cannot_be_read(line):
    with pytest.raises(known_faults.ListError, match=r"known_faults\.txt:7"):
        known_faults.parse(LIST + line)


def test_the_list_itself():
    known = known_faults.parse(known_faults.LIST.read_text())
    assert known.compiler
    assert {line.rule for line in known.lines} <= set(rules.RULES)
    assert len({(line.rule, line.pattern) for line in known.lines}) == len(known.lines)
