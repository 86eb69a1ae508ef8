# SPDX-License-Identifier: Apache-2.0
"""Scores of answers, as each data set's own scorer computes them, and intervals of shares."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

# --------------------------------------------------------------------------------------------------------- answers

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMBER_WORDS.split())}}
_ARTICLES = {"a", "an", "the"}
# Contractions that are often written without the apostrophe and are no other words.
_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how's i've isn't it's mightn't "
    "mustn't she's shouldn't that's there's they'd they're they've wasn't we've weren't what's where's who's won't "
    "wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_PUNCTUATION = re.compile(r'[;/\[\]"{}()=+\\_\-><@`?!]')
_LONE_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")


def normalized(answer: str) -> str:
    """Normalize as the VQA evaluation: lower case, no punctuation or articles, digits for numbers, apostrophes back."""
    text = answer.replace("\n", " ").replace("\t", " ").strip().lower()
    text = _COMMA_IN_NUMBER.sub("", text)
    text = _PUNCTUATION.sub(" ", text).replace(",", " ")
    text = _LONE_STOP.sub("", text)
    words = (_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (TextVQA): min(1, agreeing people / 3), averaged over leaving out one person each time."""
    given = normalized(prediction)
    agree = [normalized(answer) == given for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    return sum(min(1.0, (sum(agree) - one) / 3) for one in agree) / len(agree)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """GQA: equality with the right answer, ignoring case and a final full stop."""
    return float(prediction.strip().rstrip(".").lower() == answers[0].strip().lower())


def says_yes(prediction: str) -> bool:
    """POPE: an answer is "yes" if its first sentence has neither "no" nor "not"."""
    words = prediction.split(".")[0].replace(",", "").lower().split()
    return "no" not in words and "not" not in words


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """POPE."""
    return float(says_yes(prediction) == (answers[0].strip().lower() == "yes"))


def f1(right: Sequence[float], truth: Sequence[bool]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and the share of "yes", from the correctness of the answers."""
    said = [yes if good else not yes for good, yes in zip(right, truth, strict=True)]
    hits = sum(a and b for a, b in zip(said, truth, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(truth))
    both = precision + recall
    return {
        "precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0,
        "yes": sum(said) / max(1, len(said)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- intervals


def interval(right: Sequence[float]) -> tuple[float, float]:
    """95% confidence of a mean: Wilson's where answers are right or wrong, else the normal approximation."""
    n = len(right)
    if not n:
        return 0.0, 1.0
    mean, z = sum(right) / n, 1.959964
    if set(right) <= {0.0, 1.0}:
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
    half = z * float(np.std(right, ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    return max(0.0, mean - half), min(1.0, mean + half)


def paired(ours: Sequence[float], theirs: Sequence[float], rounds: int = 4000) -> tuple[float, float, float]:
    """Mean difference on the same questions and its 95% interval, by a seeded bootstrap over questions."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if not difference.size:
        return 0.0, -1.0, 1.0
    draw = np.random.default_rng(0)
    # Differences of 0/1 scores take few values, so that a resample is a multinomial draw of their counts.
    values, counts = np.unique(difference, return_counts=True)
    means = draw.multinomial(difference.size, counts / difference.size, size=rounds) @ values / difference.size
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)
