# SPDX-License-Identifier: Apache-2.0
"""Update measured tables in the pages: the text between `<!-- COMMAND -->` and `<!-- end -->` is the output of COMMAND.

python tools/figures.py            # README.md and docs/, after a new measurement
python tools/figures.py --check    # changes nothing; exit status 1 if a table is stale
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from mustdrop_kernels.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
MADE = re.compile(r"(<!-- ((?:mustdrop|python) [^\n]*) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


def pages() -> list[Path]:
    """Pages that may contain a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def printed(command: str) -> str:
    """Output of a command; `mustdrop` is called in this process."""
    program, *words = shlex.split(command)
    if program == "mustdrop":
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        if result.exit_code:
            sys.exit(f"{command} ended with {result.exit_code}: {result.output}")
        return result.stdout.strip() + "\n"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [program, *words], check=True, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    return done.stdout.strip() + "\n"


def renewed(text: str) -> str:
    """A page's text with updated tables."""
    return MADE.sub(lambda found: found[1] + printed(found[2]) + found[4], text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    os.chdir(ROOT)  # the commands name files below it
    stale = []
    for page in pages():
        text = page.read_text()
        if (new := renewed(text)) == text:
            continue
        stale.append(page)
        if not check:
            page.write_text(new)
        print(f"{page.relative_to(ROOT)}: {'stale' if check else 'renewed'}")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
