# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz``; the tests' folder becomes importable, as pytest makes it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.cli import app

app()
