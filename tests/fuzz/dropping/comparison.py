# SPDX-License-Identifier: Apache-2.0
"""Comparison of a case with the plain model, or with the masked reference."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from masked_reference import MaskedReference
from tiny_models import IMAGE, VIDEO
from torch import Tensor

from ..inputs import Case
from .calls import (
    TURN,
    attempt,
    copies,
    generate_settings,
    next_turn,
    rows_of_logits,
    same_bits,
    text_before,
    turn_places,
)
from .inputs import Inputs, Pictures, config_of, has_pictures, model_of, pictures_of

NEAR = 1e-5
"""Relative distance between a decision of the reference and the opposite one within which a case is not compared."""
CLOSE = {"atol": 1e-4, "rtol": 0.0}


class Expected:
    """A turn of the masked reference."""

    def __init__(self, case: Case, reference: MaskedReference, inputs: Inputs, dense: Tensor | None = None) -> None:
        if case["call"] == "generate":
            torch.manual_seed(0)
            settings = generate_settings(case)
            tokens, self.logits = reference.generate(inputs, settings.pop("max_new_tokens"), **settings)
            self.tokens, self.scores = tokens, reference.scores
        else:
            self.logits = reference.read(inputs, dense)
        self.ids, self.mask = (inputs[name][:, reference.offset :] for name in ("input_ids", "attention_mask"))
        self.mask = self.mask.bool()
        self.left = reference.alive[-1] & self.mask
        self.vision = (self.ids == IMAGE) | (self.ids == VIDEO)
        own = [alive & reference.vision for alive in reference.alive[1:]]
        self.counted = [~self.mask, reference.tokens, reference.key, *(own[i] for i in reference.config.pruning_layers)]

    def images(self, pictures: Pictures, times: int) -> list[list[int]]:
        """The report of each picture, of which each sequence of the batch has so many."""
        rows = sorted({row for row, _ in pictures})
        order = [(row, time, own) for row in rows for time in range(times) for r, own in pictures if r == row]
        return [[row * times + time, *(int(x[row, own].sum()) for x in self.counted)] for row, time, own in order]

    def text(self, begin: int) -> list[int]:
        """Text tokens of each sequence."""
        return (self.mask & ~self.vision)[:, begin:].sum(1).tolist()


def _reference(case: Case, first: Inputs, second: Inputs) -> tuple[list[Expected], float]:
    """The turns of the masked reference, and the smallest relative distance of its decisions from others."""
    model = model_of(case)
    first, reference = dict(first), MaskedReference(model, config_of(case))
    dense = first.pop("dense", None)
    first.pop("labels", None)
    model.model.rope_deltas = first.pop("rope_deltas", None)
    found = [Expected(case, reference, first, dense)]
    if "turn" in case and case["call"] == "generate":
        found.append(Expected(case, reference, next_turn(first, second, reference.sequences)))
    elif "turn" in case:
        turn = next_turn(first, second, first["input_ids"])
        turn["position_ids"] = turn_places(turn, second["input_ids"].shape[1], case)
        found.append(Expected(case, reference, turn))
    margin = reference.margin
    if case["call"] == "generate" and case.get("beams", 1) == 1 and not case.get("sample"):
        for expected in found:
            for row in expected.logits.index_fill(2, torch.tensor([IMAGE, VIDEO]), -math.inf).flatten(0, 1):
                margin.best(row.topk(2).values.tolist(), 1)
    return found, margin.smallest


def check(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    """Compare with the plain model or with the masked reference. True: a decision of the reference is too close."""
    first, second = arguments["first"], arguments["second"]

    def plain() -> list[Tensor]:
        if "plain" not in memo:
            memo["plain"] = attempt(case, first, second, contextlib.nullcontext)
        return memo["plain"]

    raised = _sentence(answer)
    if raised is not None and (wanted := _sentence(plain())) is not None:
        same = raised.split(":")[0] == wanted.split(":")[0] or not config_of(case).drops_nothing
        assert same, f"raised {raised}; the plain model: {wanted}"
        return False
    if config_of(case).drops_nothing or (not has_pictures(case["rows"]) and not has_pictures(case.get("turn", []))):
        assert raised is None, f"raised {raised}"
        wanted = _sentence(plain())
        assert wanted is None, f"raised nothing; the plain model: {wanted}"
        for number, (ours, theirs) in enumerate(zip(_by_turn(answer), _by_turn(plain()), strict=True)):
            for name in ("sequences", "logits", "score"):
                assert same_bits(ours[name], theirs[name]), f"turn {number}: other {name} than those of the plain model"
        return False
    if "expected" not in memo:
        memo["expected"], memo["margin"] = _reference(case, first, second)
    if memo["margin"] < NEAR:
        return True
    expected = memo["expected"]
    seen = text_before(case, first) if case["cache"] == "text" else 0
    if case.get("rows_of_logits") not in (None, "all", "labels"):
        places = _kept_places(case, expected[0].ids.shape[1] - seen) + seen
        if (expected[0].mask & ~expected[0].left).gather(1, places).any():
            assert raised is not None, "a position of logits_to_keep was dropped, and nothing is raised"
            assert "was dropped; report.last.rows maps" in raised, f"raised {raised}"
            return False
    assert raised is None, f"raised {raised}"
    for number, (turn, parts) in enumerate(zip(expected, _by_turn(answer), strict=True)):
        try:
            if case["call"] == "generate":
                _compare_generated(case, turn, parts)
            else:
                _compare_read(case, turn, parts, seen if number == 0 else 0, first.get("labels"), number)
            if pictures := pictures_of(case, number):
                _compare_reports(case, turn, parts, pictures, seen if number == 0 else 0)
        except AssertionError as error:
            raise AssertionError(f"turn {number}: {error}") from None
    return False


def _sentence(answer: list[Tensor]) -> str | None:
    """What a call has raised."""
    return bytes(answer[0].tolist()).decode() if len(answer) == 1 else None


def _by_turn(answer: list[Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each turn by name."""
    begins = range(0, len(answer), len(TURN))
    return [dict(zip(TURN, answer[begin : begin + len(TURN)], strict=True)) for begin in begins]


def _kept_places(case: Case, length: int) -> Tensor:
    """(B, n): the positions of logits_to_keep."""
    rows = case["rows_of_logits"]
    place = torch.arange(length)
    place = place[-rows:] if isinstance(rows, int) else place[torch.tensor(rows_of_logits(case))]
    return place.expand(len(case["rows"]), -1)


def _compare_generated(case: Case, turn: Expected, parts: dict[str, Tensor]) -> None:
    tokens = parts["sequences"][:, -turn.tokens.shape[1] :]
    if case.get("beams", 1) > 1:
        torch.testing.assert_close(parts["score"], turn.scores, **CLOSE, msg="other scores of beams")
    assert torch.equal(tokens, turn.tokens), f"generated {tokens.tolist()}, not {turn.tokens.tolist()}"
    torch.testing.assert_close(parts["logits"], turn.logits, **CLOSE, msg=lambda text: f"logits: {text}")


def _compare_read(
    case: Case, turn: Expected, parts: dict[str, Tensor], seen: int, labels: Tensor | None, number: int
) -> None:
    """Logits of what is left, and their loss."""
    logits, rows = parts["logits"], parts["rows"]
    mask, left, wanted = turn.mask[:, seen:], turn.left[:, seen:], turn.logits[:, seen:]
    if not rows.numel():  # a turn of text
        rows = torch.arange(mask.shape[1]).expand_as(mask)
    assert torch.equal((rows >= 0)[mask], left[mask]), "other tokens are left"
    sequence, place = left.nonzero(as_tuple=True)
    if number == 0 and case["rows_of_logits"] not in ("all", "labels"):
        places = _kept_places(case, mask.shape[1])
        sequence, column = left.gather(1, places).nonzero(as_tuple=True)
        ours, place = logits[sequence, column], places[sequence, column]
    else:
        ours = logits[sequence, rows[sequence, place]]
    torch.testing.assert_close(ours, wanted[sequence, place], **CLOSE, msg=lambda text: f"logits: {text}")
    if number == 0 and labels is not None:
        labels, text = labels[:, seen:], ~turn.vision[:, seen:]
        pairs = [
            (row, before, after)
            for row in range(len(left))
            for before, after in zip(*(left[row].nonzero().flatten().tolist()[i:] for i in (0, 1)), strict=False)
            if text[row, after] and labels[row, after] >= 0
        ]
        rows, before, after = torch.tensor(pairs, dtype=torch.long).view(-1, 3).unbind(1)
        loss = torch.nn.functional.cross_entropy(wanted[rows, before], labels[rows, after])
        torch.testing.assert_close(parts["score"], loss, **CLOSE, equal_nan=True, msg=lambda text: f"loss: {text}")


def _compare_reports(case: Case, turn: Expected, parts: dict[str, Tensor], pictures: Pictures, seen: int) -> None:
    times = copies(case)
    wanted = turn.images(pictures, times)
    assert parts["images"].tolist() == wanted, f"reported {parts['images'].tolist()}, not {wanted}"
    text = [count for count in turn.text(seen) for _ in range(times)]
    assert parts["text"].tolist() == text, f"reported {parts['text'].tolist()} text tokens, not {text}"
    left = turn.left[:, seen:].repeat_interleave(times, 0)
    mask = turn.mask[:, seen:].repeat_interleave(times, 0)
    assert torch.equal((parts["rows"] >= 0)[mask], left[mask]), "other rows are reported"
