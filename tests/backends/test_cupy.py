# SPDX-License-Identifier: Apache-2.0
"""The backend `cupy` without a GPU.

Its launchers run on the emulation (here, and in tests/ops as `cupy_emulated`), and NVRTC compiles its kernels for every
target. Loading and launching by CuPy and the driver require a GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cuda_emulation import building, nvrtc
from example import SIMPLE, simple_arguments

import mustdrop_kernels as mk
from mustdrop_kernels import _load, backends
from mustdrop_kernels.backends import cupy
from mustdrop_kernels.backends.cupy import launchers

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
built = pytest.mark.skipif(not _load.nvrtc.path.is_file(), reason=f"{_load.nvrtc.path.name} was not built")
emulated = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))
compiles = pytest.mark.skipif(
    find_spec("cupy") is None or find_spec("nvidia") is None, reason="cupy and nvidia-cuda-nvrtc are not installed"
)


# ------------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize(
    ("device", "cuda", "library", "installed", "reason"),
    [
        ("cpu", "13.0", True, True, "it serves CUDA tensors"),
        ("cuda", None, True, True, "this torch is built without CUDA"),
        ("cuda", "13.0", False, True, "libmustdrop_nvrtc.so was not built"),
        ("cuda", "12.8", True, False, "pip install cupy-cuda12x"),
        ("cuda", "13.0", True, False, "pip install cupy-cuda13x"),
        ("cuda", "13.0", True, True, None),
    ],
)
def test_why_not(device, cuda, library, installed, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cupy, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(_load.nvrtc, "path", tmp_path / "libmustdrop_nvrtc.so")
    if library:
        _load.nvrtc.path.touch()
    monkeypatch.setattr(cupy, "_why_no_launcher", lambda op: None)
    why_not = cupy.why_not(SIMPLE, device)
    assert why_not is None if reason is None else reason in why_not


def test_it_is_last_in_the_order():
    assert backends.ORDER["cuda"][-1] == "cupy"
    assert "cupy" in backends.registered()


# ------------------------------------------------------------------------------------------------ launchers


@pytest.fixture
def launched():
    """Emulated launchers on a device with clusters; a test may connect them to another machine."""
    nvrtc.connected()
    nvrtc.backend.configure(seed=1, capability=90)
    yield nvrtc.connected()
    nvrtc.connected.cache_clear()


@emulated
def test_launchers_cover_the_kernels_of_the_cuda_library(launched):
    library, machine, _ = launched
    assert {name.replace("mustdrop::", "") for name in launchers.kernels(library)} == set(machine.kernels)


@emulated
def test_clusters_reach_the_driver(launched):
    machine = launched[1]
    machine.found.clear()
    x = torch.randn(1, 17, 8)
    merged = torch.ops.mustdrop_nvrtc_emulated.spatial_merge(x, [4, 4], [2, 2], 0.1)
    assert [nvrtc._short(name) for name in machine.found] == ["merge_cluster_kernel<float, 4>"]
    assert torch.equal(merged[1], mk.spatial_merge(x, grid=[4, 4], window=[2, 2], threshold=0.1).counts)


@emulated
@pytest.mark.parametrize("hook", ["facts", "find"])
def test_python_errors_reach_the_caller(hook, launched, monkeypatch):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(launched[1], hook, fail)
    hooks = launchers.connect(launched[0], launched[1])
    with pytest.raises(RuntimeError, match="mustdrop: OSError: the disk is full"):
        torch.ops.mustdrop_nvrtc_emulated.spatial_merge(torch.ones(1, 5, 4), [2, 2], [2, 2])
    assert hooks is not None


@emulated
def test_a_thread_without_a_context_gets_one(launched, monkeypatch):
    """On the driver's error 201 the device is made current and the launch repeated."""
    library, machine, _ = launched
    real = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(machine.launch)
    errors, made = [201], []
    refuse_once = type(real)(lambda *args: errors.pop() if errors else real(*args))
    monkeypatch.setattr(machine, "launch", ctypes.cast(refuse_once, ctypes.c_void_p).value)
    monkeypatch.setattr(machine, "make_current", made.append)
    hooks = launchers.connect(library, machine)
    operator = getattr(torch.ops.mustdrop_nvrtc_emulated, SIMPLE)
    x = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(operator(*simple_arguments(x, 2, 0)), x[:, [2, 0]])
    assert made == [-1]
    errors.extend([700, 700])
    with pytest.raises(RuntimeError, match=r"gather_kernel<.*: CUDA driver error 700"):
        operator(*simple_arguments(x, 2, 0))
    assert hooks is not None


@emulated
@pytest.mark.parametrize("capability", [80, 90])
def test_a_row_of_half_a_billion_tokens_is_planned(capability, launched, monkeypatch):
    """4 * 2^29 bytes overflow int32: the keys must not be placed in shared memory."""
    library, machine, _ = launched
    nvrtc.backend.configure(seed=1, capability=capability)
    shared = []

    def record(config, *_):
        shared.append(ctypes.cast(config, ctypes.POINTER(ctypes.c_uint))[6])  # grid, block, shared_bytes
        return 0

    hook = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(record)
    monkeypatch.setattr(machine, "launch", ctypes.cast(hook, ctypes.c_void_p).value)
    hooks = launchers.connect(library, machine)
    scores = torch.empty(1, 2**29, dtype=torch.float16)  # never written, so it takes no memory
    types = torch.empty(1, 2**29, dtype=torch.uint8)
    torch.ops.mustdrop_nvrtc_emulated.select_topk(scores, types, 64, capacity=64)
    assert len(shared) == 1
    assert 0 < shared[0] < 48 << 10
    assert hooks is not None


@emulated
def test_the_driver_s_structures_are_those_of_cuda_h(tmp_path: Path):
    triton = find_spec("triton")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include" if triton and triton.origin else None
    if include is None or not (include / "cuda.h").is_file():
        pytest.skip("Triton's wheel, which contains cuda.h, is not installed")
    pairs = {
        "sharedMemBytes": "shared_bytes",
        "hStream": "stream",
        "attrs": "attributes",
        "numAttrs": "attribute_count",
        "gridDimX": "grid",
        "blockDimX": "block",
    }
    lines = [f"static_assert(offsetof(CUlaunchConfig, {a}) == offsetof(DriverConfig, {b}));" for a, b in pairs.items()]
    source = tmp_path / "layout.cpp"
    source.write_text(
        '#include <cuda.h>\n#include <cstddef>\n#include "common/driver.h"\nusing namespace mustdrop;\n'
        + "\n".join(lines)
        + """
static_assert(sizeof(CUlaunchConfig) == sizeof(DriverConfig));
static_assert(sizeof(CUlaunchAttribute) == sizeof(DriverAttribute));
static_assert(offsetof(CUlaunchAttribute, value) == offsetof(DriverAttribute, value));
static_assert(offsetof(CUlaunchAttributeValue, clusterDim.x) == 0);
static_assert(offsetof(CUlaunchAttributeValue, clusterDim.z) == 8);
static_assert(offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed) == 0);
static_assert(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION == kClusterDimension);
static_assert(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION == kProgrammaticSerialization);
static_assert(CUDA_ERROR_INVALID_CONTEXT == kInvalidContext);
static_assert(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES == 1 && CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8);
"""
    )
    command = [building.compiler(), "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{building.ROOT / 'csrc'}"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ NVRTC


def kernels() -> list[str]:
    _load.nvrtc.load()
    assert _load.nvrtc.problem is None
    return launchers.kernels(ctypes.CDLL(str(_load.nvrtc.path)))


def one_of_each_family() -> list[str]:
    """One instantiation per kernel name, the one with the widest vector arguments."""
    return list({name.split("<")[0]: name for name in kernels()}.values())


def check_compiled(names: list[str], target: str) -> None:
    from mustdrop_kernels.backends.cupy import compile

    codes = compile.compile_kernels(names, target)
    for name, code in zip(names, codes, strict=True):
        function = re.search(r"(\w+_kernel)", name)
        assert function is not None
        assert function[1] in code.name
        assert code.name.encode() in code.image


@built
@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_of_each_family_compiles(target):
    assert len(one_of_each_family()) >= 14
    check_compiled(one_of_each_family(), target)


@pytest.mark.slow
@built
@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    assert len(kernels()) == 84
    check_compiled(kernels(), target)


@pytest.fixture
def compiling(monkeypatch, tmp_path):
    """The compile module with an empty cache, and the list of kernels that it compiles."""
    pytest.importorskip("cupy")
    from mustdrop_kernels.backends.cupy import compile

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    compiled = []
    real = compile.compile_kernels
    monkeypatch.setattr(compile, "compile_kernels", lambda names, target: compiled.append(names) or real(names, target))
    return compile, compiled


@built
@compiles
def test_a_kernel_is_compiled_once(compiling, tmp_path):
    compile, compiled = compiling
    first = compile.compiled("merge_rank_kernel", "sm_80")
    assert compile.compiled("merge_rank_kernel", "sm_80") == first
    assert len(compiled) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".bin"]


@built
@compiles
def test_a_changed_header_is_another_kernel(compiling, monkeypatch):
    compile, compiled = compiling
    compile.compiled("merge_rank_kernel", "sm_80")
    changed = {name: text + "\n" for name, text in compile.sources().items()}
    monkeypatch.setattr(compile, "sources", lambda: changed)
    compile.compiled("merge_rank_kernel", "sm_80")
    assert len(compiled) == 2


@built
@compiles
def test_read_only_cache_folder(compiling, monkeypatch, tmp_path):
    compile, compiled = compiling
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    compile.compiled("merge_rank_kernel", "sm_80")
    compile.compiled("merge_rank_kernel", "sm_80")
    assert len(compiled) == 2


@built
@compiles
def test_compile_errors_contain_the_log(compiling):
    compile, _ = compiling
    with pytest.raises(compile.CompileError, match=r"no_such_kernel.* for sm_80(.|\n)*error"):
        compile.compiled("no_such_kernel", "sm_80")


@compiles
def test_a_newer_device_gets_ptx(compiling, monkeypatch):
    compile, _ = compiling
    monkeypatch.setattr(compile.nvrtc, "getSupportedArchs", lambda: (75, 80, 90))
    assert compile.architecture(90) == ("sm_90", 90)
    assert compile.architecture(103) == ("compute_90", 90)
    with pytest.raises(compile.CompileError, match="does not support sm_70"):
        compile.architecture(70)


# ------------------------------------------------------------------------------------------------ CuPy's side


@built
@compiles
def test_a_kernel_is_loaded_with_all_shared_memory(compiling, monkeypatch):
    """CuPy's calls in order on a stub device; the order of arguments is that of CuPy's docstrings."""
    from mustdrop_kernels.backends.cupy import gpu

    words = {"moduleLoadData": "(bytes image)", "moduleGetFunction": "(intptr_t module, str funcname)"}
    words |= {
        "funcGetAttribute": "(int attribute, intptr_t f)",
        "funcSetAttribute": "(intptr_t f, int attribute, int value)",
    }
    for name, arguments in words.items():
        assert arguments in getattr(gpu.driver, name).__doc__
    device = {gpu.runtime.cudaDevAttrMultiProcessorCount: 132}
    device[gpu.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin] = 232448
    calls = []

    def stub(name, result):
        return lambda *args: calls.append((name, *args)) or result

    class Driver:
        moduleLoadData = staticmethod(stub("load", 11))
        moduleGetFunction = staticmethod(stub("get", 22))
        funcGetAttribute = staticmethod(stub("attribute", 1024))
        funcSetAttribute = staticmethod(stub("set", None))

    monkeypatch.setattr(gpu, "driver", Driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(gpu.runtime, "deviceGetAttribute", lambda which, index: device[which])
    monkeypatch.setattr(gpu.runtime, "setDevice", stub("current", None))
    machine = object.__new__(gpu.Gpu)  # its constructor requires the driver's library
    assert machine.facts(1) == (90, 132, 232448)
    assert machine.find(1, "mustdrop::select_kernel<float>") == 22
    code = compiling[0].compiled("mustdrop::select_kernel<float>", "sm_90")
    assert calls == [
        ("current", 1),
        ("load", code.image),
        ("get", 11, code.name),
        ("attribute", 1, 22),
        ("set", 22, 8, 232448 - 1024),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(RuntimeError, match=r"need 8\.0 or newer"):
        machine.facts(1)
