# SPDX-License-Identifier: Apache-2.0
"""The model inside of what users wrap around it: torch.compile, data parallelism, adapters, pipelines."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Pipeline


def unwrap(model: Any) -> tuple[list[nn.Module], Any]:
    """The wrappers of a model, outermost first, and the model of transformers inside.

    ``torch.compile``, ``DataParallel`` on one device, ``DistributedDataParallel``, a ``PeftModel`` and a pipeline are
    unwrapped.

    Raises:
        TypeError: ``DataParallel`` would copy the model to several devices in each call.
    """
    wrappers: list[nn.Module] = []
    while (inner := _inside(model)) is not None:
        if isinstance(model, nn.Module):
            wrappers.append(model)
        model = inner
    return wrappers, model


def _inside(model: Any) -> Any:
    """The next model inside, or None."""
    if isinstance(model, Pipeline):
        return model.model
    if hasattr(model, "_orig_mod"):  # torch.compile
        return model._orig_mod
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise TypeError(
            "DataParallel copies the model to several devices in each call, and copies do not drop tokens: pass the "
            "model inside (.module), or one process per device with DistributedDataParallel"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    if hasattr(model, "get_base_model"):  # PEFT
        return model.get_base_model()
    return None
