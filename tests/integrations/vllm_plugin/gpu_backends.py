# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU as it runs on a GPU: model runner V2 and the attention backends of GPUs.

Triton's kernels run in its interpreter: TRITON_ATTN, and the bookkeeping of model runner V2. FLASH_ATTN and FLASHINFER
run with stand-ins for their compiled functions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import types

import graphs_on_cpu
import pytest

DEFAULT = os.environ.get("MUSTDROP_TEST_PLATFORM", "1 CPU_ATTN")
"""Model runner and attention backend of tests that choose none."""
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


class _Driver:
    """Is counted by vLLM, and absent to torch.compile, which generates code for CPUs."""

    def __init__(self) -> None:
        raise RuntimeError("the interpreter has no driver")

    @staticmethod
    def is_active() -> bool:
        return True


def offer_triton() -> None:
    """Lets vLLM find Triton, which it takes for absent without a driver; its kernels read the device's capability."""
    if not INTERPRETED:
        return
    import torch
    from triton.backends import backends

    if "cpu" not in backends:
        backends["cpu"] = types.SimpleNamespace(compiler=None, driver=_Driver)
        torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)


_chosen: list[str] = []


@contextlib.contextmanager
def default_platform(forked: bool = False):
    """The platform of tests that choose none; inside ``platform`` the chosen one remains.

    On a CPU by itself vLLM spawns the processes of an engine, each of which imports vLLM; `forked` ones have it.
    """
    if _chosen or (DEFAULT == "1 CPU_ATTN" and not forked):
        yield
    else:
        runner, _, attention = DEFAULT.partition(" ")
        with platform(int(runner), attention):
            yield


def _help_the_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Some of vLLM's kernels for sampling do not run in Triton's interpreter as they are."""
    from triton.runtime.interpreter import InterpreterBuilder
    from vllm.v1.sample.ops import topk_topp_sampler

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    # The "and" of a scalar and a block holds integers.
    def load_by_flags(builder, pointers, mask, *args):
        mask.data = mask.data.astype(bool)
        return load(builder, pointers, mask, *args)

    def store_by_flags(builder, pointers, value, mask, *args):
        mask.data = mask.data.astype(bool)
        return store(builder, pointers, value, mask, *args)

    patch.setattr(InterpreterBuilder, "create_masked_load", load_by_flags)
    patch.setattr(InterpreterBuilder, "create_masked_store", store_by_flags)
    patch.setattr(topk_topp_sampler, "HAS_TRITON", False)  # top-k and top-p in plain PyTorch


@contextlib.contextmanager
def platform(runner: int, attention: str, *, asynchronous: bool | None = None, graphs: str | None = None):
    """A model runner and an attention backend.

    The backend is CPU_ATTN, TRITON_ATTN, FLASH_ATTN with a version (2, 3, 4), or FLASHINFER with a compute capability
    (8, 9, 10), which decides between its kernels; without a number it is FLASH_ATTN 3 or FLASHINFER 8.

    vLLM disables asynchronous scheduling and graphs on a CPU. Here the first is on for V2, as on GPUs, and a mode of
    graphs can be given.
    """
    import flash_standins
    import flashinfer_standins
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    name, _, version = attention.partition(" ")
    if not INTERPRETED and (runner == 2 or name in ("TRITON_ATTN", "FLASHINFER")):
        pytest.skip("needs Triton and TRITON_INTERPRET=1: make test-vllm")
    path = AttentionBackendEnum[name].get_path()
    configure = CpuPlatform.check_and_update_config.__func__

    def as_on_a_gpu(cls, config):
        configure(cls, config)
        config.scheduler_config.async_scheduling = runner == 2 if asynchronous is None else asynchronous
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # processes of an engine inherit what is replaced here
        if graphs is not None:
            graphs_on_cpu.choose(config, graphs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(runner - 1))
        patch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(lambda cls, *args, **kwargs: path))
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(as_on_a_gpu))
        if INTERPRETED:
            _help_the_interpreter(patch)
        if name == "FLASH_ATTN":
            flash_standins.install(patch, int(version or 3))
        if name == "FLASHINFER":
            flashinfer_standins.install(patch, int(version or 8))
        if graphs is not None:
            graphs_on_cpu.install(patch)
        selector._cached_get_attn_backend.cache_clear()
        _chosen.append(attention)
        try:
            yield
        finally:
            _chosen.pop()
            selector._cached_get_attn_backend.cache_clear()
