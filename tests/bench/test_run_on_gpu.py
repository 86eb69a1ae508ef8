# SPDX-License-Identifier: Apache-2.0
"""bench/run_on_gpu.sh without a GPU: what it would do, that it fits into a lease, and what comes back in any case."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_bundle
import gpu_parts
import gpu_run
import pytest
from gpu_parts import LEASE, Part
from processes import run_python

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "run_on_gpu.sh"

ORDER = {
    "first": "library facts coverage graph suite-cuda planted memcheck racecheck tokens suite-cupy suite-triton",
    "second": "library again synccheck ops compiled e2e",
    "suite": "library facts suite-cuda suite-cupy suite-triton tokens",
    "sanitize": "library facts coverage planted memcheck racecheck synccheck initcheck",
    "bench": "library facts ops-bfloat16 ops-float16 ops-float32 ops-video",
    "e2e": "library facts graph e2e",
    "decode": "library facts tokens e2e-static",
    "serve": "library facts serving",
}


def run(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    search = f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]
    usual = {"PATH": search, "PYTHON": sys.executable, "MUSTDROP_GPU_BUNDLE": "/nowhere"}  # nothing is unpacked here
    return subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, env={**os.environ, **usual, **environment}
    )


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def machine(out: Path, **change: object) -> gpu_parts.Machine:
    usual = gpu_parts.Machine(
        python=sys.executable, out=out, cores=16, xdist=True, prebuilt=True, failed_before=out / "failed-before.txt",
        sanitizer="compute-sanitizer",
    )  # fmt: skip
    return dataclasses.replace(usual, **change)


# ------------------------------------------------------------------------------------------------ what would be done


@pytest.mark.parametrize("name", gpu_parts.RUNS)
def test_dry_run(name, tmp_path):
    done = run("--dry-run", name, OUT=str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    parts = dict(re.findall(r"^(\S+) +at most +(\d+) s: .+$", done.stdout, flags=re.MULTILINE))
    assert " ".join(parts) == ORDER[name]
    (most,) = re.findall(rf"^{name}: at most (\d+) s$", done.stdout, flags=re.MULTILINE)
    assert int(most) == sum(map(int, parts.values()))
    if name == "first":
        assert run("--dry-run", OUT=str(tmp_path / "results")).stdout == done.stdout, "it is the default"
    assert not (tmp_path / "results").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("name", gpu_parts.SHORT)
@pytest.mark.parametrize("prebuilt", [True, False])
def test_a_short_run_fits_into_a_lease(name, prebuilt, tmp_path):
    parts = gpu_parts.parts_of(name, machine(tmp_path, prebuilt=prebuilt))
    assert " ".join(part.name for part in parts) == ORDER[name]
    assert gpu_parts.total(parts) <= LEASE <= 330
    assert min(part.seconds for part in parts) > 5
    seconds = {part.name: part.seconds for part in parts}
    assert seconds.get("facts", 90) == 90, "the first import of torch, from a cold disk"
    assert seconds["library"] == (10 if prebuilt else gpu_parts.BUILD)


def test_suites_use_the_cores_and_run_their_own_tests(tmp_path):
    at = gpu_parts.Parts(machine(tmp_path))
    words = {name: at.suite(name, 1).commands[0] for name in gpu_parts.SUITES}
    assert {name: word[word.index("-k") + 1] for name, word in words.items()} == {
        "cuda": "cuda", "cupy": "cupy-cuda", "triton": "triton-cuda",
    }  # fmt: skip
    assert all(word[word.index("-n") + 1] == "14" for word in words.values())
    few = gpu_parts.Parts(machine(tmp_path, cores=2)).suite("cuda", 1).commands[0]
    assert few[few.index("-n") + 1] == "2"
    assert "-n" not in gpu_parts.Parts(machine(tmp_path, xdist=False)).suite("cuda", 1).commands[0]


@pytest.mark.parametrize("backend", gpu_parts.SUITES)
def test_a_suite_collects_its_backend_alone(backend, tmp_path):
    """Collected tests where torch finds a GPU: their ids name the backend, or with cuda the device alone."""
    command = gpu_parts.Parts(machine(tmp_path, xdist=False)).suite(backend, 1).commands[0]
    words = [*command[3:-1], "--collect-only", "tests/ops/test_gather.py", "tests/ops/test_opcheck.py"]
    pretend = f"""
import sys, pytest, torch
from mustdrop_kernels import backends
torch.cuda.is_available = lambda: True
serves = lambda op, device: None if device == "cuda" else "it serves CUDA tensors"
backends.register_backend(backends.Backend({backend!r}, lambda op: None, serves, ""), replace=True)
sys.exit(pytest.main(sys.argv[1:]))
"""
    environment = {"PYTHONPATH": str(ROOT), "MUSTDROP_EMULATION_SAMPLE": "0", "MUSTDROP_TEST_BACKENDS": backend}
    done = run_python("-c", pretend, *words, folder=ROOT, **environment)
    names = re.findall(r"^tests/ops/[\w/.:]+\[(.*)\]$", done.stdout, flags=re.MULTILINE)
    own = [name for name in names if f"{backend}-cuda" in name]
    assert len(own) > 20, done.stdout + done.stderr
    rest = set(names) - set(own)
    assert all("cuda" in name for name in rest) if backend == "cuda" else not rest
    assert bool(rest) == (backend == "cuda"), "opcheck looks at what serves, whatever the backend"


def test_sanitizers_see_something(tmp_path):
    at = gpu_parts.Parts(machine(tmp_path))
    for tool in ("memcheck", "initcheck"):
        assert at.sanitizer(tool, 1).environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    filters = {tool: "kns=mustdrop" in at.sanitizer(tool, 1).commands[0] for tool in ("memcheck", "initcheck")}
    assert filters == {"memcheck": True, "initcheck": False}, "who writes the inputs has to be seen too"
    assert at.sanitizer("initcheck", 1).commands[0][-2:] == ("moving", "selecting")
    whole = at.sanitizer("memcheck", 1)
    assert [command[:-1] for command in at.planted(1).commands] == [
        whole.commands[0], at.sanitizer("racecheck", 1).commands[0],
    ]  # fmt: skip
    assert at.planted(1).environment == whole.environment, "by the same commands"
    without = gpu_parts.Parts(machine(tmp_path, sanitizer=None))
    assert without.planted(1).why_not == "compute-sanitizer was not found"


def test_the_files_that_the_parts_name_exist(tmp_path):
    named = set(re.findall(r"\b(?:bench|tests|tools)/[\w./]*\w", run("--dry-run", *gpu_parts.RUNS, OUT="out").stdout))
    assert {"tools/gpu_once.py", "tests/bench/test_on_gpu.py", "tests/integrations/test_compiled.py"} <= named
    assert all((ROOT / name).exists() for name in named), named


def test_bench_takes_the_options_that_it_is_given(mustdrop, tmp_path):
    there = set()
    for name in ("second", "bench", "e2e", "decode", "serve"):
        for part in gpu_parts.parts_of(name, machine(tmp_path)):
            if "mustdrop_kernels" in part.commands[0] and "bench" in part.commands[0]:
                words = list(part.commands[0][part.commands[0].index("bench") :])
                device = () if words[1] == "serving" else ("--device", "cpu")
                result = mustdrop(*words, *device, "--dry-run")
                assert result.exit_code == 0, result.output
                there.add(words[1])
    assert there == {"ops", "model", "serving"}


def test_serving_is_left_out_without_vllm(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (*_, part) = gpu_parts.parts_of("serve", gpu_run.describe_machine(prebuilt=True, dry=False))
    assert (part.name, part.why_not) == ("serving", "vLLM is not installed")
    (*_, part) = gpu_parts.parts_of("serve", gpu_run.describe_machine(prebuilt=True, dry=True))
    assert part.why_not is None


def test_wrong_usage():
    done = run("--fast")
    assert done.returncode == 2
    assert "usage" in done.stderr
    done = run("third")
    assert done.returncode == 2
    assert "there is no run third; there are first, second" in done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_without_a_gpu(tmp_path):
    done = run(OUT=str(tmp_path / "results"))
    assert done.returncode == 1
    assert "no NVIDIA GPU was found; --dry-run" in done.stderr


# ------------------------------------------------------------------------------------------------ what comes back


def summary(out: Path) -> dict[str, dict]:
    return {part["part"]: part for part in json.loads((out / "summary.json").read_text())["parts"]}


def test_a_failure_leaves_the_others(tmp_path):
    """With a Python that fails in one part and a compute-sanitizer that finds what is planted, all other parts run."""
    tools, out = tmp_path / "tools", tmp_path / "results"
    tools.mkdir()
    program(tools / "nvidia-smi", "echo 9.0")
    program(
        tools / "compute-sanitizer",
        """case "$*" in
  *--help*) echo "  --kernel-name arg";;
  *planted_write*) echo "Invalid __global__ write of size 4 bytes"; exit 9;;
  *planted_race*) echo "Race reported between"; exit 9;;
  *racecheck*) echo hazards; exit 9;;
  *) echo no errors;;
esac""",
    )
    program(
        tools / "python",
        f"""case "$*" in
  *gpu_run.py*) exec {sys.executable} "$@";;
  *--facts*) printf 'a warning\\n{{\\n "backends": ["cuda", "triton"]\\n}}\\n';;
  *--graph*) echo "the graph is broken"; exit 3;;
  *"-m pytest"*) echo '{{"test": "tests/test_some.py::test_one", "outcome": "passed"}}' > "$MUSTDROP_TEST_RECORD";;
  *) echo fine;;
esac""",
    )
    done = run(path=tools, OUT=str(out), PYTHON=str(tools / "python"), MUSTDROP_COMMIT="0123456789ab")
    assert done.returncode == 1, done.stderr
    assert "the graph is broken" in done.stdout
    parts = summary(out)
    assert " ".join(parts) == ORDER["first"]
    assert (parts["graph"]["result"], parts["graph"]["why"]) == ("failed", "status 3")
    assert (parts["racecheck"]["result"], parts["racecheck"]["why"]) == ("failed", "status 9")
    assert parts["suite-cupy"]["why"] == "cupy does not serve the GPU"
    assert {name for name, part in parts.items() if part["result"] == "passed"} == {
        "library", "facts", "coverage", "suite-cuda", "planted", "memcheck", "tokens", "suite-triton",
    }  # fmt: skip
    document = json.loads((out / "summary.json").read_text())
    assert document["facts"]["backends"] == ["cuda", "triton"]
    assert document["commit"] == "0123456789ab"
    assert "left out: cupy does not serve the GPU" in (out / "summary.txt").read_text()
    assert "===== memcheck\nno errors\n" in (out / "log.txt").read_text()
    assert {path.name for path in out.iterdir()} == {"summary.json", "summary.txt", "log.txt"}


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Runs parts that are given as (name, seconds, code) on this machine."""

    def go(*parts: Part, environment: dict[str, str] | None = None) -> dict[str, dict]:
        monkeypatch.setattr(gpu_parts, "parts_of", lambda name, machine: list(parts))
        usual = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        gpu_run.Runner(machine(tmp_path), {**usual, **(environment or {})}, time.monotonic()).run(["some"])
        return summary(tmp_path)

    return go


def code(name: str, seconds: int, text: str, **more) -> Part:
    return Part(name, seconds, ((sys.executable, "-c", text),), **more)


def test_a_planted_fault_that_is_not_found_fails(runner):
    found = "import sys; print('Race reported'); sys.exit(9)"
    parts = runner(
        code("found", 20, found, finds=("Race reported",)),
        code("silent", 20, "", finds=("Race reported",)),
        code("other", 20, "import sys; print('hazard'); sys.exit(9)", finds=("Race reported",)),
    )
    assert [part["result"] for part in parts.values()] == ["passed", "failed", "failed"]
    assert "the planted fault was not found" in parts["silent"]["why"]


def test_time_that_is_left_goes_to_the_parts_after(runner, monkeypatch):
    """The third part takes longer than its limit, and may; the fourth takes longer than everything."""
    monkeypatch.setattr(gpu_run, "GRACE", 1)
    began = time.monotonic()
    parts = runner(
        code("quick", 4, ""),
        code("failing", 1, "raise SystemExit(1)"),
        code("slow", 1, "import time; time.sleep(2)"),
        code("hanging", 1, "import time; time.sleep(600)"),
    )
    assert [part["result"] for part in parts.values()] == ["passed", "failed", "passed", "failed"]
    assert "longer than 1 s" in parts["hanging"]["why"]
    assert time.monotonic() - began < 4 + 1 + 1 + 1 + 3


TESTS = """
import time, pytest
@pytest.mark.parametrize("i", range(8))
def test_some(i):
    assert i != 2
    if i == 5:
        open({marker!r}, "w").close()
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            {then}
"""


def recorded(folder: Path, seconds: int, tests: str, *words: str) -> tuple[Part, dict[str, str]]:
    """A part with tests, which are recorded as those of this repository are; and the environment that it needs."""
    folder.mkdir()
    (folder / "conftest.py").write_text("from record import pytest_configure")
    (folder / "test_some.py").write_text(tests)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", *words, str(folder))
    return Part("suite-cuda", seconds, (command,), tests=True), {"PYTHONPATH": str(ROOT / "tests")}


class Clock:
    """A clock that jumps so far ahead when a file appears that ``seconds`` have passed since it was made."""

    sleep = staticmethod(time.sleep)

    def __init__(self, marker: Path, seconds: float) -> None:
        self.marker, self.seconds, self.began, self.ahead = marker, seconds, time.monotonic(), 0.0

    def monotonic(self) -> float:
        now = time.monotonic()
        if not self.ahead and self.marker.exists():
            self.ahead = self.began + self.seconds - now
        return now + self.ahead


@pytest.mark.parametrize(("then", "workers"), [("raise", 0), ("time.sleep(600)", 0), ("raise", 2)])
def test_names_of_failed_tests_survive_a_timeout(runner, tmp_path, monkeypatch, then, workers):
    """Whether pytest ends after the interrupt or has to be killed. The limit is reached when a test hangs."""
    marker, limit, grace = tmp_path / "hangs", 600, 2
    monkeypatch.setattr(gpu_run, "GRACE", grace)
    monkeypatch.setattr(gpu_run, "time", Clock(marker, limit - grace))
    words = ("-n", str(workers)) if workers else ()
    tests = TESTS.format(then=then, marker=str(marker))
    part, environment = recorded(tmp_path / "suite", limit, tests, *words)
    tests = runner(part, environment=environment)["suite-cuda"]["tests"]
    assert tests["failed"] == 1
    assert tests["names"][0].endswith("test_some.py::test_some[2]")
    if not workers:
        assert (tests["passed"], tests["not_reached"]) == (4, 3)
    assert tests["passed"] + tests["failed"] + tests["not_reached"] == 8
    assert tests["not_reached"] >= 1
    assert (tmp_path / "failed.txt").read_text().splitlines() == tests["names"]


def test_a_suite_that_skips_everything_has_not_passed(runner, tmp_path):
    tests = "import pytest\ndef test_some(): pytest.skip('no device')\n"
    part, environment = recorded(tmp_path / "suite", 60, tests)
    found = runner(part, environment=environment)["suite-cuda"]
    assert (found["result"], found["tests"]["skipped"]) == ("failed", 1)
    assert "no test passed" in found["why"]


def test_logs_stay_small(runner, tmp_path):
    runner(code("loud", 60, "print('begin'); print('x' * 200 * 2**20); print('end')"))
    log = (tmp_path / "log.txt").read_bytes()
    assert len(log) < 300 << 10
    assert b"===== loud\nbegin" in log
    assert b"bytes left out" in log
    assert log.endswith(b"end\n")


def test_a_backend_whose_facts_are_unknown_is_tried(runner):
    parts = runner(code("facts", 20, "raise SystemExit(1)"), code("suite-cupy", 20, "", backend="cupy"))
    assert parts["suite-cupy"]["result"] == "passed"


AT_THE_START = """
class Started(gpu_run.subprocess.Popen):
    def __init__(self, command, **settings):
        super().__init__(command, **settings)
        if command[-1] == hang:
            Path({pid!r}).write_text(str(self.pid))
            signal.raise_signal(signal.{name})
gpu_run.subprocess.Popen = Started
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("early", [False, True])
def test_an_interrupt_leaves_a_summary_and_no_process(tmp_path, name, early):
    """At work, or before the process that starts a part has its handle."""
    patch = AT_THE_START.format(pid=str(tmp_path / "pid"), name=name) if early else ""
    text = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [{str(ROOT / "tools")!r}, {str(ROOT / "tests" / "bench")!r}]
import gpu_parts, gpu_run
from pathlib import Path
hang = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(600)"
parts = [gpu_parts.Part(n, 60, ((sys.executable, "-c", c),)) for n, c in (("a", ""), ("b", hang), ("c", ""))]
gpu_parts.parts_of = lambda name, machine: parts
machine = gpu_parts.Machine(sys.executable, Path({str(tmp_path)!r}), 2, False, True, Path("none"), None)
signal.signal(signal.SIGTERM, gpu_run._interrupt)
signal.signal(signal.SIGINT, gpu_run._interrupt)
{patch}
sys.exit(int(not gpu_run.Runner(machine, dict(os.environ), time.monotonic()).run(["some"])))
"""
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not early:
        process.send_signal(getattr(signal, name))
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert {k: p["result"] for k, p in summary(tmp_path).items()} == {"a": "passed", "b": "failed", "c": "not reached"}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ------------------------------------------------------------------------------------------------ what is carried


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A folder with a library, a wheel and a commit, and the place where libraries go."""
    folder, installed = tmp_path / "gpu-bundle", tmp_path / "installed"
    (folder / "lib").mkdir(parents=True)
    for name in ("libmustdrop.so", "libmustdrop_nvrtc.so", "libmustdrop_cuda.so"):
        (folder / "lib" / name).write_text("carried")
    gpu_bundle.SOURCES["write_record"](folder / "lib", ROOT, ["90"], "")
    (folder / "wheels").mkdir()
    import zipfile

    with zipfile.ZipFile(folder / "wheels" / "baseline-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("baseline/__init__.py", "HERE = 1\n")
    (folder / "bundle.json").write_text('{"commit": "0123456789ab"}')
    monkeypatch.setattr(gpu_bundle, "FOLDER", folder)
    monkeypatch.setattr(gpu_bundle, "INSTALLED", installed)
    return folder


def test_a_carried_library_is_put_in_its_place(bundle, tmp_path):
    assert gpu_bundle.is_prebuilt(["90"])
    assert not gpu_bundle.is_prebuilt(["80"])
    found = gpu_bundle.unpack(tmp_path / "site")
    assert found.commit == "0123456789ab"
    assert found.remarks == []
    assert (gpu_bundle.INSTALLED / "libmustdrop_cuda.so").read_text() == "carried"
    assert (tmp_path / "site" / "baseline" / "__init__.py").exists()
    assert gpu_run.environment_of(found)["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(tmp_path / "site")]


def test_a_library_of_other_sources_is_not_used(bundle, tmp_path):
    record = json.loads((bundle / "lib" / "build.json").read_text())
    (bundle / "lib" / "build.json").write_text(json.dumps({**record, "sources": "0" * 64}))
    assert not gpu_bundle.is_prebuilt(["90"])
    found = gpu_bundle.unpack(tmp_path / "site")
    assert found.remarks == ["gpu-bundle: its library is of other sources and is not used"]
    assert not gpu_bundle.INSTALLED.exists()


def test_without_a_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "FOLDER", tmp_path / "none")
    assert gpu_bundle.unpack(tmp_path) == gpu_bundle.Unpacked()


def test_a_bundle_is_made_and_says_how_it_is_used(bundle, monkeypatch, capsys):
    failed = bundle.parent / "failed.txt"
    failed.write_text("tests/ops/test_gather.py::test_one[cuda-cuda]\n")
    monkeypatch.setattr(gpu_bundle, "add_wheels", lambda: "wheels of baselines")
    monkeypatch.setattr(gpu_bundle, "git_commit", lambda: "0123456789ab")
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--failed", str(failed)])
    assert gpu_bundle.main() == 0
    said = capsys.readouterr().out
    assert "16 cores (tests run in 14 workers)" in said
    assert "  MUSTDROP_COMMIT=0123456789ab bench/run_on_gpu.sh first\n" in said
    assert "  MUSTDROP_COMMIT=0123456789ab bench/run_on_gpu.sh second\n" in said
    assert (bundle / "failed.txt").read_text() == failed.read_text()
    monkeypatch.setattr(gpu_bundle, "MOST_BYTES", 10)
    assert gpu_bundle.main() == 1
    assert "larger than" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ gpu_once


def gpu_once():
    spec = importlib.util.spec_from_file_location("gpu_once", ROOT / "tools" / "gpu_once.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_operator_and_every_kernel_has_a_place(monkeypatch):
    """gpu_once calls each operator, and finds the kernels of each folder that has launchers."""
    from mustdrop_kernels.backends import OPS

    module, called = gpu_once(), []
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "mustdrop", SimpleNamespace(**{op: lambda op=op, **_: called.append(op) for op in OPS}))
    module.samples()
    assert set(called) == set(OPS)
    kernels = module.kernels_of_sources()
    launched = "".join(path.read_text() for path in (ROOT / "csrc").glob("*/*.cu"))
    launched += "".join(path.read_text() for path in (ROOT / "csrc").glob("*/*.h"))
    some = {"gather_kernel", "compact_kernel", "compact_chunks_kernel", "select_kernel", "merge_cluster_kernel"}
    assert some <= kernels
    assert [name for name in kernels if name.endswith("_kernel") and name not in launched] == []


def test_planted_faults_are_parts_of_their_own():
    module = gpu_once()
    assert {"planted_write", "planted_race"} == set(module.PARTS) - set(module.OPERATORS)
    assert all(f"mustdrop_{name}(" in module.PLANTED for name in ("planted_write", "planted_race"))


@pytest.mark.slow
def test_planted_faults_compile(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    source = tmp_path / "planted.cu"
    source.write_text(gpu_once().PLANTED)
    command = [nvcc, "-arch=sm_90", "-cubin", str(source), "-o", str(tmp_path / "planted.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
