# SPDX-License-Identifier: Apache-2.0
"""``python -m fuzz.child BACKEND``: computes the cases that come in, one a line, until there are no more."""

from __future__ import annotations

import json
import os
import sys

import safetensors.torch
import torch

from .families import FAMILIES
from .players import call_of


def main() -> None:
    """Answers on what was standard output; whatever else prints goes to standard error."""
    (backend,) = sys.argv[1:]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        family = FAMILIES[case["op"]]
        answer = family.compute(case, call_of(backend, case["op"], case))
        blob = b""
        if answer.problem is None:
            tensors = {str(i): t.contiguous() for i, t in enumerate(answer.tensors)}
            blob = safetensors.torch.save(tensors)
        out.write(json.dumps({"problem": answer.problem, "bytes": len(blob)}).encode() + b"\n" + blob)
        out.flush()


if __name__ == "__main__":
    main()
