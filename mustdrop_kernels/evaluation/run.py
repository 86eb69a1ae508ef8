# SPDX-License-Identifier: Apache-2.0
"""Runner of ``mustdrop eval``: every question, by every method.

All methods answer a batch of questions before the next batch: pictures are generated once, all methods have answered
the same questions after an interrupt, and a run continues where it stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..flops import LanguageModel
from ..integrations.transformers import drop_tokens
from .checkpoint import Checkpoint
from .datasets import Example, Questions
from .methods import FULL, Method, Sizes, Unreachable, make
from .results import Document, count
from .tower import SharedTower

Tell = Callable[[str, float], None]


def run(
    document: Document,
    subject: Checkpoint,
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
        questions: a data set.
        tell: takes the current step and the share of all that is done.
        keep: takes the document at intervals and at the end.
        batch: questions at a time.
        max_new_tokens: length of the answers.
        every_s: seconds between calls of `keep`.
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
        # Only whole batches are kept, so a cell has all of this batch or nothing.
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
    subject: Checkpoint,
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
            stage: dict[str, Any] = {} if method.stage is None else {"vision_stage": method.stage(seed)}
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
    cell["right"] += questions.scores([text.strip() for text in texts], examples)
    _count(cell, subject, inputs, report, len(examples))


def _count(cell: dict[str, Any], subject: Checkpoint, inputs: Any, report: Any, questions: int) -> None:
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
    slot_bytes = LanguageModel.of(subject.model.config).token_bytes(subject.model.dtype.itemsize)
    count(cell, layers, last=last, kv_bytes=slots * slot_bytes, text=text)
