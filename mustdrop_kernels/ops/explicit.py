# SPDX-License-Identifier: Apache-2.0
"""Explicitly chosen backends behind torch's dispatcher.

``torch.ops.mustdrop_explicit.<name>`` is ``torch.ops.mustdrop.<name>`` with the name of a backend in front. As an
operator of its own it converts numbers, is traced and is transformed like the operator that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch

from .._namespace import NAMESPACE, operator
from . import contract, registry, transforms
from .contract import CONTRACTS, Implementation

_EXPLICIT = f"{NAMESPACE}_explicit"
_libraries: list[torch.library.Library] = []


def explicit_operator(op: str) -> Any:
    """``torch.ops.mustdrop_explicit.<op>``."""
    return getattr(getattr(torch.ops, _EXPLICIT), op)


def _kernel(op: str) -> Implementation:
    def kernel(backend: str, *args: Any, **kwargs: Any) -> Any:
        return registry.implementation(op, contract.device_type(args, kwargs), backend)(*args, **kwargs)

    return kernel


def _fake(op: str) -> Implementation:
    empty = contract.fake(op)

    def fake(backend: str, *args: Any, **kwargs: Any) -> Any:
        registry.implementation(op, contract.device_type(args, kwargs), backend)
        return empty(*args, **kwargs)

    return fake


def register() -> None:
    """Define the operators. Called once, at import."""
    library = torch.library.Library(_EXPLICIT, "DEF")
    _libraries.append(library)
    for op in CONTRACTS:
        _, _, signature = str(operator(op).default._schema).partition("(")
        library.define(f"{op}(str backend, {signature}")
        library.impl(op, _kernel(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_EXPLICIT}::{op}", _fake(op), lib=library)
        transforms.register(library, op, explicit_operator(op).default, leading=1)
