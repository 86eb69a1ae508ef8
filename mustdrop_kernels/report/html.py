# SPDX-License-Identifier: Apache-2.0
"""Self-contained page of HTML: pictures are embedded, nothing is fetched, every text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; }
dt { color: #4b5365; } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem 1rem .25rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #e3e6eb; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
"""
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""


class Page:
    """A page that is built from top to bottom."""

    def __init__(self, title: str) -> None:
        self._title = escape(title)
        self._parts = [f"<h1>{self._title}</h1>"]

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def facts(self, facts: Mapping[str, str]) -> None:
        """Add names and values."""
        rows = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        self._parts.append(f"<dl>\n{rows}\n</dl>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table of text."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        self._parts.append("\n".join(["<table>", line(columns, "th"), *(line(row, "td") for row in rows), "</table>"]))

    def figure(self, figure: Figure, alternative: str) -> None:
        """Embed a picture."""
        file = io.BytesIO()
        figure.savefig(file, format="png", facecolor=figure.get_facecolor())
        data = base64.b64encode(file.getvalue()).decode()
        self._parts.append(f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">')

    def html(self) -> str:
        """The page."""
        head = f"{_HEAD}<title>{self._title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        return head + "\n".join(self._parts) + "\n</body>\n</html>\n"
