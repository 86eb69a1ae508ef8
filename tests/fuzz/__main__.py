# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz``. Makes the tests' folder importable, as pytest does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.cli import app

app()
