# SPDX-License-Identifier: Apache-2.0
"""Whose rows a step holds, and how many tokens each of those requests has lost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Ledger:
    """Tokens that each running request has lost. One per worker; ranks that score alike hold the same."""

    def __init__(self) -> None:
        self.requests: Callable[[], Sequence[str]] = lambda: ()
        """The requests of the step that is running, in the order of its rows."""
        self.lost: dict[str, int] = {}
        self._news: dict[str, int] = {}

    def record(self, request: str, tokens: int) -> None:
        """A request's prompt has lost this many tokens."""
        self.lost[request] = tokens
        self._news[request] = tokens

    def take_news(self) -> dict[str, int]:
        """What was recorded since the last call."""
        news, self._news = self._news, {}
        return news

    def forget(self, requests: Iterable[str]) -> None:
        """These have ended."""
        for request in requests:
            self.lost.pop(request, None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step: R requests and their new tokens, packed row by row."""

    requests: list[str]
    metadata: Any  # the attention metadata that vLLM made
    new: list[int]  # new tokens of each request
    lengths: list[int]  # of each plain sequence, new tokens included
    lost: list[int]  # tokens that it has lost in earlier steps
    beginning: list[int]  # requests that begin in this step, with an image

    @property
    def rows(self) -> int:
        """New tokens of all requests."""
        return sum(self.new)

    @classmethod
    def of(cls, ledger: Ledger, metadata: Any, image: Tensor) -> Batch:  # image: (rows) bool, placeholders
        """Reads a step. A request that begins, perhaps again after preemption, has lost nothing."""
        begins = metadata.query_start_loc.tolist()
        new = [b - a for a, b in itertools.pairwise(begins)]
        lengths = metadata.seq_lens[: len(new)].tolist()
        requests = list(ledger.requests())[: len(new)]
        fresh = [a == b for a, b in zip(new, lengths, strict=True)]
        ledger.forget(request for request, first in zip(requests, fresh, strict=True) if first)
        holds = torch.zeros(image.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(image, 0, out=holds[1:])
        found = (holds[begins[1:]] - holds[begins[:-1]]).tolist()
        return cls(
            requests=requests,
            metadata=metadata,
            new=new,
            lengths=lengths,
            lost=[ledger.lost.get(request, 0) for request in requests],
            beginning=[i for i, (first, count) in enumerate(zip(fresh, found, strict=True)) if first and count > 0],
        )
