# SPDX-License-Identifier: Apache-2.0
"""Fill a Triton cache for a GPU that is not present, so that a short run on such a GPU compiles nothing.

    python tools/precompile_triton.py --target sm90 --out FOLDER

Compiles the launches of the operators' tests (the cases of this backend that are not slow) and of the benchmark's
shapes, recorded on CPU tensors. Writes triton-cache-TARGET.tar.xz to FOLDER and, beside it, a JSON file with the
versions that the cache depends on. Must be run with the Python and the Triton of the GPU machine, where
`tools/triton_cache.py` unpacks it; Triton finds the entries only in a folder of the same path (--cache).

Kernels that the folder of --cache already contains are not compiled again, so an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_cache

from mustdrop_kernels import backends
from mustdrop_kernels.backends import triton as triton_backend
from mustdrop_kernels.bench.shapes import parse_shapes
from mustdrop_kernels.files import write_text, written_whole

if TYPE_CHECKING:
    from mustdrop_kernels.backends.triton.crosscompile import Unit

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDED = "triton-recorded"
DTYPES = ("bfloat16", "float16", "float32")
PRINT_EVERY = 10.0  # seconds between progress lines without a bar


@dataclass(frozen=True)
class Source:
    """Source of launches to record for a target: one test file or one benchmark case."""

    target: str
    processors: int | None
    tests: str = ""
    shape: str = ""
    dtype: str = ""


def recorded_backend() -> backends.Backend:
    """The Triton backend's host code with recorded launches; returns results of the CPU, so that tests proceed."""
    cpu = backends.get("cpu")

    def implementation(op: str) -> Callable[..., object]:
        launching, computing = backends.get("triton").implementation(op), cpu.implementation(op)

        def call(*args: object, **kwargs: object) -> object:
            launching(*args, **kwargs)
            return computing(*args, **kwargs)

        return call

    return backends.Backend(
        RECORDED, implementation, lambda op, device: None if device == "cpu" else "it serves CPU tensors"
    )


def run_tests(tests: str) -> list[str]:
    """Run tests on the recorded backend; returns problems."""
    import pytest

    backends.register_backend(recorded_backend(), replace=True)
    os.environ.update(MUSTDROP_TEST_BACKENDS=RECORDED, MUSTDROP_EMULATION_SAMPLE="0")
    quiet = ["-q", "-rN", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={REPOSITORY}"]
    chosen = ["-k", RECORDED, "-m", "not slow", str(REPOSITORY / tests)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = pytest.main([*quiet, "-c", str(REPOSITORY / "pyproject.toml"), *chosen])
    if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return []
    return [f"{tests}: {printed.getvalue().strip()[-300:]} (what the failed tests launch is recorded in part)"]


def run_shape(shape: str, dtype: str) -> list[str]:
    """Call every operator with the benchmark's inputs, in every variant; returns problems."""
    import torch

    from mustdrop_kernels.bench.cases import CASES, FLOAT32_ONLY, Case

    (size,) = parse_shapes(shape)
    for op, spec in CASES.items():
        taken = torch.float32 if op in FLOAT32_ONLY else getattr(torch, dtype)
        inputs = Case(op, size, taken, torch.device("cpu")).inputs()
        for more in ({}, *(variant(inputs) for variant in spec.variants.values())):
            backends.get("triton").implementation(op)(*inputs.args, **{**inputs.kwargs, **more})
    return []


def record(source: Source) -> tuple[list[Unit], list[str]]:
    """Launches of a source on its target, and problems."""
    from mustdrop_kernels.backends.triton import crosscompile

    with crosscompile.recording(source.target, source.processors) as units:
        complaints = run_tests(source.tests) if source.tests else run_shape(source.shape, source.dtype)
    return list(units), complaints


def compile_one(job: tuple[str, Unit]) -> tuple[str, bool, str | None]:
    """Compile one launch. Returns its cache folder, whether it was cached, and the error if any."""
    from mustdrop_kernels.backends.triton import precompile

    target, unit = job
    made: list[tuple[str, bool]] = []
    with precompile.without_device(target, lambda folder, hit: made.append((folder.name, hit))):
        try:
            precompile.precompile(unit)
        except Exception as error:  # the compiler raises many types; go on with the next kernel
            return "", False, f"{unit.name}: {type(error).__name__}: {error}"
    return (*made[0], None) if made else ("", True, None)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress of ``total`` steps, advanced by calling the result: a bar on a terminal, else occasional lines."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
        return
    done, printed = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, printed
        done += 1
        if done == total or time.monotonic() - printed > PRINT_EVERY:
            printed = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    yield advance


@contextlib.contextmanager
def mapping(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """``map`` in several processes, or in this one. An interrupt cancels jobs that have not started."""
    if processes <= 1:
        yield map
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def results(what: str, function: Callable[[Any], Any], jobs: Sequence[Any], processes: int) -> list[Any]:
    """Results of all jobs, in order."""
    found = []
    with mapping(min(processes, len(jobs))) as mapped, progress(what, len(jobs)) as advance:
        for result in mapped(function, jobs):
            found.append(result)
            advance()
    return found


def wanted(options: argparse.Namespace) -> list[Source]:
    """Requested sources: one per test file, one per shape and dtype."""
    where = (options.target, options.multiprocessors)
    labels = [shape.label for shape in parse_shapes(options.shapes)]
    tests = [Source(*where, tests=file) for path in options.tests for file in files_of(path)]
    return tests + [Source(*where, "", *pair) for pair in itertools.product(labels, options.dtypes.split(","))]


def files_of(path: str) -> list[str]:
    """Test files of a folder; a file or a test id is returned unchanged."""
    if not (REPOSITORY / path).is_dir():
        return [path]
    return [str(file.relative_to(REPOSITORY)) for file in sorted((REPOSITORY / path).glob("test_*.py"))]


def recorded(options: argparse.Namespace) -> tuple[list[Unit], list[str]]:
    """The distinct launches of all sources, and problems."""
    found = results("recorded", record, wanted(options), options.jobs)
    units = dict.fromkeys(unit for units, _ in found for unit in units)
    complaints = [complaint for _, some in found for complaint in some]
    return list(units), complaints if units else [*complaints, "nothing was launched"]


def write(options: argparse.Namespace, entries: Sequence[str]) -> Path:
    """Write the archive and its description."""
    from mustdrop_kernels.backends.triton import crosscompile

    archive = options.out / f"triton-cache-{options.target}.tar.xz"
    target = crosscompile.TARGETS[options.target]
    with written_whole(archive) as scratch:
        triton_cache.pack(options.cache, entries, scratch)
    document = {
        "format": triton_cache.FORMAT, "archive": archive.name, "bytes": archive.stat().st_size,
        "kernels": len(entries), "cache": str(options.cache), "target": options.target, "arch": target.arch,
        "multiprocessors": options.multiprocessors or target.processors,
        "sources": triton_cache.sources(), **triton_cache.installed(int(target.arch)),
    }  # fmt: skip
    write_text(archive.with_name(f"triton-cache-{options.target}.json"), json.dumps(document, indent=1))
    return archive


def command_line() -> argparse.Namespace:
    """The command line; errors in it or in the installation end the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm90", help="the GPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder that the archive goes to")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/mustdrop-triton-cache"), help="TRITON_CACHE_DIR there")
    parser.add_argument("--multiprocessors", type=int, help="of that GPU, where it is not the full chip")
    parser.add_argument("--tests", nargs="*", default=["tests/ops"], help="files or folders (default: %(default)s)")
    parser.add_argument("--shapes", default="llava-1.5,llava-next", help="of mustdrop bench ops (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16", help="of the shapes (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say how many kernels there are, compile none")
    options = parser.parse_args()
    if triton_backend.version() is None:
        parser.error("triton is not installed")
    if triton_backend.interpreted():
        parser.error("TRITON_INTERPRET is set: kernels are not compiled then")
    check(options, parser.error)
    return options


def check(options: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Check the values of options."""
    from mustdrop_kernels.backends.triton import crosscompile

    known = [name for name, target in crosscompile.TARGETS.items() if target.backend == "cuda"]
    if options.target not in known:
        error(f"there is no target {options.target!r}; there are {', '.join(known)}")
    if not (options.out or options.dry_run):
        error("--out is missing")
    if unknown := sorted(set(options.dtypes.split(",")) - set(DTYPES)):
        error(f"unknown dtypes {unknown}; there are {', '.join(DTYPES)}")
    if absent := [path for path in options.tests if not (REPOSITORY / path.split("::")[0]).exists()]:
        error(f"no such tests: {', '.join(absent)}")
    try:
        parse_shapes(options.shapes)
    except ValueError as wrong:
        error(str(wrong))


def compiled(options: argparse.Namespace, units: Sequence[Unit]) -> tuple[list[str], list[str]]:
    """Cache folders of all launches, and problems."""
    begin = time.monotonic()
    made = results("compiled", compile_one, [(options.target, unit) for unit in units], options.jobs)
    entries = sorted({folder for folder, *_ in made if folder})
    found = sum(hit for _, hit, _ in made)
    print(f"{len(entries)} entries in {time.monotonic() - begin:.0f} s; {found} were there already")
    return entries, [problem for *_, problem in made if problem]


def main() -> int:
    """Record, compile, write; problems of single kernels do not prevent the archive."""
    options = command_line()
    options.cache = options.cache.absolute()
    os.environ["TRITON_CACHE_DIR"] = str(options.cache)
    units, complaints = recorded(options)
    numbers = collections.Counter(unit.kernel.__name__ for unit in units)
    print(f"{len(units)} kernels: " + ", ".join(f"{name} {number}" for name, number in numbers.most_common()))
    if units and not options.dry_run:
        entries, more = compiled(options, units)
        complaints += more
        archive = write(options, entries)
        print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")
    for complaint in complaints:
        print(f"WRONG: {complaint}", file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the next run finds what is compiled by now")
