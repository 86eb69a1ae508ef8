# SPDX-License-Identifier: Apache-2.0
"""vLLM's own kernels for layers that run outside of compiled graphs.

Where inductor compiles a model, vLLM replaces its fused kernels (norms, activations, RoPE) by plain PyTorch code for
inductor to fuse. The layers of a step in which tokens are dropped run eagerly, so there the kernels are enabled again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from vllm.ir.op import IrOp
from vllm.model_executor.custom_op import CustomOp
from vllm.platforms import current_platform

_KERNELS, _NATIVE = "vllm_c", "native"


class EagerKernels:
    """The kernels of a model's modules, and those of vLLM's IR, that compilation disables."""

    def __init__(self, model: nn.Module) -> None:  # under construction by vLLM
        # vLLM's modules have no kernels for CPUs: there inductor's code for each of them is the fastest.
        modules = [] if current_platform.is_cpu() else [m for m in model.modules() if isinstance(m, CustomOp)]
        pairs = ((module, _kernel(module)) for module in modules)
        self._modules = [(module, kernel) for module, kernel in pairs if kernel != module._forward_method]

    @contextlib.contextmanager
    def enabled(self) -> Iterator[None]:
        """The kernels run inside the block."""
        before = [module._forward_method for module, _ in self._modules]
        with contextlib.ExitStack() as stack:
            for op in _ir_ops():
                stack.enter_context(op.set_priority([_KERNELS, _NATIVE]))
            try:
                for module, kernel in self._modules:
                    module._forward_method = kernel
                yield
            finally:
                for (module, _), method in zip(self._modules, before, strict=True):
                    module._forward_method = method


def _kernel(module: CustomOp) -> Callable[..., Any]:
    """The method of a module that vLLM would choose on this platform without a compiler."""
    before = module._enforce_enable
    module._enforce_enable = True
    try:
        kernel: Callable[..., Any] = module.dispatch_forward(compile_native=False)
    finally:
        module._enforce_enable = before
    return kernel


def _ir_ops() -> list[Any]:
    """The operators of vLLM's IR that have a kernel which does not come first already."""
    current_platform.import_ir_kernels()
    having = [op for op in IrOp.registry.values() if _KERNELS in op.supported_providers()]
    return [op for op in having if op.get_priority()[:1] == [_NATIVE]]
