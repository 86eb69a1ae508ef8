# SPDX-License-Identifier: Apache-2.0
"""Occupancy: blocks of a launch that a multiprocessor runs at the same time, and waves of a grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .kernel import Kernel, generic
from .launches import CAPABILITY, Launch

WARP = 32
REGISTER_UNIT = 256  # registers are given to a warp in multiples of this
SHARED_UNIT = 128  # bytes, to a block
SHARED_RESERVED = 1024  # bytes of each block that the system keeps


@dataclass(frozen=True)
class Multiprocessor:
    """Resources that the resident blocks share."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    quarters: int = 4  # with a scheduler and a fourth of the registers each; a warp stays in one


# By compute capability times ten: CUDA programming guide, technical specifications of the compute capabilities.
MULTIPROCESSORS = {
    "80": Multiprocessor(warps=64, blocks=32, shared_bytes=164 << 10),
    "90": Multiprocessor(warps=64, blocks=32, shared_bytes=228 << 10),
    "100": Multiprocessor(warps=64, blocks=32, shared_bytes=228 << 10),
    "120": Multiprocessor(warps=48, blocks=24, shared_bytes=100 << 10),
}

# A cluster stays inside a GPC. How many multiprocessors each GPC of an H200 has differs from device to device; this is
# the usual case, in which clusters of eight with a multiprocessor for each block leave four of 132 idle.
# cudaOccupancyMaxActiveClusters returns that of a device.
GPCS = (16,) * 6 + (18,) * 2


def blocks_per_multiprocessor(capability: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Resident blocks.

    Args:
        capability: a key of ``MULTIPROCESSORS``.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic.
        threads: of a block.
    """
    m = MULTIPROCESSORS[capability]
    warps = math.ceil(threads / WARP)
    of_a_warp = math.ceil(registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    resident_warps = m.registers // m.quarters // of_a_warp * m.quarters
    shared = math.ceil(shared_bytes / SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    return min(m.blocks, m.warps // warps, resident_warps // warps, m.shared_bytes // shared)


def slots(resident: int, cluster: int) -> int:
    """Blocks that the whole device runs at the same time.

    Args:
        resident: blocks of a multiprocessor.
        cluster: blocks of a cluster.
    """
    if cluster == 1:
        return resident * sum(GPCS)
    return sum(resident * size // cluster for size in GPCS) * cluster


@dataclass(frozen=True)
class Occupancy:
    """A launch, and how it fills the device."""

    launch: Launch
    registers: int
    shared_bytes: int  # static and dynamic
    resident: int  # blocks of a multiprocessor
    waves: float  # blocks of the grid over those that run at the same time; 0: the launch does not fit

    @property
    def text(self) -> str:
        """Waves as a number, and those that it takes: "1.19 (2)"."""
        return f"{self.waves:.2f} ({math.ceil(self.waves)})" if self.waves else "does not fit"


def occupancies(launches: Iterable[Launch], kernels: Sequence[Kernel]) -> list[Occupancy]:
    """Each different launch of kernels that were compiled for the device's own architecture."""
    own = {kernel.name: kernel for kernel in kernels if generic(kernel.target) == CAPABILITY}
    found: dict[tuple[object, ...], Occupancy] = {}
    for launch in launches:
        kernel = own.get(launch.kernel)
        key = (launch.shape, launch.kernel, launch.grid, launch.threads, launch.shared_bytes, launch.cluster)
        if kernel is None or key in found:  # the fused operators launch what others launch too
            continue
        shared = kernel.shared_bytes + launch.shared_bytes
        resident = blocks_per_multiprocessor(CAPABILITY, kernel.registers, shared, launch.threads)
        places = slots(resident, launch.cluster)
        waves = launch.grid / places if places else 0.0
        found[key] = Occupancy(launch, kernel.registers, shared, resident, waves)
    return list(found.values())


def occupancy_table(rows: Sequence[Occupancy]) -> str:
    """One launch a line."""
    ops = max((len(row.launch.op) for row in rows), default=2)
    names = max((len(row.launch.kernel) for row in rows), default=6)
    head = f"{'shape':<14}{'operator':<{ops + 1}}{'kernel':<{names}}"
    lines = [f"{head} registers  shared threads cluster blocks  per SM  waves on {sum(GPCS)} SMs"]
    for row in rows:
        launch = row.launch
        lines.append(
            f"{launch.shape:<14}{launch.op:<{ops + 1}}{launch.kernel:<{names}}{row.registers:>10}{row.shared_bytes:>8}"
            f"{launch.threads:>8}{launch.cluster:>8}{launch.grid:>7}{row.resident:>8}  {row.text}"
        )
    return "\n".join(lines)
