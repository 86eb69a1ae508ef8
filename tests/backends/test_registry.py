# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend by argument, context manager or MUSTDROP_BACKEND, without silent fallbacks."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest
import torch
from example import OTHER, SIMPLE, simple_arguments
from processes import output_of_python, python_path, run_python
from torch import Tensor

import mustdrop_kernels as mk
from mustdrop_kernels import backends
from mustdrop_kernels.ops import registry
from mustdrop_kernels.ops.samples import sample

REPOSITORY = Path(__file__).parents[2]

simple = getattr(mk, SIMPLE)


def arguments() -> tuple[Tensor, ...]:
    return simple_arguments(torch.arange(12.0).reshape(1, 6, 2), 1, 4, 5)


class Recorder:
    """A third-party backend that serves SIMPLE on CPU tensors and counts its calls."""

    def __init__(self, name: str = "recorder") -> None:
        self.calls: list[str] = []
        self.backend = backends.Backend(name, self.implementation, self.why_not)

    def why_not(self, op: str, device_type: str) -> str | None:
        return None if (op, device_type) == (SIMPLE, "cpu") else "it serves one operator"

    def implementation(self, op: str):
        def call(x, keep, counts, *, align_end=False):
            self.calls.append(op)
            return x[:, keep[0]] + 100

        return call


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    third_party = Recorder()
    mk.register_backend(third_party.backend)
    return third_party


def test_registered_backends():
    assert {"reference", "cpu", "cuda"} <= set(backends.registered())
    assert "tensors" in backends.registered()["cpu"].why_not(SIMPLE, "cuda")
    assert "tensors" in backends.registered()["cuda"].why_not(SIMPLE, "cpu")
    with pytest.raises(TypeError):
        backends.registered()["mine"] = None


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_every_operator_is_served_on_a_cpu(name):
    backend = backends.registered()[name]
    assert {op: backend.why_not(op, "cpu") for op in backends.OPS} == dict.fromkeys(backends.OPS)


def test_by_argument(recorder):
    given = arguments()
    plain = simple(*given)
    chosen = simple(*given, backend="recorder")
    assert recorder.calls == [SIMPLE]
    assert torch.equal(chosen, plain + 100)
    assert torch.equal(simple(*given, backend="reference"), plain)
    assert recorder.calls == [SIMPLE]


def test_by_context(recorder):
    given = arguments()
    plain = simple(*given)
    with mk.use_backend("recorder") as backend:
        assert backend is recorder.backend
        assert torch.equal(simple(*given), plain + 100)
        with mk.use_backend("reference"):
            assert torch.equal(simple(*given), plain)
        assert torch.equal(simple(*given), plain + 100)
        assert torch.equal(simple(*given, backend="reference"), plain), "the argument wins"
        assert torch.equal(getattr(torch.ops.mustdrop, SIMPLE)(*given), plain), "torch.ops ignores the context"
    assert torch.equal(simple(*given), plain)
    assert len(recorder.calls) == 2


def test_context_ends_with_an_exception(recorder):
    with pytest.raises(KeyError), mk.use_backend("recorder"):
        raise KeyError
    simple(*arguments())
    assert recorder.calls == []


def test_context_is_per_thread(recorder):
    seen = []

    def work() -> None:
        simple(*arguments())
        seen.extend(recorder.calls)

    with mk.use_backend("recorder"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == []


def test_never_a_silent_fallback(recorder):
    """A backend that does not serve an op raises; no other backend is used."""
    other, given = getattr(mk, OTHER), sample(OTHER)
    with pytest.raises(backends.BackendError, match=rf"recorder.*{OTHER}.*cpu.*it serves one operator"):
        other(**given, backend="recorder")
    with mk.use_backend("recorder"), pytest.raises(backends.BackendError, match="it serves one operator"):
        other(**given)
    if not torch.cuda.is_available():
        with pytest.raises(backends.BackendError, match="cuda"):
            other(**given, backend="cuda")
    assert issubclass(backends.BackendError, RuntimeError)


def test_unknown_names(recorder):
    for attempt in (
        lambda: simple(*arguments(), backend="missing"),
        lambda: mk.use_backend("missing").__enter__(),
        lambda: backends.get("missing"),
    ):
        with pytest.raises(backends.BackendError, match=r"missing.*recorder"):
            attempt()


def test_names_are_unique(recorder):
    with pytest.raises(ValueError, match="recorder"):
        mk.register_backend(Recorder().backend)
    other = Recorder()
    mk.register_backend(other.backend, replace=True)
    simple(*arguments(), backend="recorder")
    assert (recorder.calls, other.calls) == ([], [SIMPLE])


def test_third_party_gets_gradients(recorder):
    """Autograd is registered per op, independent of the backend."""
    x, keep, counts = arguments()
    x.requires_grad_()
    simple(x, keep, counts, backend="recorder").sum().backward()
    assert recorder.calls
    assert x.grad[0, :, 0].tolist() == [0, 1, 0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------- MUSTDROP_BACKEND


PROGRAM = f"""
import os, sys, torch
import mustdrop_kernels as mk
from mustdrop_kernels import backends

os.environ["MUSTDROP_BACKEND"] = "changed-too-late"
x, keep = torch.arange(12.0).reshape(1, 6, 2), torch.tensor([[1, 4, 5]])
counts = torch.tensor([3], dtype=torch.int32)
files = set()
sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename))
outcomes = []
for call in (torch.ops.mustdrop.{SIMPLE}, mk.{SIMPLE}):
    try:
        assert torch.equal(call(x, keep, counts), x[:, [1, 4, 5]])
        outcomes.append("ok")
    except RuntimeError as error:
        outcomes.append(str(error).splitlines()[0])
sys.setprofile(None)
explicit = mk.{SIMPLE}(x, keep, counts, backend="reference")
assert torch.equal(explicit, x[:, [1, 4, 5]])
print(backends.serving("{SIMPLE}", "cpu"), any("reference" in f for f in files), *outcomes, sep="|")
"""


def outcome(**environment: str) -> list[str]:
    return output_of_python("-c", PROGRAM, without="MUSTDROP_", **environment).strip().split("|")


def test_variable_names_the_reference():
    assert outcome(MUSTDROP_BACKEND="reference") == ["reference", "True", "ok", "ok"]


@pytest.mark.parametrize("environment", [{}, {"MUSTDROP_BACKEND": ""}, {"MUSTDROP_BACKEND": "cpu"}], ids=str)
def test_default_is_the_cpu_library(environment):
    assert outcome(**environment) == ["cpu", "False", "ok", "ok"]


@pytest.mark.parametrize("name", ["cuda", "missing"])
def test_variable_names_a_backend_that_does_not_serve(name):
    """The import succeeds; every op raises with the reason."""
    serving, reference_ran, *refusals = outcome(MUSTDROP_BACKEND=name)
    assert (serving, reference_ran) == ("None", "False")
    assert len(refusals) == 2
    for refusal in refusals:
        assert name in refusal
        assert SIMPLE in refusal


def test_conformance_suite_runs_on_a_third_party(tmp_path):
    """A third-party package registers a backend, and the suite tests the ops that it serves."""
    (tmp_path / "mine.py").write_text(
        "from mustdrop_kernels import register_backend\n"
        "from mustdrop_kernels.backends import Backend, registered\n"
        "def why_not(op, device_type):\n"
        f"    return None if op == '{SIMPLE}' else 'it serves one operator'\n"
        "register_backend(Backend('mine', registered()['reference'].implementation, why_not))\n"
    )

    def pytest_on(chosen: str) -> subprocess.CompletedProcess:
        words = ["-m", "pytest", "-q", "-rs", "-p", "mine", "-p", "no:cacheprovider"]
        tests = [f"tests/ops/test_gather.py::{t}" for t in ("test_all_and_none", "test_after_select")]
        environment = {"PYTHONPATH": python_path(tmp_path), "MUSTDROP_TEST_BACKENDS": chosen}
        return run_python(*words, *tests, folder=REPOSITORY, **environment)

    done = pytest_on("mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert f"mine does not serve {OTHER} on cpu: it serves one operator" in done.stdout
    unknown = pytest_on("mine,typo")
    assert unknown.returncode != 0
    assert "typo" in unknown.stdout + unknown.stderr


# ------------------------------------------------------------------------------------------- one backend per operator


class Registered:
    """A stand-in for torch.library.Library that records what is registered."""

    def __init__(self) -> None:
        self.impls: dict[str, object] = {}

    def impl(self, op: str, implementation: object) -> None:
        self.impls[op] = implementation


def test_a_backend_without_an_operator_serves_the_others(monkeypatch):
    """The next backend in the order serves exactly the operators that the first one lacks."""
    first = backends.Backend("first", lambda op: "first", lambda op, _: "no kernel" if op == SIMPLE else None)
    second = backends.Backend("second", lambda op: "second", lambda op, _: None)
    monkeypatch.setattr(registry, "_registered", {"first": first, "second": second})
    monkeypatch.setattr(registry, "_serving", {})
    monkeypatch.setattr(registry, "ORDER", {"cpu": ("first", "second"), "cuda": ("first", "second")})
    library = Registered()
    for op in backends.OPS:
        registry._serve(library, op, "cpu", None)
    served = {op: backends.serving(op, "cpu") for op in backends.OPS}
    assert served == {op: "second" if op == SIMPLE else "first" for op in backends.OPS}
    assert library.impls == served


def test_an_operator_without_a_backend_does_not_affect_the_others(monkeypatch):
    """A new operator without a CUDA kernel: the library still serves the others, without overrides."""
    compiled = backends.Backend(
        "compiled",
        lambda op: "compiled",
        lambda op, _: "no kernel" if op == SIMPLE else None,
        in_dispatcher=True,
    )
    monkeypatch.setattr(registry, "_registered", {"compiled": compiled})
    monkeypatch.setattr(registry, "_serving", {})
    monkeypatch.setattr(registry, "ORDER", {"cuda": ("compiled",)})
    library = Registered()
    for op in backends.OPS:
        registry._serve(library, op, "cuda", None)
    assert library.impls == {}
    assert backends.serving(SIMPLE, "cuda") is None
    assert {backends.serving(op, "cuda") for op in backends.OPS if op != SIMPLE} == {"compiled"}


def test_an_explicit_choice_raises_only_for_missing_operators(monkeypatch):
    partial = backends.Backend("partial", lambda op: "partial", lambda op, _: "absent" if op == OTHER else None)
    monkeypatch.setattr(registry, "_registered", {"partial": partial})
    monkeypatch.setattr(registry, "_serving", {})
    library = Registered()
    for op in (OTHER, SIMPLE):
        registry._serve(library, op, "cpu", "partial")
    assert library.impls[SIMPLE] == "partial"
    with pytest.raises(backends.BackendError, match=f"MUSTDROP_BACKEND=partial does not serve {OTHER} on cpu: absent"):
        library.impls[OTHER]()


@pytest.mark.parametrize(
    ("op", "part"), [("dual_attention_select", "select_dual"), ("topk_attention_select", "select_topk")]
)
def test_a_backend_with_the_parts_has_the_composite(op, part, monkeypatch):
    """A third party's scores and selection give its fused form; errors carry the name of the fused form."""
    reference, calls = backends.get("reference"), []

    def implementation(name):
        def call(*args, **kwargs):
            calls.append(name)
            return reference.implementation(name)(*args, **kwargs)

        return call

    parts = backends.Backend(
        "parts", implementation, lambda name, _: None if name in ("text_vision_scores", part) else "not written yet"
    )
    monkeypatch.setattr(registry, "_registered", {**registry._registered, "parts": parts})
    assert parts.composes(op)
    assert not backends.get("cpu").composes(op), "it has a kernel of its own"
    found = getattr(mk, op)(**sample(op), backend="parts")
    assert calls == ["text_vision_scores", part]
    for one, other in zip(found, getattr(mk, op)(**sample(op), backend="cpu"), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match=f"^mustdrop::{op}: drop_multiple must be at least 1"):
        getattr(mk, op)(**{**sample(op), "drop_multiple": 0}, backend="parts")
    without = backends.Backend("without", implementation, lambda name, _: None if name == part else "not written yet")
    assert without.why_not(op, "cpu") == "not written yet"
