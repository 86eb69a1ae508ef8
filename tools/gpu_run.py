# SPDX-License-Identifier: Apache-2.0
"""Run the parts of tools/gpu_parts.py on a machine with a GPU. Started by bench/run_on_gpu.sh; see there.

The summary is written after each part, so that an aborted run has one too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

import gpu_bundle  # noqa: E402
import gpu_parts  # noqa: E402
from gpu_parts import FOUND, Part  # noqa: E402
from record import read as read_tests  # noqa: E402

GRACE = 5  # seconds between the interrupt of a part that exceeds its limit and its kill
LOG_HEAD, LOG_TAIL = 96 << 10, 160 << 10  # bytes of a part's log that are kept; all logs together stay far below 16 MiB
MOST_NAMES = 200  # of failed tests in the summary


@dataclasses.dataclass
class Ended:
    """Outcome of a part."""

    run: str
    part: str
    limit: int  # seconds
    result: str  # "passed", "failed", "left out", "not reached"
    why: str = ""
    seconds: float = 0.0
    tests: dict[str, Any] | None = None

    def line(self) -> str:
        """A line for the summary."""
        tests = self.tests or {}
        counts = [
            f"{tests[kind]} {kind.replace('_', ' ')}"
            for kind in ("passed", "failed", "skipped", "not_reached")
            if tests
        ]
        words = "; ".join(filter(None, [self.why, ", ".join(counts)]))
        return f"{self.part:<16} {self.seconds:6.1f} of {self.limit:3d} s  {self.result}{': ' + words if words else ''}"


class Interrupted(Exception):
    """SIGINT or SIGTERM was received."""


class Runner:
    """Runs parts and writes the summary."""

    def __init__(self, machine: gpu_parts.Machine, environment: dict[str, str], began: float) -> None:
        """``began``: start of the first part's time, which includes unpacking."""
        self.machine, self.environment, self.began = machine, environment, began
        self.facts: dict[str, Any] | None = None
        self.ended: list[Ended] = []
        self.out = machine.out

    def run(self, names: list[str]) -> bool:
        """Run all parts; True if none failed and all were reached."""
        todo = [(name, part) for name in names for part in gpu_parts.parts_of(name, self.machine)]
        self._write(todo)
        running, deadline = names[0], self.began
        try:
            for i, (name, part) in enumerate(todo):
                if name != running:
                    running, deadline = name, time.monotonic()
                deadline += part.seconds
                self.ended.append(self._part(name, part, deadline))
                print(self.ended[-1].line(), flush=True)
                self._write(todo[i + 1 :])
        except Interrupted:
            self._write(todo[len(self.ended) :])
            return False
        return all(one.result in ("passed", "left out") for one in self.ended)

    def _part(self, run: str, part: Part, deadline: float) -> Ended:
        ended = Ended(run, part.name, part.seconds, "passed")
        reason = part.why_not or self._does_not_serve(part.backend)
        if reason:
            return dataclasses.replace(ended, result="left out", why=reason)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            record = Path(scratch, "tests.jsonl")
            environment = {**self.environment, **part.environment, "MUSTDROP_TEST_RECORD": str(record)}
            try:
                for i, command in enumerate(part.commands):
                    status, output = self._command(part, command, environment, deadline)
                    if why := self._wrong(part, i, status, output):
                        ended.result, ended.why = "failed", why
                        _show_end(output)
                        break
            except Interrupted:
                ended.result, ended.why, ended.seconds = "failed", "interrupted", time.monotonic() - began
                self.ended.append(ended)
                raise
            if part.tests:
                ended.tests = self._count(record)
                if ended.result == "passed" and not ended.tests["passed"]:
                    ended.result, ended.why = "failed", "no test passed: all were skipped, or there was none"
        ended.seconds = time.monotonic() - began
        if part.name == "facts":
            self.facts = _facts(output)
        return ended

    def _does_not_serve(self, backend: str | None) -> str | None:
        """The reason to leave out a backend, or None; without facts every backend is tried."""
        if backend is None or self.facts is None or backend in self.facts.get("backends", []):
            return None
        return f"{backend} does not serve the GPU"

    def _command(
        self, part: Part, command: tuple[str, ...], environment: dict[str, str], deadline: float
    ) -> tuple[int | None, str]:
        """(exit status, or None on a timeout; output). A timeout sends an interrupt before the kill."""
        path, process = self.out / "part.log", None
        with path.open("wb") as log:
            try:
                with _interrupts_deferred():
                    process = subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                left = deadline - time.monotonic()
                in_time = _ends(process, deadline - min(GRACE, left / 2))
                if not in_time:
                    process.send_signal(signal.SIGINT)
                    _ends(process, deadline)
            finally:
                if process is not None:
                    _kill(process)
        output = self._keep_log(part.name, path)
        return process.returncode if in_time else None, output

    def _keep_log(self, name: str, path: Path) -> str:
        content = path.read_bytes()
        path.unlink()
        if len(content) > LOG_HEAD + LOG_TAIL:
            left_out = f"\n... {len(content) - LOG_HEAD - LOG_TAIL} bytes left out ...\n".encode()
            content = content[:LOG_HEAD] + left_out + content[-LOG_TAIL:]
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"\n===== {name}\n".encode() + content)
        return content.decode(errors="replace")

    @staticmethod
    def _wrong(part: Part, i: int, status: int | None, output: str) -> str | None:
        """Error of the i-th command of a part; None if it ended as expected."""
        if status is None:
            return f"it took longer than {part.seconds} s and what was left of the parts before"
        if not part.finds:
            return f"status {status}" if status else None
        if status != FOUND or part.finds[i] not in output:
            return f"the planted fault was not found: {shlex.join(part.commands[i])} ended with {status}"
        return None

    def _count(self, record: Path) -> dict[str, Any]:
        """Counts of tests; the names of failed ones go to failed.txt too, which `second` reads."""
        found = read_tests(record)
        if found["names"]:
            with (self.out / "failed.txt").open("a") as file:
                file.writelines(f"{name}\n" for name in found["names"])
        return {**found, "names": found["names"][:MOST_NAMES]}

    def _write(self, todo: list[tuple[str, Part]]) -> None:
        rest = [Ended(run, part.name, part.seconds, "not reached") for run, part in todo]
        parts = [*self.ended, *rest]
        commit = self.environment.get("MUSTDROP_COMMIT")
        document = {"commit": commit, "facts": self.facts, "parts": [dataclasses.asdict(part) for part in parts]}
        (self.out / "summary.json").write_text(json.dumps(document, indent=1) + "\n")
        (self.out / "summary.txt").write_text("".join(part.line() + "\n" for part in parts))


def _ends(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """True if a process ends before a time of the monotonic clock."""
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Handles SIGINT and SIGTERM at the end of the block: an exception inside Popen would leave its process running."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, such as test workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _show_end(output: str) -> None:
    print("".join(f"    {line}\n" for line in output.splitlines()[-12:]), end="", flush=True)


def _facts(output: str) -> dict[str, Any] | None:
    """The JSON that `gpu_once.py --facts` printed; None if it failed."""
    try:
        found = json.loads(output[output.index("{\n") :])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _interrupt(*args: object) -> None:
    raise Interrupted


def environment_of(bundle: gpu_bundle.Unpacked) -> dict[str, str]:
    """Environment of every part."""
    paths = [str(ROOT), *map(str, bundle.site_packages), os.environ.get("PYTHONPATH", "")]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    commit = os.environ.get("MUSTDROP_COMMIT") or gpu_bundle.git_commit() or bundle.commit
    return {
        **os.environ,
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(toolkit)]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "MUSTDROP_EMULATION_SAMPLE": "0",  # a real device is present
        **({"MUSTDROP_COMMIT": commit} if commit else {}),
        **({"TRITON_CACHE_DIR": str(bundle.triton_cache)} if bundle.triton_cache else {}),
    }


def describe_machine(prebuilt: bool, dry: bool) -> gpu_parts.Machine:
    """Properties of this machine; in a dry run all tools are assumed to be present."""
    sanitizer = gpu_parts.find_sanitizer() or ("compute-sanitizer" if dry else None)
    return gpu_parts.Machine(
        python=os.environ.get("PYTHON") or sys.executable,
        out=Path(os.environ.get("OUT") or "bench/results/gpu"),
        cores=os.cpu_count() or 1,
        xdist=importlib.util.find_spec("xdist") is not None,
        prebuilt=prebuilt,
        failed_before=gpu_bundle.FOLDER / gpu_bundle.FAILED,
        sanitizer=sanitizer,
        filtered=dry or sanitizer is None or gpu_parts.filters_kernels(sanitizer),
        vllm=dry or importlib.util.find_spec("vllm") is not None,
    )


def show(names: list[str], machine: gpu_parts.Machine) -> None:
    """Print the parts."""
    for name in names:
        parts = gpu_parts.parts_of(name, machine)
        for part in parts:
            if part.why_not:
                print(f"{part.name:<16} at most {part.seconds:3d} s: left out: {part.why_not}")
            for command in [] if part.why_not else part.commands:
                words = [f"{key}={value}" for key, value in part.environment.items()]
                print(f"{part.name:<16} at most {part.seconds:3d} s: {shlex.join([*words, *command])}")
        print(f"{name}: at most {gpu_parts.total(parts)} s")


def main() -> int:
    """The command line."""
    runs = "\n".join(f"  {name:<9} {(run.__doc__ or '').strip()}" for name, run in gpu_parts.RUNS.items())
    parser = argparse.ArgumentParser(
        prog="bench/run_on_gpu.sh", description=f"{__doc__}\nruns:\n{runs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(gpu_parts.RUNS)} (default: first)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and its limits of time")
    wish = parser.parse_args()
    names = wish.runs or ["first"]
    if unknown := [name for name in names if name not in gpu_parts.RUNS]:
        parser.error(f"there is no run {', '.join(unknown)}; there are {', '.join(gpu_parts.RUNS)}")
    if wish.dry_run:  # the library for whatever GPU there will be
        show(names, describe_machine(gpu_bundle.is_prebuilt([]), dry=True))
        return 0
    targets = gpu_bundle.SOURCES["targets_of_gpus"]()
    if not targets:
        print("run_on_gpu: no NVIDIA GPU was found; --dry-run shows what would be done", file=sys.stderr)
        return 1
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    with tempfile.TemporaryDirectory(prefix="mustdrop-site-") as site:
        bundle = gpu_bundle.unpack(Path(site))
        machine = describe_machine(gpu_bundle.is_prebuilt(targets), dry=False)
        machine.out.mkdir(parents=True, exist_ok=True)
        for name in ("log.txt", "failed.txt"):
            (machine.out / name).unlink(missing_ok=True)
        for line in bundle.remarks:
            print(line, flush=True)
        return int(not Runner(machine, environment_of(bundle), began).run(names))


if __name__ == "__main__":
    sys.exit(main())
