# SPDX-License-Identifier: Apache-2.0
"""Makes the scripts and packages of bench/ and tools/ importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "bench"), str(ROOT / "tools")]
