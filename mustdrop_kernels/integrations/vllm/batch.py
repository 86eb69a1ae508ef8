# SPDX-License-Identifier: Apache-2.0
"""Requests of a step, and the number of tokens that each of them has lost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import images


class StepRequest(NamedTuple):
    """A request of the current step."""

    name: str
    images: Sequence[Any]  # its multimodal features
    adapter: int = 0  # of LoRA; 0: none


class DropRecord:
    """Number of dropped tokens of each running request. One per worker, equal on all ranks."""

    def __init__(self) -> None:
        self.requests: Callable[[], Sequence[StepRequest]] = lambda: ()
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

    requests: list[StepRequest]
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
    def of(cls, record: DropRecord, metadata: Any) -> Batch:
        """The batch of a step. Requests that begin, first or after preemption, are removed from the record."""
        begins = metadata.query_start_loc.tolist()
        new = [b - a for a, b in itertools.pairwise(begins)]
        lengths = metadata.seq_lens[: len(new)].tolist()
        requests = list(record.requests())[: len(new)]
        fresh = [a == b for a, b in zip(new, lengths, strict=True)]
        record.remove(request.name for request, first in zip(requests, fresh, strict=True) if first)
        return cls(
            requests=requests,
            metadata=metadata,
            new=new,
            lengths=lengths,
            dropped_before=[record.dropped.get(request.name, 0) for request in requests],
            beginning=[i for i, first in enumerate(fresh) if first and requests[i].images],
        )

    def placeholders(self, device: torch.device) -> Tensor:
        """(rows) bool: the rows of images of requests that begin."""
        members = set(self.beginning)
        pairs = zip(self.requests, self.new, strict=True)
        parts = [images.rows(r.images if i in members else (), rows) for i, (r, rows) in enumerate(pairs)]
        return torch.cat(parts).to(device)
