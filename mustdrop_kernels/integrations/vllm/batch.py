# SPDX-License-Identifier: Apache-2.0
"""Requests of a step, and the number of tokens that each of them has lost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class DropRecord:
    """Number of dropped tokens of each running request. One per worker, equal on all ranks."""

    def __init__(self) -> None:
        self.requests: Callable[[], Sequence[str]] = lambda: ()
        """The requests of the current step, in the order of its rows."""
        self.dropped: dict[str, int] = {}
        self._updates: dict[str, int] = {}

    def add(self, request: str, tokens: int) -> None:
        """Records the number of tokens that the prompt of a request has lost."""
        self.dropped[request] = tokens
        self._updates[request] = tokens

    def pop_updates(self) -> dict[str, int]:
        """The entries added since the last call."""
        updates, self._updates = self._updates, {}
        return updates

    def remove(self, requests: Iterable[str]) -> None:
        """Removes requests that have ended."""
        for request in requests:
            self.dropped.pop(request, None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step: R requests and their new tokens, packed row by row."""

    requests: list[str]
    metadata: Any  # vLLM's attention metadata
    new: list[int]  # new tokens of each request
    lengths: list[int]  # length of each plain sequence, new tokens included
    dropped_before: list[int]  # tokens of each request that were dropped in earlier steps
    beginning: list[int]  # requests that begin in this step, with an image

    @property
    def rows(self) -> int:
        """New tokens of all requests."""
        return sum(self.new)

    @classmethod
    def of(cls, record: DropRecord, metadata: Any, image: Tensor) -> Batch:  # image: (rows) bool, placeholders
        """The batch of a step. Requests that begin, first or after preemption, are removed from the record."""
        begins = metadata.query_start_loc.tolist()
        new = [b - a for a, b in itertools.pairwise(begins)]
        lengths = metadata.seq_lens[: len(new)].tolist()
        requests = list(record.requests())[: len(new)]
        fresh = [a == b for a, b in zip(new, lengths, strict=True)]
        record.remove(request for request, first in zip(requests, fresh, strict=True) if first)
        holds = torch.zeros(image.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(image, 0, out=holds[1:])
        found = (holds[begins[1:]] - holds[begins[:-1]]).tolist()
        return cls(
            requests=requests,
            metadata=metadata,
            new=new,
            lengths=lengths,
            dropped_before=[record.dropped.get(request, 0) for request in requests],
            beginning=[i for i, (first, count) in enumerate(zip(fresh, found, strict=True)) if first and count > 0],
        )
