# SPDX-License-Identifier: Apache-2.0
"""The numbers of dropped tokens on their way from the workers to the scheduler, with the output of their step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class ReportingIds(list[str]):
    """The request ids of a step's output, and how many tokens the prompts of that step have lost.

    The model runner passes the list of ids from its batch to its output, so a report needs no field of vLLM's output,
    and is pickled with it.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        super().__init__(ids)
        self.dropped: dict[str, int] = {}


def dropped_tokens(output: Any) -> dict[str, int]:  # vLLM's ModelRunnerOutput
    """Number of dropped tokens of each prompt that was read in the step of an output."""
    return output.req_ids.dropped if isinstance(output.req_ids, ReportingIds) else {}
