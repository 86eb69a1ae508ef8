# SPDX-License-Identifier: Apache-2.0
"""Occupancy: resident blocks per multiprocessor, and waves of a grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .kernel import Kernel, generic
from .launches import CAPABILITY, GPU, GPUS, Launch

WARP = 32
REGISTER_UNIT = 256  # allocation unit of registers, per warp
SHARED_UNIT = 128  # allocation unit of shared memory in bytes, per block
SHARED_RESERVED = 1024  # bytes per block reserved by the system


@dataclass(frozen=True)
class Multiprocessor:
    """Resources shared by the resident blocks."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    quarters: int = 4  # partitions with a scheduler and a fourth of the registers each; a warp stays in one


# By compute capability times ten: CUDA programming guide, technical specifications of the compute capabilities.
MULTIPROCESSORS = {
    "80": Multiprocessor(warps=64, blocks=32, shared_bytes=164 << 10),
    "90": Multiprocessor(warps=64, blocks=32, shared_bytes=228 << 10),
    "100": Multiprocessor(warps=64, blocks=32, shared_bytes=228 << 10),
    "120": Multiprocessor(warps=48, blocks=24, shared_bytes=100 << 10),
}


def blocks_per_multiprocessor(capability: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Number of resident blocks per multiprocessor.

    Args:
        capability: a key of ``MULTIPROCESSORS``.
        registers: registers per thread.
        shared_bytes: shared memory per block, static and dynamic.
        threads: threads per block.
    """
    m = MULTIPROCESSORS[capability]
    warps = math.ceil(threads / WARP)
    of_a_warp = math.ceil(registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    resident_warps = m.registers // m.quarters // of_a_warp * m.quarters
    shared = math.ceil(shared_bytes / SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    return min(m.blocks, m.warps // warps, resident_warps // warps, m.shared_bytes // shared)


@dataclass(frozen=True)
class Occupancy:
    """A launch and its occupancy."""

    launch: Launch
    registers: int
    shared_bytes: int  # static and dynamic
    resident: int  # blocks of a multiprocessor
    waves: float  # blocks of the grid / resident blocks; 0: the launch does not fit

    @property
    def text(self) -> str:
        """Waves, and rounded up: "1.19 (2)"."""
        return f"{self.waves:.2f} ({math.ceil(self.waves)})" if self.waves else "does not fit"


def occupancies(launches: Iterable[Launch], kernels: Sequence[Kernel]) -> list[Occupancy]:
    """Occupancy of each distinct launch of kernels compiled for the device's architecture."""
    own = {kernel.name: kernel for kernel in kernels if generic(kernel.target) == CAPABILITY}
    found: dict[tuple[object, ...], Occupancy] = {}
    for launch in launches:
        kernel = own.get(launch.kernel)
        key = (launch.shape, launch.kernel, launch.grid, launch.threads, launch.shared_bytes, launch.cluster)
        if kernel is None or key in found:  # the fused operators share kernels with others
            continue
        shared = kernel.shared_bytes + launch.shared_bytes
        resident = blocks_per_multiprocessor(CAPABILITY, kernel.registers, shared, launch.threads)
        places = GPUS[GPU].slots(resident, launch.cluster)
        waves = launch.grid / places if places else 0.0
        found[key] = Occupancy(launch, kernel.registers, shared, resident, waves)
    return list(found.values())


def occupancy_table(rows: Sequence[Occupancy]) -> str:
    """Table with a line per launch."""
    ops = max((len(row.launch.op) for row in rows), default=2)
    names = max((len(row.launch.kernel) for row in rows), default=6)
    head = f"{'shape':<14}{'operator':<{ops + 1}}{'kernel':<{names}}"
    lines = [f"{head} registers  shared threads cluster blocks  per SM  waves on {GPUS[GPU].multiprocessors} SMs"]
    for row in rows:
        launch = row.launch
        lines.append(
            f"{launch.shape:<14}{launch.op:<{ops + 1}}{launch.kernel:<{names}}{row.registers:>10}{row.shared_bytes:>8}"
            f"{launch.threads:>8}{launch.cluster:>8}{launch.grid:>7}{row.resident:>8}  {row.text}"
        )
    return "\n".join(lines)
