# SPDX-License-Identifier: Apache-2.0
"""Runner of ``mustdrop bench ops``: plans the cases, checks the results, times them, makes the document."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import backends
from ..errors import first_line
from . import check, machine, memory, timing
from .baselines import Baseline, baselines_of
from .capture import PoisonedError
from .cases import FLOAT32_ONLY, Case, Inputs, Raw
from .documents import Document, Keep, Tell
from .shapes import Shape

FORMAT = "mustdrop-bench/2"
FORMER_FORMAT = "mustdrop-bench/1"  # "contender" for "candidate", "peer" for "baseline"
# Copies of the inputs: multiple of the cache that their reads fill; maximum number; maximum share of free memory.
PAST_CACHE, MOST_COPIES, MEMORY_SHARE = 3, 512, 0.4
QUICK_COPIES = 32  # maximum of a quick run on a CPU, whose cache may have hundreds of megabytes
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``mustdrop bench ops``."""

    ops: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    backends: tuple[str, ...]
    baselines: tuple[str, ...] | None = None  # names; None: all, without those that compile if `compiled` is false
    quick: bool = False
    compiled: bool = True  # includes baselines of torch.compile, unless quick
    seconds: float | None = None  # for each candidate of a case; None: those of the effort
    hot: bool = False  # the same inputs in each call, which stay in the cache if they fit

    @property
    def effort(self) -> timing.Effort:
        """Effort of a candidate."""
        usual = timing.QUICK if self.quick else timing.FULL
        return usual if self.seconds is None else dataclasses.replace(usual, seconds=self.seconds)


@dataclasses.dataclass
class Candidate:
    """One way to compute a case."""

    name: str
    op_in_place: bool
    kind: str  # "backend", "baseline", "context" (a larger computation, for scale)
    what: str
    call: Callable[[Inputs], Raw] | None = None
    baseline: Baseline | None = None
    why_not: str | None = None
    wrong: str | None = None
    compared: list[str] = dataclasses.field(default_factory=list)
    peak_extra: int | None = None
    detail: str | None = None

    @property
    def in_place(self) -> bool:
        """True if a call changes its inputs."""
        return self.baseline.in_place if self.baseline is not None else self.op_in_place

    def canonical(self, case: Case, raw: Raw, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Its result in comparable form."""
        if self.baseline is None:
            return case.spec.canonical(raw, inputs)
        if self.baseline.canonical is None:
            return {}
        return self.baseline.canonical(raw, inputs)

    def drop(self, error: Exception) -> None:
        """Record an error; the candidate is not timed."""
        text = str(error).strip().splitlines()
        self.why_not = f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]
        self.call = None


def _nothing(inputs: Inputs) -> dict[str, Any]:
    return {}


def backend_call(
    op: str, device_type: str, name: str, more: Callable[[Inputs], dict[str, Any]] = _nothing
) -> timing.Call:
    """The operator as a function of its inputs; torch.ops for the backend that serves it there."""
    function = backends.explicit(op, device_type, name) or getattr(torch.ops.mustdrop, op)

    def call(inputs: Inputs) -> Raw:
        return function(*inputs.args, **inputs.kwargs, **more(inputs))

    return call


def default_backends(device_type: str) -> tuple[str, ...]:
    """The backends that serve the device; the reference if there are none."""
    found = (backends.serving(op, device_type) for op in backends.OPS)
    return tuple(dict.fromkeys(name for name in found if name)) or ("reference",)


def plan(options: Options) -> Iterator[Case]:
    """All cases, those of a shape together."""
    for shape in options.shapes:
        for dtype in options.dtypes:
            for op in options.ops:
                if op in FLOAT32_ONLY and dtype != torch.float32 and torch.float32 in options.dtypes:
                    continue  # a repetition
                yield Case(op, shape, torch.float32 if op in FLOAT32_ONLY else dtype, options.device)


def candidates(case: Case, options: Options, build: bool = True) -> list[Candidate]:
    """Our backends first, then the baselines, with the reason where one does not take part."""
    found = []
    kind = case.device.type
    for name in options.backends:
        why_not = backends.get(name).why_not(case.op, kind)
        for variant, more in {"": _nothing, **case.spec.variants}.items():
            label = f"{name}, {variant}" if variant else name
            ours = Candidate(label, case.spec.in_place, "backend", backends.get(name).description, why_not=why_not)
            if why_not is None and build:
                ours.call = backend_call(case.op, kind, name, more)
            found.append(ours)
    for baseline in baselines_of(case.op):
        if options.baselines is not None and baseline.name not in options.baselines:
            continue
        if options.baselines is None and baseline.compiles and (options.quick or not options.compiled):
            continue
        theirs = Candidate(
            baseline.name,
            case.spec.in_place,
            "context" if baseline.canonical is None else "baseline",
            baseline.what,
            baseline=baseline,
        )
        theirs.why_not = baseline.why_not(case) or _too_large(case, baseline.scratch(case))
        found.append(theirs)
    return found


def _too_large(case: Case, extra: int) -> str | None:
    needed, left = 2 * case.input_bytes + extra, memory.available(case.device)
    if needed > 0.8 * left:
        return f"it needs {needed / 1e9:.1f} GB, {left / 1e9:.1f} GB are left"
    return None


@dataclasses.dataclass
class _Measured:
    """A case with its candidates and times."""

    case: Case
    found: list[Candidate]
    times: dict[str, timing.Timing]
    copies: int


def run(
    options: Options,
    command: Sequence[str] = (),
    tell: Tell = lambda what, share: None,
    keep: Keep = lambda document: None,
) -> Document:
    """Time every case; after an interrupt (Ctrl-C) the document holds the finished ones.

    Args:
        options: what to time.
        command: the command line, for the record.
        tell: takes the current step and the share of all that is done.
        keep: takes the document after each case.
    """
    cases = list(plan(options))
    about = machine.describe(options.device, torch.get_num_threads())
    tell("measuring the machine", 0.0)
    dtypes = sorted({case.dtype for case in cases}, key=str)
    rates = machine.measure(options.device, dtypes, options.quick)
    measured: list[_Measured] = []

    def document(stopped: str | None = None) -> Document:
        return {
            "format": FORMAT,
            "command": list(command),
            "machine": {**about, **rates, "load_after": machine.load()},
            "quick": options.quick,
            "hot": options.hot,
            "cases": {"planned": len(cases), "measured": len(measured)},
            "stopped": stopped,
            "rows": [row for one in measured for row in _rows(one, rates)],
        }

    try:
        for i, case in enumerate(cases):
            share = i / len(cases)
            measured.append(_measured(case, options, lambda what, done, at=share: tell(what, at + done)))  # type: ignore[misc]
            keep(document())
    except KeyboardInterrupt:
        return document("interrupted")
    except PoisonedError as error:
        return document(str(error))
    _better_of_two(rates, options, dtypes)
    return document()


def _better_of_two(rates: dict[str, Any], options: Options, dtypes: list[torch.dtype]) -> None:
    """Measure the machine again and keep the better rates: other processes may have used it."""
    try:
        again = machine.measure(options.device, dtypes, options.quick)
    except RuntimeError:
        return  # such as no free memory; the first rates hold
    rates["copy_bandwidth"] = max(rates["copy_bandwidth"], again["copy_bandwidth"])
    rates["matrix_rate"] = {name: max(rate, again["matrix_rate"][name]) for name, rate in rates["matrix_rate"].items()}


def _measured(case: Case, options: Options, tell: Tell) -> _Measured:
    """Measure a case; one that fails has a row with the reason."""
    try:
        return _measure(case, options, tell)
    except (RuntimeError, MemoryError) as error:
        failed = Candidate("all", case.spec.in_place, "backend", "", why_not=first_line(error))
        return _Measured(case, [failed], {}, 0)


@torch.inference_mode()
def _measure(case: Case, options: Options, tell: Tell) -> _Measured:
    found = candidates(case, options)
    reason = _too_large(case, 0)
    if reason is not None:
        for one in found:
            one.call, one.why_not = None, one.why_not or reason
        return _Measured(case, found, {}, 0)
    tell(f"{case.label}: inputs", 0.0)
    inputs = case.inputs()
    _check_all(case, found, inputs, lambda name: tell(f"{case.label}: checking {name}", 0.0))
    copies = copies_of(case, inputs, options.hot, options.quick)
    calls = {one.name: one.call for one in found if one.call is not None}
    compiled = {one.name for one in found if one.baseline is not None and one.baseline.compiles}
    times = timing.interleaved(calls, copies, case.device, options.effort, compiled=compiled)
    count = len(copies)
    del copies, inputs
    gc.collect()
    return _Measured(case, found, times, count)


def _check_all(case: Case, found: list[Candidate], inputs: Inputs, tell: Callable[[str], None]) -> None:
    """Call each candidate once, compare its result with ours, and measure its memory."""
    ours: dict[str, torch.Tensor] | None = None
    for one in found:
        if one.why_not is not None:
            continue
        tell(one.name)
        fresh = inputs.clone() if one.in_place else inputs
        try:
            if one.call is None and one.baseline is not None:
                one.call = one.baseline.build(case)
                one.detail = one.baseline.detail(fresh) if one.baseline.detail else None
            raw, seconds = _called(one, fresh, case.device)
            result = one.canonical(case, raw, fresh)
        except Exception as error:
            one.drop(error)
            continue
        if ours is None:
            ours = {name: tensor.clone() for name, tensor in result.items()}  # a view of memory may change next
        elif one.kind != "context":
            one.wrong = check.difference(case, ours, result)
            one.compared = [name for name in result if name in ours]
            if one.wrong is not None:
                one.call = None
        del raw, result
        if one.call is not None and seconds < 5:
            one.peak_extra = memory.peak_extra(lambda call=one.call, given=fresh: call(given), case.device)  # type: ignore[misc]
        del fresh


def _called(one: Candidate, inputs: Inputs, device: torch.device) -> tuple[Raw, float]:
    """Result of a call and its seconds."""
    assert one.call is not None
    if one.baseline is not None and one.baseline.compiles and not one.in_place:
        one.call(inputs)  # compiles
    start = time.perf_counter()
    raw = one.call(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return raw, time.perf_counter() - start


def count_of_copies(case: Case, hot: bool = False, quick: bool = False) -> int:
    """Number of copies of the inputs after which what a call reads has left the cache, within the memory there is."""
    if hot:
        return 1
    most = QUICK_COPIES if quick and case.device.type == "cpu" else MOST_COPIES
    past = -(-PAST_CACHE * machine.last_level_cache(case.device) // max(case.work.read, 1))
    room = int(MEMORY_SHARE * memory.available(case.device)) // max(case.input_bytes, 1)
    return max(1, min(past, room, most))


def copies_of(case: Case, inputs: Inputs, hot: bool = False, quick: bool = False) -> list[Inputs]:
    """The inputs and copies of them, ``count_of_copies`` in all."""
    return [inputs] + [inputs.clone() for _ in range(count_of_copies(case, hot, quick) - 1)]


def _rows(measured: _Measured, rates: dict[str, Any]) -> Iterator[Row]:
    case, times = measured.case, measured.times
    work = case.work
    base = next((times[one.name] for one in measured.found if one.kind == "backend" and one.name in times), None)
    for one in measured.found:
        row: Row = {
            "op": case.op,
            "shape": case.shape.label,
            "batch": case.shape.batch,
            "tokens": case.shape.length,
            "dtype": case.dtype_name,
            "device": case.device.type,
            "candidate": one.name,
            "kind": one.kind,
            "what": one.what,
            "detail": one.detail,
            "status": "wrong" if one.wrong else "timed" if one.name in times else "skipped",
            "reason": one.wrong or one.why_not,
            "bytes": work.bytes,
            "flops": work.flops,
        }
        if one.name in times:
            row.update(_figures(times[one.name], base, work.bytes, work.flops, case, rates))
            row.update(peak_extra_bytes=one.peak_extra, compared=one.compared, copies_of_inputs=measured.copies)
            row.update(in_cache=measured.copies * work.read < machine.last_level_cache(case.device))
        yield row


def _figures(
    measured: timing.Timing, base: timing.Timing | None, moved: int, flops: int, case: Case, rates: dict[str, Any]
) -> Row:
    first, median, third = measured.quartiles
    figures: Row = {
        "median_us": 1e6 * median,
        "q1_us": 1e6 * first,
        "q3_us": 1e6 * third,
        "min_us": 1e6 * min(measured.samples.values()),
        "rounds": len(measured.samples),
        "calls_a_round": measured.calls,
        "how": measured.how,
        "why_eager": measured.why_eager,
        "host_us": None if measured.host is None else 1e6 * measured.host,
        "copy_fraction": moved / median / rates["copy_bandwidth"],
        "matrix_fraction": flops / median / rates["matrix_rate"][case.dtype_name],
    }
    if base is not None:
        low, middle, high = measured.ratio_to(base)
        figures["ratio"] = {"q1": low, "median": middle, "q3": high}
    return figures
