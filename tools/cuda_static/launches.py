# SPDX-License-Identifier: Apache-2.0
"""Launches of every operator at the shapes of mustdrop_kernels/bench/shapes.py, recorded without a GPU.

The launchers are compiled for the host, as in the tests of the backend `cupy`, and connected to a stub machine that
reports the device's properties and records launches. Grids, clusters and shared memory are those of real launches.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .compiling import BUILD, ROOT, readable


@dataclass(frozen=True)
class Gpu:
    """Properties of a device that plans depend on."""

    capability: int  # times ten
    shared_bytes: int  # the most of a block
    gpcs: tuple[int, ...]  # multiprocessors of each GPC; a cluster stays inside one

    @property
    def multiprocessors(self) -> int:
        """Number of multiprocessors."""
        return sum(self.gpcs)

    def slots(self, resident: int, cluster: int) -> int:
        """Number of resident blocks.

        Args:
            resident: blocks per multiprocessor.
            cluster: blocks per cluster.
        """
        if cluster == 1:
            return resident * self.multiprocessors
        return sum(resident * size // cluster for size in self.gpcs) * cluster


# The number of multiprocessors per GPC varies between devices of one model; these are usual ones. On an H200 clusters
# of four or eight with a multiprocessor per block leave four of 132 idle. cudaOccupancyMaxActiveClusters returns the
# value of a device. An A100 has no clusters.
GPUS = {
    "A100": Gpu(80, 163 << 10, (16,) * 5 + (14,) * 2),
    "H200": Gpu(90, 227 << 10, (16,) * 6 + (18,) * 2),
    "B200": Gpu(100, 227 << 10, (18,) * 6 + (20,) * 2),
}
GPU = "H200"  # of the tables
CAPABILITY = str(GPUS[GPU].capability)
DTYPE = "bfloat16"
SHAPES = ("llava-1.5", "llava-1.5:8", "llava-1.5:64", "llava-next", "video-mha", "video-gqa")
CLUSTER_DIMENSION = 4  # kClusterDimension of csrc/common/driver.h
VISION_ENCODER = ("spatial_merge", "cls_attention")  # run once per image, therefore also with large batches
_HERE = Path(__file__).resolve().parent


class LaunchesError(RuntimeError):
    """The launches could not be recorded; the message has the reason."""


@dataclass(frozen=True)
class Launch:
    """One launch."""

    shape: str
    op: str
    kernel: str
    grid: int  # blocks in all
    threads: int  # of a block
    shared_bytes: int  # dynamic, of a block
    cluster: int  # blocks


class _Attribute(ctypes.Structure):
    """DriverAttribute of csrc/common/driver.h."""

    _fields_ = (("id", ctypes.c_uint), ("_", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """DriverConfig of csrc/common/driver.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Recorder:
    """A machine for the launchers (see launchers.Machine of the backend `cupy`) that runs nothing."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._kernels: list[str] = []
        self.launches: list[tuple[str, int, int, int, int]] = []  # fields of ``Launch`` from ``kernel`` on
        pointer = ctypes.c_void_p
        self._stream = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(pointer))(lambda device, stream: 0)
        self._launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Config), pointer, pointer, pointer)(self._record)
        self.current_stream = ctypes.cast(self._stream, pointer).value or 0
        self.launch = ctypes.cast(self._launch, pointer).value or 0
        count = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), pointer, ctypes.POINTER(_Config))
        self._count = count(self._count_clusters)
        self.count_clusters = ctypes.cast(self._count, pointer).value or 0

    def facts(self, device: int) -> tuple[int, int, int]:
        """Properties of the simulated device."""
        return self._gpu.capability, self._gpu.multiprocessors, self._gpu.shared_bytes

    def find(self, device: int, kernel: str) -> int:
        """A handle of the kernel, numbered from 1."""
        self._kernels.append(kernel)
        return len(self._kernels)

    def make_current(self, device: int) -> None:
        """Does nothing: there are no contexts."""

    def _count_clusters(
        self, count: ctypes._Pointer[ctypes.c_int], function: int, config: ctypes._Pointer[_Config]
    ) -> int:
        cluster = _cluster(config.contents)
        count.contents.value = self._gpu.slots(1, cluster) // cluster  # kernels that occupy a multiprocessor
        return 0

    def _record(self, config: ctypes._Pointer[_Config], function: int, *_: object) -> int:
        c = config.contents
        blocks, threads = (size[0] * size[1] * size[2] for size in (c.grid, c.block))
        name = readable(self._kernels[function - 1])
        self.launches.append((name, blocks, threads, c.shared_bytes, _cluster(c)))
        return 0


def _cluster(config: _Config) -> int:
    """Blocks of a cluster."""
    attributes = [config.attributes[i] for i in range(config.attribute_count)]
    return next((a.value[0] for a in attributes if a.id == CLUSTER_DIMENSION), 1)


def record_all(
    recorder: Recorder, shapes: Sequence[str], ops: Sequence[str] = (), dtype: str = DTYPE
) -> Iterator[Launch]:
    """The launches of some operators (none: all) and their variants at some shapes, with a connected recorder."""
    import torch

    from mustdrop_kernels.bench.cases import CASES, FLOAT32_ONLY, Case
    from mustdrop_kernels.bench.shapes import parse_shape

    from .untouched import Untouched

    for name in shapes:
        shape = parse_shape(name)
        for op, spec in CASES.items():
            if op not in (ops or CASES) or (shape.batch > 8 and not ops and op not in VISION_ENCODER):
                continue
            floating = torch.float32 if op in FLOAT32_ONLY else getattr(torch, dtype)
            with Untouched():
                inputs = Case(op, shape, floating, torch.device("cpu")).inputs()
            variants = {"": {}, **{f" ({what})": make(inputs) for what, make in spec.variants.items()}}
            for variant, extra in variants.items():
                recorder.launches.clear()
                getattr(torch.ops.mustdrop_nvrtc_emulated, op)(*inputs.args, **inputs.kwargs, **extra)
                yield from (Launch(name, op + variant, *launch) for launch in recorder.launches)


def connect(recorder: Recorder) -> object:
    """Build the launchers for CPU tensors and connect them to a recorder. The result must be kept alive."""
    import torch
    from cuda_emulation import building

    from mustdrop_kernels.backends.cupy import launchers

    if reason := building.why_not():
        raise LaunchesError(reason)
    path = building.build_launchers()
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    return library, launchers.connect(library, recorder)


def _fingerprint(words: Sequence[str]) -> str:
    """Digest of some words and of all sources that the launches depend on."""
    sources = [p for p in (ROOT / "csrc").glob("*/*") if p.suffix in (".h", ".cuh", ".cu")]
    sources += [
        ROOT / "mustdrop_kernels" / "backends" / "cupy" / "launchers.py",
        ROOT / "csrc" / "schemas.cpp",
        ROOT / "tests" / "cuda_emulation" / "building.py",
    ]
    sources += [*(ROOT / "mustdrop_kernels" / "bench").glob("*.py"), Path(__file__), _HERE / "untouched.py"]
    texts = [" ".join(words).encode(), *(path.read_bytes() for path in sorted(sources))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def record(shapes: Sequence[str] = SHAPES, gpu: str = GPU, ops: Sequence[str] = (), dtype: str = DTYPE) -> list[Launch]:
    """All launches, recorded in a separate process and cached until a source changes.

    Args:
        shapes: names of shapes.
        gpu: a key of ``GPUS``.
        ops: operators; none: all.
        dtype: of tensors in floating point.

    Raises:
        LaunchesError: the launchers could not be built, or one raised.
    """
    words = [gpu, dtype, ",".join(ops), *shapes]
    kept = BUILD / f"launches-{_fingerprint(words)}.json"
    if not kept.exists():
        command = [sys.executable, "-m", "cuda_static.launches", *words]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(_HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            raise LaunchesError((done.stderr.strip() or "no output").splitlines()[-1][:300])
        BUILD.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout)
    return [Launch(**fields) for fields in json.loads(kept.read_text())]


if __name__ == "__main__":
    name, dtype, chosen, *wanted = sys.argv[1:]
    machine = Recorder(GPUS[name])
    connected = connect(machine)
    found = record_all(machine, wanted, [op for op in chosen.split(",") if op], dtype)
    print(json.dumps([asdict(launch) for launch in found]))
