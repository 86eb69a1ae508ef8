# SPDX-License-Identifier: Apache-2.0
"""Asks a model every question in every way that is compared, and keeps what came out in one JSON document.

Questions go by in batches, and every batch through all methods: pictures are made once, all methods have answered the
same questions whenever it stops, and where it stopped it goes on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cli.subject import Subject
from ..integrations.transformers import drop_tokens
from .datasets import Example, Questions
from .methods import FULL, Method, Sizes, Unreachable, make
from .tower import SharedTower

FORMAT = "mustdrop-eval-1"
Document = dict[str, Any]
Tell = Callable[[str, float], None]


def start(description: dict[str, Any], questions: Questions, cells: Sequence[tuple[str, float | None]]) -> Document:
    """An empty document.

    Args:
        description: what it is about: model, questions, seeds. Documents that differ in it do not continue each other.
        questions: what is asked.
        cells: methods and budgets.
    """
    return {
        "format": FORMAT,
        "about": description,
        "kinds": [example.kind for example in questions.examples],
        "truth": [e.answers[0].lower() == "yes" for e in questions.examples] if questions.yes_or_no else None,
        "machine": {},
        "cells": [_cell(method, budget) for method, budget in cells],
    }


def _cell(method: str, budget: float | None) -> dict[str, Any]:
    return {"method": method, "budget": budget, "why_not": None, "right": [], "seconds": 0.0, "tokens": [], "last": [],
            "kv_bytes": [], "processed": None, "text": 0.0}  # fmt: skip


def read(path: Path) -> Document:
    """A document that ``write`` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not a document of mustdrop eval ({FORMAT})")
    return document


def write(document: Document, path: Path) -> None:
    """As JSON, a line a cell; a stop in between leaves the last one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**document, "cells": None}, indent=1)
    cells = ",\n  ".join(json.dumps(cell, separators=(",", ":")) for cell in document["cells"])
    partial = path.with_suffix(".partial")
    partial.write_text(head.replace('"cells": null', f'"cells": [\n  {cells}\n ]') + "\n")
    partial.replace(path)


def resume(new: Document, path: Path) -> Document:
    """The document at `path` with the new one's cells added; the new one where there is none.

    Raises:
        ValueError: that document is about something else.
    """
    if not path.exists():
        return new
    old = read(path)
    if old["about"] != new["about"] or old["kinds"] != new["kinds"][: len(old["kinds"])]:
        raise ValueError(f"{path} is about other questions or another model: name another file")
    there = {(cell["method"], cell["budget"]): cell for cell in old["cells"]}
    asked = [(cell["method"], cell["budget"]) for cell in new["cells"]]
    cells = [there.pop(key, None) or _cell(*key) for key in asked]
    return {**old, "kinds": new["kinds"], "truth": new["truth"], "cells": [*cells, *there.values()]}


def run(
    document: Document,
    subject: Subject,
    questions: Questions,
    tell: Tell,
    keep: Callable[[Document], None],
    *,
    batch: int = 8,
    max_new_tokens: int = 4,
    every_s: float = 30.0,
) -> None:
    """Fills the document's cells.

    Args:
        document: of ``start`` or ``resume``.
        subject: the model.
        questions: what is asked.
        tell: is told what is being done, and what share is done.
        keep: is given the document now and then, and at the end.
        batch: questions at a time.
        max_new_tokens: length of the answers.
        every_s: how often to keep.
    """
    sizes = Sizes.of(subject.model.config)
    ready = {}
    for number, cell in enumerate(document["cells"]):
        try:
            ready[number] = make(cell["method"], cell["budget"], sizes)
        except Unreachable as reason:
            cell["why_not"] = str(reason)
    tower = SharedTower(subject.model.model.vision_tower)
    total, done = len(questions.examples), time.monotonic()
    for begin in range(0, total, batch):
        examples = questions.examples[begin : begin + batch]
        # Only whole batches are kept, so each cell has this batch or has not.
        missing = [n for n in ready if len(document["cells"][n]["right"]) < begin + len(examples)]
        if not missing:
            continue
        inputs = subject.batch([e.picture() for e in examples], [e.text for e in examples])
        tower.next_batch()
        for number in missing:
            cell = document["cells"][number]
            tell(f"{cell['method']} {cell['budget'] or ''}", begin / total)
            _ask(cell, ready[number], subject, tower, examples, questions, inputs, begin, max_new_tokens)
        if time.monotonic() - done > every_s:
            keep(document)
            done = time.monotonic()
    keep(document)


def _ask(
    cell: dict[str, Any],
    method: Method,
    subject: Subject,
    tower: SharedTower,
    examples: Sequence[Example],
    questions: Questions,
    inputs: Any,
    seed: int,
    max_new_tokens: int,
) -> None:
    """One batch by one method."""
    report = None
    with contextlib.ExitStack() as stack:
        if cell["method"] != FULL:
            stage = {} if method.stage is None else {"vision_stage": method.stage(seed)}
            report = stack.enter_context(drop_tokens(subject.model, method.config, **stage))
        stack.enter_context(torch.inference_mode())
        if method.leaves_tower:
            stack.enter_context(tower.shared())
        begin = time.perf_counter()
        sequences = subject.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        cell["seconds"] += time.perf_counter() - begin
        if method.leaves_tower and tower.spared:
            cell["seconds"] += tower.seconds
    texts = subject.processor.tokenizer.batch_decode(
        sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    scores = [questions.score(text.strip(), e.answers) for text, e in zip(texts, examples, strict=True)]
    cell["right"] += [int(score) if score in (0.0, 1.0) else round(score, 4) for score in scores]
    _count(cell, subject, inputs, report, len(examples))


def _count(cell: dict[str, Any], subject: Subject, inputs: Any, report: Any, questions: int) -> None:
    """Tokens and bytes of a question, one number a batch of questions."""
    depth = subject.model.config.text_config.num_hidden_layers
    real = int(inputs["attention_mask"].sum())
    if report is None:
        vision = int((inputs["input_ids"] == subject.model.config.image_token_id).sum())
        layers, last, evicts = [vision / questions] * depth, vision / questions, None
        text = (real - vision) / questions
    else:
        prompt = report.last
        layers = [tokens / questions for tokens in prompt.layer_tokens]
        final = [image.kept[max(image.kept)] if image.kept else image.tokens for image in prompt.images]
        last, evicts = sum(final) / questions, report.config.first_evicted_layer
        text = sum(prompt.text) / questions
    held = [n if evicts is None or i < evicts else last for i, n in enumerate(layers)]
    slots = sum(held) + text * depth
    before = len(cell["tokens"])
    cell["tokens"].append(round(sum(layers) / len(layers), 3))
    cell["last"].append(round(last, 3))
    cell["kv_bytes"].append(round(slots * _slot_bytes(subject)))
    old = cell["processed"] or [0.0] * len(layers)
    cell["processed"] = [round((a * before + b) / (before + 1), 3) for a, b in zip(old, layers, strict=True)]
    cell["text"] = round((cell["text"] * before + text) / (before + 1), 3)


def _slot_bytes(subject: Subject) -> int:
    """Keys and values of one token in one layer."""
    from ..flops import LanguageModel

    size = torch.empty(0, dtype=subject.model.dtype).element_size()
    return LanguageModel.of(subject.model.config).token_bytes(size)
