# SPDX-License-Identifier: Apache-2.0
"""Large tensors with a shape and an address whose memory is never written.

Planning a launch requires sizes, strides and alignment, not values. Memory that is not written is not allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

LARGE = 1 << 20  # elements


def _is_large(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > LARGE


def _to_meta(value: object) -> object:
    """Map a tensor to a meta tensor, a device to the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _to_memory(value: object) -> object:
    """Allocate memory for a meta tensor."""
    return (
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        if isinstance(value, torch.Tensor)
        else value
    )


def _makes_large(args: Any) -> bool:
    """True for arguments of a factory, such as `randn`, of a large tensor."""
    sizes = args[0] if args else ()
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(size, int) for size in sizes):
        return False
    return torch.Size(sizes).numel() > LARGE


class Untouched(TorchDispatchMode):
    """Mode in which operators that create or take large tensors compute nothing: their results are uninitialized.

    Small tensors are computed as usual, so that data-dependent shapes (`nonzero`) are correct. Views stay views.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0] if tree_any(_is_large, (args, kwargs)) else func(*args, **kwargs)
        makes_large = _makes_large(args)
        if not makes_large and not tree_any(_is_large, (args, kwargs)):
            return func(*args, **kwargs)
        if "generator" in kwargs:  # a CPU generator does not work on the meta device
            func, kwargs = func.overloadpacket.default, {k: v for k, v in kwargs.items() if k != "generator"}
        if makes_large:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return tree_map(_to_memory, func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs)))
