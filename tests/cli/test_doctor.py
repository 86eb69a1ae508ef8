# SPDX-License-Identifier: Apache-2.0
"""``mustdrop doctor``: complete, honest, and alive whatever is broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from processes import run_python

from mustdrop_kernels import _load, backends
from mustdrop_kernels.backends import Backend
from mustdrop_kernels.cli import doctor, environment
from mustdrop_kernels.ops import registry

RUN_MAIN = "import sys; sys.argv = ['mustdrop', 'doctor', *{words}]; from mustdrop_kernels.cli import main; main()"


def run_apart(prelude: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Doctor in a process of its own, where `prelude` runs before the package is imported."""
    return run_python("-c", prelude + "\n" + RUN_MAIN.format(words=list(words)), **environment)


@pytest.fixture(scope="module")
def document(mustdrop, as_json):
    return as_json(mustdrop("doctor", "--json"))


def test_status_is_one_if_something_is_wrong(mustdrop, as_json) -> None:
    result = mustdrop("doctor", "--json")
    found = as_json(result)
    assert result.exit_code == (0 if found["ok"] else 1)
    assert found["ok"] == (not found["problems"])
    assert found["next"], "it ends with what to do next"


def test_the_document_holds_what_a_bug_report_needs(document) -> None:
    needed = {"versions", "machine", "environment", "engines", "libraries", "build", "sources", "backends", "devices"}
    assert needed | {"operators", "self_check", "ok", "problems", "next"} == set(document)


def test_every_operator_device_and_backend_has_its_row(document) -> None:
    rows = {(row["op"], row["device"]): row for row in document["operators"]}
    assert set(rows) == {(op, device) for op in backends.OPS for device in ("cpu", "cuda")}
    for row in rows.values():
        assert set(row["why_not"]) == set(backends.registered())
        serving = [name for name, reason in row["why_not"].items() if reason is None]
        assert serving == ([row["served_by"]] if row["served_by"] else [])


def test_served_operators_compute_what_the_reference_does(document) -> None:
    checked = {(check["op"], check["device"], check["backend"]): check for check in document["self_check"]}
    for row in document["operators"]:
        here = next(d for d in document["devices"] if d["device"] == row["device"])["absent"] is None
        if here and row["served_by"] not in (None, "reference"):
            assert checked[row["op"], row["device"], row["served_by"]]["status"] == "passes"
    assert {check["status"] for check in checked.values()} <= {"passes"}


def test_versions_and_libraries(document) -> None:
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["python"].split(".")[:2] == [str(n) for n in sys.version_info[:2]]
    core = next(row for row in document["libraries"] if row["name"] == "libmustdrop")
    assert core["loaded"]
    assert core["problem"] is None
    assert document["machine"]["CPU kernels"] in ("baseline", "avx2", "avx512", "avx512_bf16")


def test_text_names_everything(mustdrop) -> None:
    text = mustdrop("doctor").stdout
    for word in (*backends.OPS, *backends.registered(), *environment.VARIABLES, "libmustdrop_cuda", "torch", "Next:"):
        assert word in text


def test_environment_is_shown(mustdrop, as_json, monkeypatch) -> None:
    monkeypatch.setenv("MUSTDROP_CMAKE_ARGS", "-DX=1")
    assert as_json(mustdrop("doctor", "--json"))["environment"]["MUSTDROP_CMAKE_ARGS"] == "-DX=1"


@pytest.mark.parametrize(
    ("value", "words", "problem"),
    [
        ("", "only models with hf_overrides drop tokens", None),
        ("budget-64", "every LLaVA drops tokens: {'preset': 'budget-64'}", None),
        ("budget-65", "no preset 'budget-65'", "vLLM would refuse to start"),
        ('{"positions": "published"}', "positions must be 'original' in vLLM", "vLLM would refuse to start"),
    ],
)
def test_the_switch_of_the_vllm_plugin(value, words, problem, document, monkeypatch) -> None:
    """As if vLLM were installed; the plug-in's entry point is this package's own."""
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: True if name == "vllm" else find(name))
    monkeypatch.setenv("MUSTDROP_VLLM", value)
    engines = environment.engines()
    assert words in engines["vLLM, here"]
    problems, advice = doctor.assess({**document, "engines": engines}, ["cpu"])
    assert [problem in sentence for sentence in problems] == ([] if problem is None else [True])
    assert problem is None or "MUSTDROP_VLLM" in advice[0]
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "leaves the plug-in out" in environment.engines()["vLLM, here"]


@pytest.mark.parametrize(("switch", "refuses"), [("", False), ("budget-64", True)])
def test_versions_of_vllm_that_are_not_supported(switch, refuses, document, monkeypatch) -> None:
    find, version = environment.importlib.util.find_spec, environment._distribution
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: True if name == "vllm" else find(name))
    monkeypatch.setattr(environment, "_distribution", lambda name: "0.31.0" if name == "vllm" else version(name))
    monkeypatch.setenv("MUSTDROP_VLLM", switch)
    engines = environment.engines()
    assert "mustdrop: vLLM 0.31.0 is not supported" in engines["vLLM, here"]
    problems, _ = doctor.assess({**document, "engines": engines}, ["cpu"])
    assert any("vLLM would refuse to start" in sentence for sentence in problems) == refuses


@pytest.mark.parametrize(
    ("prelude", "reason", "advice"),
    [
        (
            "import pathlib; there = pathlib.Path.is_file\n"
            "pathlib.Path.is_file = lambda path: path.name != 'libmustdrop.so' and there(path)",
            "libmustdrop.so was not built",
            "pip install .",
        ),
        (
            "import torch\ndef load(path): raise OSError('undefined symbol: aoti_torch_new')\n"
            "torch.ops.load_library = load",
            "undefined symbol: aoti_torch_new",
            "Rebuild",
        ),
    ],
    ids=["not built", "does not load"],
)
def test_without_the_library(prelude, reason, advice) -> None:
    done = run_apart(prelude, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert reason in found["problems"][0]
    assert advice in found["next"][0]
    assert not found["libraries"][0]["loaded"]
    assert all(row["served_by"] is None for row in found["operators"])
    assert reason in found["operators"][0]["why_not"]["cpu"]


def test_a_cuda_library_that_does_not_load_is_a_problem(document, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_load.cuda, "path", tmp_path / "libmustdrop_cuda.so")
    monkeypatch.setattr(_load.cuda, "problem", "libmustdrop_cuda.so could not be loaded: it is cut off")
    assert doctor.assess(document, ["cpu"])[0] == []  # not there: others serve
    _load.cuda.path.touch()
    problems, advice = doctor.assess(document, ["cpu"])
    assert problems == ["libmustdrop_cuda.so could not be loaded: it is cut off"]
    assert "install the wheel again" in advice[0]


def test_without_the_library_in_words() -> None:
    done = run_apart("import torch\ndef load(path): raise OSError('not this file')\ntorch.ops.load_library = load")
    assert done.returncode == 1
    assert "not this file" in done.stdout
    assert "Next:" in done.stdout


def test_unknown_backend_in_the_environment() -> None:
    done = run_apart("", "--json", MUSTDROP_BACKEND="tritn")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert "MUSTDROP_BACKEND=tritn" in found["problems"][0]
    assert "reference" in found["next"][0]


def _backend(name: str, implementation, why_not=lambda op, device: None if device == "cpu" else "only here") -> Backend:
    return Backend(name, implementation, why_not, "made up for a test")


def _raise(*_: object, **__: object) -> None:
    raise OSError("the disk is gone")


def _slightly_off(op: str):
    """The reference, with 0.01 added to floating-point results and 1 to indices; caches are zeroed."""
    reference = backends.get("reference").implementation(op)

    def compute(*args, **kwargs):
        results = reference(*args, **kwargs)
        if results is None:
            args[0][0].zero_()
            return None
        single = isinstance(results, torch.Tensor)
        results = (results,) if single else results
        off = tuple(x + 0.01 if x.is_floating_point() else x + 1 for x in results)
        return off[0] if single else off

    return compute


@pytest.mark.parametrize(
    ("implementation", "status", "words"),
    [(_slightly_off, "differs", "off by up to 0.01"), (lambda op: _raise, "fails", "OSError: the disk is gone")],
    ids=["wrong", "raising"],
)
def test_self_check_finds_a_bad_backend(implementation, status, words, mustdrop, as_json, monkeypatch) -> None:
    monkeypatch.setitem(registry._registered, "odd", _backend("odd", implementation))
    result = mustdrop("doctor", "--json")
    found = as_json(result)
    checks = {check["op"]: check for check in found["self_check"] if check["backend"] == "odd"}
    assert set(checks) == set(backends.OPS)
    assert {check["status"] for check in checks.values()} == {status}
    assert words in checks["spatial_merge"]["detail"]
    assert re.search(f"entries of keys|{words}", checks["compact_kv_"]["detail"])
    assert result.exit_code == 1
    assert "odd" in found["problems"][0]
    assert status in mustdrop("doctor").stdout


def test_a_backend_that_breaks_when_asked_is_a_row(mustdrop, as_json, monkeypatch) -> None:
    monkeypatch.setitem(registry._registered, "odd", _backend("odd", lambda op: _raise, why_not=_raise))
    found = as_json(mustdrop("doctor", "--json"))
    assert found["operators"][0]["why_not"]["odd"] == "broken: OSError: the disk is gone"
    assert mustdrop("doctor").exit_code == 1


def test_broken_parts_are_values(mustdrop, as_json, monkeypatch) -> None:
    for name in ("platform", "_driver", "_nvcc", "cpu_name", "_gpus", "_own_version", "_cupy"):
        if name == "platform":
            monkeypatch.setattr(environment.platform, "platform", _raise)
        else:
            monkeypatch.setattr(environment, name, _raise)
    monkeypatch.setattr(environment._load, "cpu_capability", _raise)
    monkeypatch.setitem(sys.modules, "mustdrop_kernels._native", None)
    result = mustdrop("doctor", "--json")
    found = as_json(result)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert found["machine"]["system"] == "broken: OSError: the disk is gone"
    assert found["machine"]["CPU kernels"].startswith("broken: ")
    assert found["build"].startswith("broken: ")
    assert "broken:" in mustdrop("doctor").stdout


def test_advice_for_a_gpu_that_nobody_serves(document, monkeypatch) -> None:
    monkeypatch.setattr(environment, "absent", lambda device: None)
    unserved = {**document, "operators": [{**row, "served_by": None} for row in document["operators"]]}
    monkeypatch.setattr(environment, "find_nvcc", lambda: None)
    assert "pip install triton" in doctor.assess(unserved, ["cpu", "cuda"])[1][-1]
    monkeypatch.setattr(environment, "find_nvcc", lambda: "/opt/nvcc")
    assert "nvcc is there" in doctor.assess(unserved, ["cpu", "cuda"])[1][-1]


def test_advice_for_a_gpu_that_torch_does_not_see(document, monkeypatch) -> None:
    monkeypatch.setattr(environment, "absent", lambda device: "torch finds no GPU" if device == "cuda" else None)
    hidden = {**document, "machine": {**document["machine"], "GPUs": ["GPU 0: X (not found by torch)"]}}
    assert "a torch with CUDA" in doctor.assess(hidden, ["cpu"])[1][-1]


def test_advice_for_a_stale_library(document) -> None:
    stale = {**document, "build": {"version": "0.0.1"}}
    assert "0.0.1" in doctor.assess(stale, ["cpu"])[1][-1]
