# SPDX-License-Identifier: Apache-2.0
"""Tests specific to the Triton backend: its availability, and paths that only large inputs take.

The conformance suite runs on it with TRITON_INTERPRET=1 MUSTDROP_TEST_BACKENDS=triton; so do most tests here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from example import SIMPLE, simple_arguments
from processes import run_python

import mustdrop_kernels
from mustdrop_kernels import backends
from mustdrop_kernels.backends import triton as backend

needs_interpreter = pytest.mark.skipif(
    not backend.interpreted() or backend.version() is None, reason="runs with TRITON_INTERPRET=1"
)


# ---------------------------------------------------------------------------------------------- availability


LAUNCHERS = [path.read_text() for path in (Path(__file__).parents[2] / "csrc").glob("*/cuda.cu")]


def test_registered_and_complete():
    assert LAUNCHERS
    registered = backends.registered()["triton"]
    with_launcher = {op for op in backends.OPS for text in LAUNCHERS if f'm.impl("{op}"' in text}
    without_kernel = {op for op in backends.OPS if not backend.defined(op) and not registered.composes(op)}
    assert not with_launcher & without_kernel, "a GPU without the CUDA library has no fewer operators"
    for op in backends.OPS:
        assert callable(registered.implementation(op))
        for device in ("cpu", "cuda", "xpu"):
            reason = registered.why_not(op, device)
            assert reason is None or (reason and reason[0].islower())


@pytest.mark.parametrize(
    ("interpret", "cuda", "version", "device", "word"),
    [
        ("0", "12.8", (3, 4), "cuda", None),
        ("0", "12.8", (4, 0), "cuda", None),
        ("0", "12.8", (3, 3), "cuda", "3.3 is installed: needs 3.4"),
        ("0", "12.8", None, "cuda", "not installed"),
        ("0", None, (3, 9), "cuda", "without CUDA"),
        ("1", "12.8", (3, 9), "cuda", "TRITON_INTERPRET"),
        ("1", None, (3, 9), "cpu", None),
        ("1", None, None, "cpu", "not installed"),
        ("0", None, (3, 9), "cpu", "TRITON_INTERPRET"),
        ("0", "12.8", (3, 9), "xpu", "CUDA tensors"),
    ],
)
def test_why_not(monkeypatch, interpret, cuda, version, device, word):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "version", lambda: version)
    reason = backend.why_not(SIMPLE, device)
    assert reason is None if word is None else word in reason


@pytest.mark.parametrize(
    ("hidden", "reason"), [(True, "triton is not installed"), (False, "this torch is built without CUDA")]
)
def test_doctor_shows_the_reason(hidden, reason):
    """Without Triton, or without a GPU, each operator's row names the reason; the package works."""
    if not hidden and (torch.version.cuda or torch.version.hip):
        pytest.skip("this torch is built with CUDA or ROCm")
    hide = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None  # importing it fails\n"
        "import torch; torch.version.cuda = '12.8'\n"
    )
    code = (hide if hidden else "") + (
        "import sys, torch, mustdrop_kernels as mk\n"
        "from mustdrop_kernels.ops.samples import sample\n"
        "for op in mk.backends.OPS: getattr(mk, op)(**sample(op))\n"
        "from mustdrop_kernels.cli import main\n"
        "sys.argv = ['mustdrop', 'doctor', '--json']\n"
        "main()\n"
    )
    done = run_python("-c", code, without=("TRITON_INTERPRET", "MUSTDROP_BACKEND"))
    rows = json.loads(done.stdout)["operators"]
    reasons = {row["op"]: row["why_not"]["triton"] for row in rows if row["device"] == "cuda"}
    assert set(reasons) == set(backends.OPS), done.stderr
    assert all(reason in text for text in reasons.values()), reasons


def test_importing_the_package_does_not_import_triton():
    code = "import sys, mustdrop_kernels; sys.exit('triton.language' in sys.modules)"
    assert run_python("-c", code).returncode == 0


# ---------------------------------------------------------------------------------------------- paths of large inputs


@pytest.fixture
def fresh_plans():
    """Clear the plans, which depend on the limits."""
    from mustdrop_kernels.backends.triton.launch import Plans

    Plans.forget_all()
    yield
    Plans.forget_all()


def equal(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@needs_interpreter
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("processors", [1, 64])
def test_many_query_rows(monkeypatch, processors):
    """More query rows than the workspace holds, with the heads in one program and split among several."""
    from mustdrop_kernels.backends.triton import configs, scores

    monkeypatch.setattr(scores, "SHARED_ROWS", 32)
    monkeypatch.setattr(configs, "processors", lambda device: processors)
    q, k = torch.randn(1, 4, 110, 8), torch.randn(1, 4, 130, 8)
    types = torch.full((1, 130), 2, dtype=torch.uint8)
    types[:, 20:125] = 3
    got = mustdrop_kernels.text_vision_scores(q, k, types, 0.35, backend="triton")
    want = mustdrop_kernels.text_vision_scores(q, k, types, 0.35, backend="reference")
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


@needs_interpreter
@pytest.mark.usefixtures("fresh_plans")
def test_more_layers_than_a_launch_holds(monkeypatch):
    from mustdrop_kernels.backends.triton import compact

    monkeypatch.setattr(compact, "MOST_CACHES", 4)
    caches = [torch.randn(1, 1, 9, 4) for _ in range(10)]
    mine, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
    keep, counts = [torch.tensor([[2, 5, 7]])], [torch.tensor([3], dtype=torch.int32)]
    mustdrop_kernels.compact_kv_(mine[:5], mine[5:], keep, counts, backend="triton")
    mustdrop_kernels.compact_kv_(theirs[:5], theirs[5:], keep, counts, backend="reference")
    equal([c[:, :, :3] for c in mine], [c[:, :, :3] for c in theirs])


@needs_interpreter
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("drop_multiple", [1, 7])
def test_selection_in_several_tiles(monkeypatch, drop_multiple):
    """Rows longer than a tile: ranks and positions continue across tiles."""
    from mustdrop_kernels.backends.triton import configs, select

    small = configs.Config((("BLOCK", 16),), num_warps=1)
    monkeypatch.setattr(select, "config", lambda *_: small)
    scores = torch.randint(0, 4, (2, 83)).float()  # many ties
    types = torch.randint(0, 4, (2, 83), dtype=torch.uint8)
    protected = torch.rand(2, 83) < 0.2
    options = {"protected": protected, "drop_multiple": drop_multiple, "capacity": 70}
    for call in (
        lambda name: mustdrop_kernels.select_topk(scores, types, 20, backend=name, **options),
        lambda name: mustdrop_kernels.select_dual(scores, scores, types, 0.02, 2.5, backend=name, **options),
    ):
        equal(call("triton"), call("reference"))


@needs_interpreter
@pytest.mark.usefixtures("fresh_plans")
def test_entries_that_are_skipped_do_not_disturb_the_order():
    """Gaps in keep reverse the direction of some moves: both directions are safe in one call."""
    keep = [torch.tensor([[-1, -1, -1, 0, 1, 2, 99, 9, 15, 17]])]
    counts = [torch.tensor([10], dtype=torch.int32)]
    for align_end in (False, True):
        caches = {name: torch.arange(40.0).reshape(1, 1, 20, 2) for name in ("triton", "reference")}
        for name, cache in caches.items():
            value = cache + 100
            mustdrop_kernels.compact_kv_([cache], [value], keep, counts, align_end=align_end, backend=name)
        assert torch.equal(caches["triton"], caches["reference"])


@needs_interpreter
@pytest.mark.usefixtures("fresh_plans")
def test_a_plan_serves_other_contents_and_checks_addresses():
    keep, counts = [torch.tensor([[1, 2]])], [torch.tensor([2], dtype=torch.int32)]
    caches = [torch.randn(1, 1, 4, 2) for _ in range(2)]
    mustdrop_kernels.compact_kv_(caches[:1], caches[1:], keep, counts, backend="triton")
    with pytest.raises(RuntimeError, match=r"compact_kv_: values\[0\]"):
        mustdrop_kernels.compact_kv_(caches[:1], caches[:1], keep, counts, backend="triton")
    x = torch.randn(1, 4, 2)
    for index in (0, 3):
        got = getattr(mustdrop_kernels, SIMPLE)(*simple_arguments(x, index), backend="triton")
        assert torch.equal(got[0, 0], x[0, index])


@needs_interpreter
@pytest.mark.usefixtures("fresh_plans")
def test_plans_are_bounded(monkeypatch):
    from mustdrop_kernels.backends.triton import gather, launch

    monkeypatch.setattr(launch.Plans, "MOST", 3)
    for length in range(1, 9):
        x = torch.randn(1, length, 2)
        getattr(mustdrop_kernels, SIMPLE)(*simple_arguments(x, 0), backend="triton")
        assert len(gather._plans) <= 3
