# SPDX-License-Identifier: Apache-2.0
"""Parts of each run of bench/run_on_gpu.sh, in order, with their time limits.

`first` and `second` take at most ``LEASE`` seconds each: a GPU may be available for minutes only.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

LEASE = 325  # seconds; the machine may be held for 330
BUILD = 100  # maximum seconds of a lease for a build, if the bundle has no library
SUITES = ("cuda", "cupy", "triton")  # by likelihood of serving the GPU


@dataclasses.dataclass(frozen=True)
class Part:
    """A step of a run, and the interpretation of its exit status."""

    name: str
    seconds: int  # at most; unused time of earlier parts is added
    commands: tuple[tuple[str, ...], ...]  # in sequence
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    tests: bool = False  # a pytest run, whose tests are counted
    finds: tuple[str, ...] = ()  # a planted fault: each command must end with status FOUND and print these words
    backend: str | None = None  # left out if this backend does not serve the GPU
    why_not: str | None = None  # left out, with this reason
    scaled: bool = True  # its limit may be reduced to fit the lease


FOUND = 9  # exit status of compute-sanitizer if it has found an error


@dataclasses.dataclass(frozen=True)
class Machine:
    """Properties of the machine that the commands depend on."""

    python: str
    out: Path
    cores: int
    xdist: bool
    prebuilt: bool  # the library in place was made of these sources
    failed_before: Path  # node ids of tests that failed in an earlier run, if any
    sanitizer: str | None  # compute-sanitizer
    filtered: bool = True  # it supports --kernel-name
    vllm: bool = True  # it is installed


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, on the PATH or in the toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(toolkit) if os.access(toolkit, os.X_OK) else None)


def filters_kernels(sanitizer: str) -> bool:
    """True if it has the option --kernel-name."""
    try:
        output = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return False
    return "--kernel-name" in output.stdout


class Parts:
    """The parts on one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def python(self, *words: str) -> tuple[str, ...]:
        return self.machine.python, *words

    def once(self, *words: str) -> tuple[str, ...]:
        return self.python("tools/gpu_once.py", *words)

    def library(self, build_seconds: int) -> Part:
        """Use the library of the bundle, else build it."""
        seconds = 10 if self.machine.prebuilt else build_seconds
        return Part("library", seconds, (self.python("setup.py", "-q", "build_ext", "--inplace"),), scaled=False)

    def facts(self) -> Part:
        """Versions, driver, clocks and serving backends, after the first import of torch from a cold disk."""
        return Part("facts", 90, (self.once("--facts"),), scaled=False)

    def coverage(self, seconds: int) -> Part:
        return Part("coverage", seconds, (self.once("--coverage"),))

    def graph(self, seconds: int) -> Part:
        return Part("graph", seconds, (self.once("--graph"),))

    def pytest(self, *words: str) -> tuple[str, ...]:
        """pytest with short tracebacks and a limit of failures, which bounds the size of the log."""
        workers = ("-n", str(self.machine.cores - 2 if self.machine.cores > 4 else 2)) if self.machine.xdist else ()
        options = ("-q", *workers, "-p", "no:cacheprovider", "--tb=short", "--maxfail=60")
        return self.python("-m", "pytest", *options, *words)

    def suite(self, backend: str, seconds: int, *more: str) -> Part:
        """tests/ops on one backend. Tests without a backend run with the CUDA kernels only."""
        only = "cuda" if backend == "cuda" else f"{backend}-cuda"
        command = self.pytest(*more, "-k", only, "tests/ops")
        environment = {"MUSTDROP_TEST_BACKENDS": backend}
        return Part(f"suite-{backend}", seconds, (command,), environment, tests=True, backend=backend)

    def tokens(self, seconds: int) -> Part:
        """End-to-end tests: tokens, threads with different shapes, arrays of other packages, CUDA graph captures."""
        files = (
            "tests/integrations/test_compiled.py",
            "tests/frameworks/test_dlpack.py",
            "tests/test_concurrency.py",
            "tests/bench/test_on_gpu.py",
        )
        command = self.pytest("-k", "cuda_graph or cupy or differ or on_gpu", *files)
        return Part("tokens", seconds, (command,), tests=True)

    def again(self, seconds: int) -> Part:
        """The tests that failed in an earlier run."""
        before = self.machine.failed_before
        command = self.pytest(f"@{before}")
        environment = {"MUSTDROP_TEST_BACKENDS": ",".join(SUITES)}
        why_not = None if before.exists() else f"no test failed before (there is no {before})"
        return Part("again", seconds, (command,), environment, tests=True, why_not=why_not)

    def sanitized(self, tool: str, *words: str, filtered: bool = True) -> tuple[str, ...]:
        only = ("--kernel-name", "kns=mustdrop") if filtered and self.machine.filtered else ()
        sanitizer = self.machine.sanitizer or "compute-sanitizer"
        return sanitizer, "--tool", tool, *only, "--error-exitcode", str(FOUND), *self.once(*words)

    def sanitizer(self, tool: str, seconds: int) -> Part:
        """Every operator under one tool of compute-sanitizer.

        memcheck and initcheck do not check inside the segments of torch's caching allocator, so they run without it.
        initcheck requires that the kernels which write the inputs are instrumented too, so all kernels are, and only
        selections and moves are called: the workspaces of the others are read only where they were written.
        """
        allocator = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
        only = ("moving", "selecting") if tool == "initcheck" else ()
        command = self.sanitized(tool, *only, filtered=tool != "initcheck")
        return Part(tool, seconds, (command,), allocator, why_not=self._without_sanitizer())

    def planted(self, seconds: int) -> Part:
        """An out-of-bounds write and a race that the same commands must find, to validate their clean results."""
        commands = (self.sanitized("memcheck", "planted_write"), self.sanitized("racecheck", "planted_race"))
        words = ("Invalid __global__ write", "Race reported")
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part("planted", seconds, commands, environment, finds=words, why_not=self._without_sanitizer())

    def _without_sanitizer(self) -> str | None:
        return None if self.machine.sanitizer else "compute-sanitizer was not found"

    def times(self, name: str, seconds: int, *words: str) -> Part:
        """`mustdrop bench ops` into NAME.json."""
        path = self.machine.out / f"{name}.json"
        words = ("-m", "mustdrop_kernels", "bench", "ops", *words, "--device", "cuda", "--json", str(path))
        return Part(name, seconds, (self.python(*words),))

    def e2e(self, name: str, seconds: int, *words: str) -> Part:
        """A whole LLaVA-1.5-7B into NAME.json."""
        path = self.machine.out / f"{name}.json"
        model = ("--device", "cuda", "--model", "llava-1.5-7b")
        words = ("-m", "mustdrop_kernels", "bench", "model", *model, *words, "--json", str(path))
        return Part(name, seconds, (self.python(*words),))

    def serving(self, seconds: int, *words: str) -> Part:
        """`mustdrop bench serving` into serving.json."""
        path = self.machine.out / "serving.json"
        command = self.python("-m", "mustdrop_kernels", "bench", "serving", *words, "--json", str(path))
        why_not = None if self.machine.vllm else "vLLM is not installed"
        return Part("serving", seconds, (command,), why_not=why_not)


_MOVED_MOST = ("spatial_merge", "text_vision_scores", "cls_attention", "select_topk", "gather_tokens", "compact_kv_")


def first(at: Parts) -> list[Part]:
    """Correctness of each kernel, sanitizer runs; then the other backends."""
    return [
        at.library(BUILD), at.facts(), at.coverage(18), at.graph(12), at.suite("cuda", 60, "-m", "not slow"),
        at.planted(20), at.sanitizer("memcheck", 30), at.sanitizer("racecheck", 30), at.tokens(25),
        at.suite("cupy", 15, "-m", "not slow"), at.suite("triton", 15, "-m", "not slow"),
    ]  # fmt: skip


def second(at: Parts) -> list[Part]:
    """Tests that failed before; then timings."""
    shapes = "llava-1.5,llava-next,video-gqa"
    return [
        at.library(BUILD), at.again(55), at.sanitizer("synccheck", 25),
        at.times("ops", 70, *_MOVED_MOST, "--no-compiled", "--seconds", "0.2", "--shapes", shapes),
        at.times("compiled", 40, *_MOVED_MOST[:3], "--seconds", "0.2", "--shapes", "llava-1.5"),
        at.e2e("e2e", 125, "--batch", "1,32", "--tokens", "full,192,64", "--new-tokens", "64", "--repeats", "3"),
    ]  # fmt: skip


def suite(at: Parts) -> list[Part]:
    """Every GPU test, including the slow ones, on every backend."""
    return [at.library(300), at.facts(), *(at.suite(backend, 300) for backend in SUITES), at.tokens(120)]


def sanitize(at: Parts) -> list[Part]:
    """memcheck, racecheck, synccheck and initcheck over every kernel."""
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    return [
        at.library(300), at.facts(), at.coverage(60), at.planted(60), *(at.sanitizer(tool, 180) for tool in tools),
    ]  # fmt: skip


def bench(at: Parts) -> list[Part]:
    """Every operator, shape, type and baseline."""
    shapes = "llava-1.5,llava-next,llava-1.5:8,llava-1.5:64"
    return [
        at.library(300), at.facts(),
        *(
            at.times(f"ops-{dtype}", 900, "--dtype", dtype, "--shapes", shapes)
            for dtype in ("bfloat16", "float16", "float32")
        ),
        at.times("ops-video", 600, "--dtype", "bfloat16", "--shapes", "video-mha,video-gqa"),
    ]  # fmt: skip


def e2e(at: Parts) -> list[Part]:
    """LLaVA-1.5-7B from its configuration, batch 1 and 32, full against 192, 128 and 64 tokens; a CUDA graph."""
    return [at.library(300), at.facts(), at.graph(60), at.e2e("e2e", 600, "--batch", "1,32", "--new-tokens", "128")]


def decode(at: Parts) -> list[Part]:
    """The same at batch 1 with a static cache, its decode steps compiled into CUDA graphs, and their answers."""
    return [
        at.library(300), at.facts(), at.tokens(120),
        at.e2e("e2e-static", 600, "--cache", "static", "--tokens", "full,64", "--new-tokens", "128", "--repeats", "3"),
    ]  # fmt: skip


def serve(at: Parts) -> list[Part]:
    """vLLM with 1 to 128 requests in flight: every vision token, dropped tokens, smaller images."""
    return [at.library(300), at.facts(), at.serving(480, "--model", "llava-1.5-7b", "--rounds", "2")]


RUNS = {run.__name__: run for run in (first, second, suite, sanitize, bench, e2e, decode, serve)}
SHORT = ("first", "second")  # take LEASE at most


def parts_of(run: str, machine: Machine) -> list[Part]:
    """The parts of a run; short runs fit into the lease, including a build."""
    parts = RUNS[run](Parts(machine))
    return fitted(parts, LEASE) if run in SHORT else parts


def fitted(parts: Sequence[Part], most: int) -> list[Part]:
    """The parts, with limits reduced in proportion if their sum exceeds ``most`` seconds."""
    fixed = total(part for part in parts if not part.scaled)
    rest = total(part for part in parts if part.scaled)
    if fixed + rest <= most:
        return list(parts)
    share = (most - fixed) / rest
    return [dataclasses.replace(p, seconds=int(p.seconds * share)) if p.scaled else p for p in parts]


def total(parts: Iterable[Part]) -> int:
    """Sum of the limits in seconds."""
    return sum(part.seconds for part in parts)
