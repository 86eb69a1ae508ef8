# SPDX-License-Identifier: Apache-2.0
"""Other ways to compute what the operators compute, each named for what it is.

A peer is written from the formulas in its own way of computing. It gets the operator's inputs and returns what it has;
``canonical`` brings that into the form in which it is compared with the operator's result before anything is timed.
"""

from __future__ import annotations

from . import merge, moves, scores, select
from .base import Peer, compiled

PEERS: tuple[Peer, ...] = (*merge.PEERS, *scores.PEERS, *select.PEERS, *moves.PEERS)


def peers_of(op: str) -> list[Peer]:
    """The peers of an operator, the published algorithm first."""
    return [peer for peer in PEERS if op in peer.ops]


def names() -> list[str]:
    """All names, each once."""
    return list(dict.fromkeys(peer.name for peer in PEERS))


__all__ = ["PEERS", "Peer", "compiled", "names", "peers_of"]
