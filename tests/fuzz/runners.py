# SPDX-License-Identifier: Apache-2.0
"""Backends under test, in this process or in a child process that may crash, hang or require another environment."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cuda_emulation
import safetensors.torch
from cuda_emulation import nvrtc
from ops.conftest import candidates
from ops.schemas import OPS

import mustdrop_kernels
from mustdrop_kernels import _load, backends

from .family import Answer, Family
from .inputs import Case

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
"""Instruction sets of the CPU kernels in ascending order."""
TESTS = Path(__file__).parents[1]
EMULATED = {cuda_emulation.NAME: cuda_emulation.emulated, nvrtc.NAME: nvrtc.emulated}


class Runner(Protocol):
    """A backend under test. `share`: fraction of the cases that it computes."""

    name: str
    share: float

    def start(self, case: Case) -> None:
        """Start the computation of a case."""

    def answer(self, family: Family, case: Case) -> Answer:
        """Wait for the result."""

    def close(self) -> None:
        """Release resources."""


def call_of(backend: str, family: Family, case: Case) -> Callable[..., Any]:
    """The family's function on a backend; a hash of the case configures the emulated device."""
    if backend in EMULATED:
        if backend not in backends.registered():
            backends.register_backend(EMULATED[backend]())
        cuda_emulation.configure_for(json.dumps(case, sort_keys=True))
    function = family.function or getattr(mustdrop_kernels, family.op)
    return lambda **arguments: function(**arguments, backend=backend)


@dataclass
class Here:
    """A backend in this process. `call` replaces a backend, for tests of the fuzzer."""

    name: str
    share: float = 1.0
    call: Callable[[str, Case], Callable[..., Any]] | None = None

    def start(self, case: Case) -> None:
        """Does nothing: `answer` computes."""

    def answer(self, family: Family, case: Case) -> Answer:
        call = call_of(self.name, family, case) if self.call is None else self.call(family.op, case)
        return family.compute(case, call)

    def close(self) -> None:
        """Does nothing."""


@dataclass
class Child:
    """A backend in a child process (``child.py``): reads lines of JSON, writes a line of JSON and safetensors each."""

    name: str
    backend: str
    share: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    patience_s: float = 120.0
    command: tuple[str, ...] = (sys.executable, "-m", "fuzz.child")
    _process: subprocess.Popen[bytes] | None = None

    def start(self, case: Case) -> None:
        if self._process is None:
            paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment}
            self._process = subprocess.Popen(
                [*self.command, self.backend],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` reports the exit status
            self._process.stdin.write(json.dumps(case).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, family: Family, case: Case) -> Answer:
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        if not select.select([stream], [], [], self.patience_s)[0]:
            self.close()
            return Answer(problem=f"gave no answer in {self.patience_s:.0f} s")
        head = stream.readline()
        if not head:
            status = self._process.wait()
            self._process = None  # a new one for the next case
            return Answer(problem=f"died with status {status}")
        told = json.loads(head)
        if told["problem"] is not None:
            return Answer(problem=told["problem"])
        tensors = safetensors.torch.load(stream.read(told["bytes"]))
        return Answer([tensors[str(i)] for i in range(len(tensors))])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def takes(runner: Runner, case: Case) -> bool:
    """True if a case belongs to the runner's share; deterministic per case."""
    return zlib.crc32(json.dumps(case, sort_keys=True).encode()) % 10_000 < runner.share * 10_000


SHARES = {"cpu": 1.0, "reference": 1.0, "cuda_emulated": 0.05, "triton": 0.01}
LEVEL_SHARE = 0.25


def available() -> dict[str, str | None]:
    """Name -> None, or the reason that it is not available. "cpu" uses the best instruction set."""
    best = _load.cpu_capability()
    names: dict[str, str | None] = dict.fromkeys(("cpu", "reference"))
    for level in LEVELS[:-1]:
        known = best in LEVELS and LEVELS.index(level) < LEVELS.index(best)
        names[f"cpu:{level}"] = None if known else f"this machine has {best}"
    names[cuda_emulation.NAME] = cuda_emulation.why_not()
    has_triton = candidates()["triton"].why_not(OPS[0], "cuda")
    names["triton"] = has_triton if has_triton is not None and "not installed" in has_triton else None
    return names


def child(name: str, share: float | None = None) -> Child:
    """A runner of `available` in a child process."""
    backend, _, level = name.partition(":")
    environment = {"OMP_NUM_THREADS": "1"}
    if level:
        environment["MUSTDROP_CPU_CAPABILITY"] = level
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    usual = LEVEL_SHARE if level else SHARES[backend]
    return Child(name, backend, usual if share is None else share, environment)


@contextlib.contextmanager
def closing(runners: list[Runner]) -> Iterator[list[Runner]]:
    """Close the runners at the end of the context."""
    try:
        yield runners
    finally:
        for runner in runners:
            runner.close()
