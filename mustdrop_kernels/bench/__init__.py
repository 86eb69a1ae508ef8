# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench``: the operators timed beside other ways of computing the same, on one definition of the inputs."""

from __future__ import annotations

from .cases import CASES, Case, Inputs
from .peers import Peer, peers_of
from .shapes import Shape, parse_shapes

__all__ = ["CASES", "Case", "Inputs", "Peer", "Shape", "parse_shapes", "peers_of"]
