# SPDX-License-Identifier: Apache-2.0
"""Lets a torchvision that was built for CUDA be imported beside a CPU torch.

Its compiled operators cannot be loaded there, and its Python code stops where it registers shapes for two of them. vLLM
imports it, and calls none of them. `make test-vllm` puts this module and a .pth file that imports it into the
environment, since vLLM inspects models in processes of its own.
"""

from __future__ import annotations

import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the two operators, without kernels, when torchvision is looked for the first time."""

    library: object = None  # torch forgets declarations whose library is collected

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision" or self.library is not None:
            return
        import torch

        self.library = library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
