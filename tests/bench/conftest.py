# SPDX-License-Identifier: Apache-2.0
"""Makes the scripts and packages of bench/ importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
