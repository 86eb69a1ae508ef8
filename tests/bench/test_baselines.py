# SPDX-License-Identifier: Apache-2.0
"""Every baseline computes what the operators compute, on small inputs; one that does not is found out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from example import OTHER, QUICK

from mustdrop_kernels.bench import check, run
from mustdrop_kernels.bench.baselines import BASELINES, baselines_of, scores
from mustdrop_kernels.bench.cases import CASES, FLOAT32_ONLY, Case, Inputs
from mustdrop_kernels.bench.run import Options, backend_call, default_backends
from mustdrop_kernels.bench.shapes import parse_shape

CPU = torch.device("cpu")
EAGER = [(op, one) for op in CASES for one in baselines_of(op) if not one.compiles and one.canonical is not None]


def cases(op: str):
    dtypes = (torch.float32,) if op in FLOAT32_ONLY else (torch.float32, torch.float16, torch.bfloat16)
    for shape in ("tiny", "tiny:2"):
        for dtype in dtypes:
            yield Case(op, parse_shape(shape), dtype, CPU)


def ours(case: Case) -> tuple[dict[str, torch.Tensor], Inputs]:
    inputs = case.inputs()
    call = backend_call(case.op, "cpu", default_backends("cpu")[0])
    return case.spec.canonical(call(inputs), inputs), inputs


@pytest.mark.parametrize(("op", "baseline"), EAGER, ids=[f"{op}-{baseline.name}" for op, baseline in EAGER])
def test_baseline_computes_the_same(op, baseline):
    for case in cases(op):
        if reason := baseline.why_not(case):
            pytest.skip(reason)
        want, _ = ours(case)
        inputs = case.inputs()
        got = baseline.canonical(baseline.build(case)(inputs), inputs)
        assert check.difference(case, want, got) is None, case.label


@pytest.mark.parametrize("op", CASES)
def test_variants_compute_the_same(op):
    for case in cases(op):
        want, _ = ours(case)
        for more in case.spec.variants.values():
            inputs = case.inputs()
            raw = backend_call(op, "cpu", default_backends("cpu")[0], more)(inputs)
            assert check.difference(case, want, case.spec.canonical(raw, inputs)) is None, case.label


def test_flex_attention_with_q_and_k_swapped_gives_the_total():
    case = Case("text_vision_scores", parse_shape("tiny:2"), torch.float32, CPU)
    want, inputs = ours(case)
    got = scores.flex_total(compile_it=False)(case)(inputs)
    assert check.difference(case, want, {"total": got}) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile(published)", "compile(linear formula)", "compile(text rows)"])
def test_compiled_baseline_computes_the_same(name):
    baseline = next(baseline for baseline in BASELINES if baseline.name == name)
    case = Case(baseline.ops[0], parse_shape("tiny"), torch.float32, CPU)
    if reason := baseline.why_not(case):
        pytest.skip(reason)
    want, inputs = ours(case)
    with torch.inference_mode():
        got = baseline.canonical(baseline.build(case)(inputs), inputs)
    assert check.difference(case, want, got) is None


@pytest.mark.parametrize("op", CASES)
def test_the_work_of_a_case(op):
    """Something of every kind stays and something goes, or the timing would be of nothing."""
    case = Case(op, parse_shape("tiny:2"), torch.float32, CPU)
    want, _ = ours(case)
    assert case.work.bytes > 0
    assert case.input_bytes > 0
    if "merged" in want:
        assert want["merged"].any()
        assert not want["merged"].all()
    if "keep" in want:
        text = case.shape.text_before + case.shape.queries
        assert ((want["counts"] > text) & (want["counts"] < case.shape.length)).all()


def test_a_wrong_baseline_is_not_timed(monkeypatch):
    right = baselines_of(OTHER)[0]

    def off_by_one(case):
        call = right.build(case)
        return lambda inputs: [row + 1 for row in call(inputs)]

    wrong = dataclasses.replace(right, name="wrong", build=off_by_one)
    monkeypatch.setattr(run, "baselines_of", lambda op: [right, wrong])
    options = Options((OTHER,), (parse_shape("tiny"),), (torch.float32,), CPU, default_backends("cpu"), quick=True)
    rows = {row["candidate"]: row for row in run.run(options)["rows"]}
    assert rows[right.name]["status"] == "timed"
    assert rows["wrong"]["status"] == "wrong"
    assert "median_us" not in rows["wrong"]
    assert rows["wrong"]["reason"].startswith("keep: ")


def test_a_baseline_that_raises_is_not_timed(monkeypatch):
    def raising(case):
        def call(inputs):
            raise RuntimeError("out of luck\nand a long trace")

        return call

    baseline = dataclasses.replace(baselines_of(QUICK[0])[0], name="raising", build=raising)
    monkeypatch.setattr(run, "baselines_of", lambda op: [baseline])
    options = Options(QUICK[:1], (parse_shape("tiny"),), (torch.float32,), CPU, default_backends("cpu"), quick=True)
    ours_row, row = run.run(options)["rows"]
    assert ours_row["status"] == "timed"
    assert row["status"] == "skipped"
    assert row["reason"] == "RuntimeError: out of luck"


@pytest.mark.parametrize(
    ("ours_", "theirs", "word"),
    [
        (torch.zeros(3), torch.zeros(4), "shape"),
        (torch.ones(3), torch.tensor([1.0, 1.0, 1.01]), "1.01"),
        (torch.ones(3), torch.tensor([1.0, 1.0, float("nan")]), "nan"),
        (torch.arange(3), torch.tensor([0, 1, 3]), "1 of 3"),
    ],
)
def test_difference_says_what_differs(ours_, theirs, word):
    case = Case("text_vision_scores", parse_shape("tiny"), torch.float32, CPU)
    assert word in check.difference(case, {"x": ours_}, {"x": theirs})
    assert check.difference(case, {"x": ours_}, {"x": ours_.clone()}) is None
    assert check.difference(case, {"x": ours_}, {"y": ours_}) == "nothing that can be compared"


def test_moves_must_be_exact():
    case = Case("compact_kv_", parse_shape("tiny"), torch.float32, CPU)
    assert check.difference(case, {"x": torch.ones(2)}, {"x": torch.tensor([1.0, 1 + 1e-6])}) is not None


@pytest.mark.parametrize(("dtype", "others", "same"), [
    (torch.bfloat16, 2, True), (torch.bfloat16, 3, False), (torch.float32, 0, True), (torch.float32, 1, False),
])  # fmt: skip
def test_rounded_scores_may_decide_a_few_tokens_otherwise(dtype, others, same):
    """A baseline that rounds its scores to half precision decides otherwise where one lies next to the threshold."""
    case = Case("dual_attention_select", parse_shape("tiny"), dtype, torch.device("cpu"))
    ours = {"keep": torch.arange(200), "counts": torch.tensor([200]), "total": torch.ones(1, 9)}
    theirs = {"keep": torch.arange(200 - others), "counts": torch.tensor([200 - others]), "total": torch.ones(1, 9)}
    assert (check.difference(case, ours, theirs) is None) == same
    assert check.difference(case, ours, {**theirs, "total": torch.zeros(1, 9)}) is not None
