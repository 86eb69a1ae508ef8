# SPDX-License-Identifier: Apache-2.0
"""The page of ``mustdrop inspect``: all inside, all escaped, and a browser shows it without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.evaluation.checkpoint import made_question
from mustdrop_kernels.report.html import Page

NASTY = "<script>document.title = 'broken'</script> & \"what\"?"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory, mustdrop, checkpoint, picture) -> Path:
    out = tmp_path_factory.mktemp("page") / "of" / "page.html"
    words = ("--model", checkpoint, "--image", picture, "--prompt", NASTY, "--out", out)
    settings = ("--preset", "budget-64", "--set", "pruning_layers=[1, 3]", "--set", "budgets=[60, 20]")
    result = mustdrop("inspect", *words, *settings, "--set", "merge_budget=3", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout
    return out


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def test_all_is_inside_and_escaped(page):
    read = Reader(page.read_text(encoding="utf-8"))
    assert not [tag for tag, _ in read.tags if tag in ("script", "link", "iframe", "object")]
    sources = [value for _, attributes in read.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 2  # what was dropped and what was looked at
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"url\(|@import", page.read_text(encoding="utf-8"))
    assert NASTY in read.words
    assert "[60, 20]" in read.words
    assert "2 after layer 3" in read.words
    assert "Image 1" in read.words


def test_every_text_is_escaped():
    page = Page("<a>")
    page.heading("<b>")
    page.facts({"<c>": "<d>"})
    page.table(["<e>"], [["<f>"]])
    text = page.html()
    assert all(f"&lt;{letter}&gt;" in text and f"<{letter}>\n" not in text for letter in "abcdef")


@pytest.mark.skipif(BROWSER is None, reason="no browser (chromium) is installed")
def test_a_browser_shows_it_without_a_network(page, tmp_path):
    shown = tmp_path / "page.png"
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--no-first-run")
    network = "--host-resolver-rules=MAP * ~NOTFOUND"
    view = ("--window-size=1000,2400", "--hide-scrollbars", f"--screenshot={shown}")
    subprocess.run([BROWSER, *options, network, *view, page.as_uri()], capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(shown).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (2400, 1000)
    outline = np.abs(pixels - [0x00, 0xA9, 0xBD]).sum(-1) < 60  # of merged windows: the picture has been decoded
    assert outline.sum() > 100


def test_refusals(mustdrop, tmp_path, picture, checkpoint):
    for words, sentence in (
        (("--set", "window=three"), "must be a field of MustDropConfig, =, and JSON"),
        (("--set", "windows=[2, 2]"), "unexpected keyword argument 'windows'"),
        (("--preset", "none"), "there is no 'none'"),
        (("--model", tmp_path), "cannot be loaded"),
        (("--model", checkpoint, "--set", "merge_layer=3"), "merge_layer 3 must come before"),
        (("--image", tmp_path / "no.png"), "there is no file"),
    ):
        result = mustdrop("inspect", "--out", tmp_path / "page.html", *words)
        assert result.exit_code == 2
        assert sentence in result.stderr.replace("\n", " ")
        assert not (tmp_path / "page.html").exists()


def test_without_a_model_the_small_one_is_asked_what_fits_its_picture(mustdrop, tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "page.html"
    result = mustdrop("inspect", "--out", out, "--max-new-tokens", 1)
    assert result.exit_code == 0, result.output
    words = Reader(out.read_text(encoding="utf-8")).words
    _, credit, question, _ = made_question(0)
    assert credit in words
    assert question in words
    assert str(list(MustDropConfig.preset("small-64").budgets)) in words
