# SPDX-License-Identifier: Apache-2.0
"""The public contract: every op's schema, read from its page in docs/ops.

A change of a page may add a keyword with a default; a new page adds an op.
"""

from __future__ import annotations

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "ops"


def _schema(op: str) -> str:
    """The block under "Schema" of an op's page, on one line."""
    (block,) = re.findall(
        r"^## Schema\n\n```text\n(.*?)```", (PAGES / f"{op}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return " ".join(block.split())


# In the order of the table of docs/ops/index.md, which is that of the stages.
OPS = tuple(re.findall(r"\]\((\w+)\.md\)", (PAGES / "index.md").read_text()))
SCHEMAS = {op: _schema(op) for op in OPS}
