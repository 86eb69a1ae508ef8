# SPDX-License-Identifier: Apache-2.0
"""How many tokens each running request has lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class DropRecord:
    """Number of dropped tokens of each running request. One per worker, equal on all ranks."""

    def __init__(self) -> None:
        self.dropped: dict[str, int] = {}

    def add(self, request: str, tokens: int) -> None:
        """Records the number of tokens that the prompt of a request has lost."""
        self.dropped[request] = tokens

    def of(self, requests: Sequence[str]) -> list[int]:
        """Number of dropped tokens of each of these requests."""
        return [self.dropped.get(request, 0) for request in requests]

    def remove(self, requests: Iterable[str]) -> None:
        """Removes requests that have ended or begin again."""
        for request in requests:
            self.dropped.pop(request, None)
