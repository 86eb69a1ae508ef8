# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel in every shipped configuration for GPUs that are not here, and read what they need.

The operators run on CPU tensors of the shapes that matter, with each launch written down instead of made; what was
written down is compiled as a launch on the target would compile it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import configs, implementation, launch

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU: what Triton calls it, how many programs fill it, shared memory of one program in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    processors: int
    shared: int

    @property
    def triton_target(self) -> GPUTarget:
        """As Triton's compiler takes it."""
        return GPUTarget(self.backend, self.arch, self.warp_size)


TARGETS = {
    "sm80": Target("cuda", 80, 32, 108, 163 * KIB),
    "sm90": Target("cuda", 90, 32, 132, 227 * KIB),
    "sm100": Target("cuda", 100, 32, 148, 227 * KIB),
    "sm120": Target("cuda", 120, 32, 170, 99 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 304, 64 * KIB),
    "gfx950": Target("hip", "gfx950", 64, 256, 160 * KIB),
    "gfx1100": Target("hip", "gfx1100", 32, 96, 64 * KIB),
}


@dataclass(frozen=True)
class Unit:
    """One kernel as one launch compiles it."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[int, ...], ...]  # arguments that 16 divides
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """For messages: kernel, element types, tile sizes."""
        types = [t for _, t in self.signature if isinstance(t, str) and t.startswith("*")]
        tiles = [f"{n}={v}" for (i, v) in self.constants if (n := self.kernel.arg_names[i[0]]).isupper()]
        return f"{self.kernel.__name__}({', '.join([*types[:2], *tiles])}, warps={self.num_warps})"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: bytes of shared memory, registers of a thread, bytes or registers spilled."""

    shared: int
    registers: int
    spilled: int


_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def _describe(value: Any, path: tuple[int, ...], param: Any, constants: dict[Any, Any], aligned: list[Any]) -> Any:
    """The type of an argument, as Triton's own argument analysis finds it."""
    if isinstance(value, tuple):
        return tuple(_describe(v, (*path, i), param, constants, aligned) for i, v in enumerate(value))
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            aligned.append(path)
        return f"*{_TYPES[value.dtype]}"
    special = not param.do_not_specialize
    if param.is_constexpr or value is None or (value == 1 and isinstance(value, int) and special):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0 and special:
        aligned.append(path)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _unit(made: launch.Launch, pointers: tuple[Any, ...]) -> Unit:
    constants: dict[Any, Any] = {}
    aligned: list[Any] = []
    types = {}
    arguments = (*pointers, *made.scalars)
    for i, (param, value) in enumerate(zip(made.kernel.params, arguments, strict=True)):
        types[param.name] = _describe(value, (i,), param, constants, aligned)
    options = made.options
    return Unit(
        made.kernel, tuple(types.items()), tuple(constants.items()), tuple(aligned),
        options["num_warps"], options["num_stages"],
    )  # fmt: skip


@contextlib.contextmanager
def recording(target: str) -> Iterator[dict[Unit, None]]:
    """Within the context this backend launches nothing; what it would launch on the target is collected."""
    units: dict[Unit, None] = {}

    def record(made: launch.Launch, *pointers: Any) -> None:
        if not made.empty:
            units[_unit(made, pointers)] = None

    launch.Plans.forget_all()
    with (
        mock.patch.object(launch.Launch, "__call__", record),
        mock.patch.object(configs, "architecture", return_value=target),
        mock.patch.object(configs, "processors", return_value=TARGETS[target].processors),
        mock.patch.object(configs, "TUNED", {}),
    ):
        try:
            yield units
        finally:
            launch.Plans.forget_all()


def compile_unit(unit: Unit, target: str) -> Resources:
    """Compile for a target; what the result needs."""
    source = ASTSource(
        unit.kernel,
        dict(unit.signature),
        constexprs=dict(unit.constants),
        attrs={path: [["tt.divisibility", 16]] for path in unit.attributes},
    )
    options = launch.options(unit.num_warps, unit.num_stages)
    compiled = triton.compile(source, target=TARGETS[target].triton_target, options=options)
    if TARGETS[target].backend == "cuda":
        registers, spilled = _cubin_usage(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", code)[-1])
        spilled = int(re.findall(r"\.vgpr_spill_count:\s*(\d+)", code)[-1])
    return Resources(int(compiled.metadata.shared), registers, spilled)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def problem(resources: Resources, target: str) -> str | None:
    """Why a kernel that needs this is not fit to ship, None where it is."""
    limit = TARGETS[target].shared
    if resources.shared > limit:
        return f"needs {resources.shared} bytes of shared memory, {target} has {limit}"
    if resources.spilled:
        return f"spills ({resources.spilled}) at {resources.registers} registers a thread"
    return None


def _empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _selection(batch: int, length: int, **options: Any) -> None:
    scores, types = _empty(batch, length, dtype=torch.float32), _empty(batch, length, dtype=torch.uint8)
    implementation("select_dual")(scores, scores, types, 0.01, 0.01, **options)
    implementation("select_topk")(scores, types, 64, **options)


def _compaction(layers: int, dim: int, dtype: torch.dtype, **options: Any) -> None:
    caches = [_empty(1, 4, 32, dim, dtype=dtype) for _ in range(2 * layers)]
    keep, counts = [_empty(1, 16, dtype=torch.int64)], [_empty(1, dtype=torch.int32)]
    implementation("compact_kv_")(caches[:layers], caches[layers:], keep, counts, **options)


def _paged_compaction(slots: int, **options: Any) -> None:
    caches = [_empty(4, slots, 4, 128) for _ in range(4)]
    table, ends = _empty(1, 4, dtype=torch.int32), _empty(1, dtype=torch.int32)
    keep, counts = [_empty(1, 16, dtype=torch.int64)], [ends]
    implementation("compact_paged_kv_")(caches[:2], caches[2:], table, keep, counts, seq_lens=ends, **options)


def _scores(q_heads: int, k_heads: int, rows: int, length: int, dim: int, dtype: torch.dtype, with_lse: bool) -> None:
    q, k = _empty(1, q_heads, rows, dim, dtype=dtype), _empty(1, k_heads, length, dim, dtype=dtype)
    lse = _empty(1, q_heads, rows, dtype=torch.float32) if with_lse else None
    implementation("text_vision_scores")(q, k, _empty(1, length, dtype=torch.uint8), dim**-0.5, lse=lse)


def _packed_scores() -> None:
    q, k, types = _empty(100, 28, 128), _empty(700, 4, 128), _empty(700, dtype=torch.uint8)
    ends = _empty(2, dtype=torch.int32)
    implementation("text_vision_scores_varlen")(q, k, types, ends, ends, 100, 700, 0.1)
    cache, table = _empty(50, 16, 4, 128), _empty(1, 44, dtype=torch.int32)
    implementation("text_vision_scores_paged")(q, cache, table, ends[:1], types[None], ends, 100, 0.1)


def _map() -> None:
    q, k = _empty(1, 32, 64, 128), _empty(1, 32, 671, 128)
    implementation("text_vision_attention")(q, k, _empty(1, 671, dtype=torch.uint8), 0.1, 64)


def calls() -> list[Callable[[], Any]]:
    """Operator calls that together launch every kernel in every shipped configuration."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    keep, counts = _empty(1, 200, dtype=torch.int64), _empty(1, dtype=torch.int32)

    def gather(*shape: int, dtype: torch.dtype = half) -> Callable[[], Any]:
        return lambda: implementation("gather_tokens")(_empty(*shape, dtype=dtype), keep, counts)

    def merge(dtype: torch.dtype, grid: list[int], window: list[int], **options: Any) -> Callable[[], Any]:
        length = 1
        for extent in grid:
            length *= extent
        x = _empty(2, 1 + length, 1024, dtype=dtype)
        return lambda: implementation("spatial_merge")(x, grid, window, **options)

    def cls(dtype: torch.dtype) -> Callable[[], Any]:
        q, k = _empty(1, 16, 64, dtype=dtype), _empty(1, 16, 577, 64, dtype=dtype)
        return lambda: implementation("cls_attention")(q, k, 0.125)

    protected = torch.empty(1, 671, dtype=torch.bool)
    return [
        gather(1, 671, 4096), gather(1, 671, dtype=torch.int64), gather(1, 671, 32, dtype=single),
        *(lambda n=n: _selection(1, n) for n in (200, 671, 2980, 18000)),
        lambda: _selection(1, 671, protected=protected, drop_multiple=16),
        lambda: _compaction(13, 128, brain), lambda: _compaction(32, 128, brain, align_end=True),
        lambda: _compaction(2, 64, single), lambda: _compaction(2, 1, single),
        lambda: _paged_compaction(16), lambda: _paged_compaction(1, align_end=True),
        *(cls(d) for d in (half, brain, single)),
        merge(half, [24, 24], [3, 3]), merge(brain, [24, 24], [3, 3], uniform=True),
        merge(single, [40, 40], [2, 2], budget=64), merge(half, [8, 24, 24], [1, 3, 3], merged_first=True),
        merge(half, [14, 14], [2, 2]),
        lambda: _scores(32, 32, 60, 671, 128, half, False), lambda: _scores(32, 32, 671, 671, 128, brain, True),
        lambda: _scores(32, 32, 60, 671, 128, single, False), lambda: _scores(32, 32, 60, 671, 256, half, True),
        lambda: _scores(32, 32, 3000, 3000, 80, half, False), lambda: _scores(28, 4, 18000, 18000, 128, brain, False),
        _packed_scores, _map,
    ]  # fmt: skip


def units(target: str) -> list[Unit]:
    """Everything that is shipped for a target."""
    with recording(target) as found:
        for call in calls():
            call()
    return list(found)
