# SPDX-License-Identifier: Apache-2.0
"""``python -m fuzz.child BACKEND``: computes the cases of standard input, one per line."""

from __future__ import annotations

import json
import os
import sys

import safetensors.torch
import torch

from .families import FAMILIES
from .runners import call_of


def main() -> None:
    """Write results to the original standard output; redirect other prints to standard error."""
    (backend,) = sys.argv[1:]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        family = FAMILIES[case["op"]]
        answer = family.compute(case, call_of(backend, family, case))
        blob = b""
        if answer.problem is None:
            tensors = {str(i): t.contiguous() for i, t in enumerate(answer.tensors)}
            blob = safetensors.torch.save(tensors)
        out.write(json.dumps({"problem": answer.problem, "bytes": len(blob)}).encode() + b"\n" + blob)
        out.flush()


if __name__ == "__main__":
    main()
