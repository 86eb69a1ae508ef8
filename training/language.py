# SPDX-License-Identifier: Apache-2.0
"""Training of the projector and the language model on questions, with a frozen vision tower.

About a dozen questions are packed behind one image: each attends to the image and itself, so the image is encoded once.
Images with few boxes come first, and all stages except the last use a subset of the patches, those with boxes and some
others, at their own positions. Two auxiliary losses fade out: a hint, the answer as target of every token from the word
on that determines the question, and an attention loss, which supervises half of the heads of four layers with the
patches that show the answer. Without them training stays for long at "some digit of the image"; since layers 2 to 5 of
12 are supervised, questions are resolved there and not in the first layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from loop import Stage
from model import EOS, PAD, tokenizer, tower
from torch import Tensor, nn
from tower import encode, patches
from transformers import AttentionInterface

from mustdrop_kernels.evaluation.pictures import BOXES, GRID, Scene, scene
from mustdrop_kernels.evaluation.questions import KINDS, Question, ask

_PREFIX = "user :"
_ONE_EACH = dict.fromkeys(KINDS, 1)
_EVEN = {kind: 2 for kind in KINDS}
_HARD = {**_EVEN, "digit at place": 3, "digit right of colour": 3, "presence": 1}


@dataclass(frozen=True)
class Lessons(Stage):
    """A stage of this training."""

    tokens: int = GRID * GRID  # per image
    hint: tuple[float, float] = (0.0, 0.0)  # weight of the hint at the begin and at the end of the stage
    look: tuple[float, float] = (0.0, 0.0)  # weight of the attention loss, likewise
    asked: Mapping[str, int] = field(default_factory=lambda: _HARD)  # questions per image, by kind
    boxes: tuple[int, int] = BOXES
    tilt: float = 10.0  # degrees
    pool: int | None = None  # number of images, reused with other questions; None: always new ones


RECIPE = [
    Lessons("few boxes", 400, 20, 1.5e-3, tokens=36, hint=(1.0, 1.0), look=(0.5, 0.5), final=0.8, warm_up=100,
            asked=_ONE_EACH, boxes=(2, 4), pool=2000),
    Lessons("more boxes", 300, 10, 1.5e-3, tokens=90, hint=(1.0, 0.8), look=(0.5, 0.5), final=0.7, asked=_EVEN,
            boxes=(4, 8), pool=1500),
    Lessons("all boxes", 700, 8, 1.2e-3, tokens=144, hint=(0.8, 0.1), look=(0.5, 0.1), final=0.5, pool=2000),
    Lessons("nothing is told", 300, 8, 8e-4, tokens=144, hint=(0.1, 0.0), look=(0.1, 0.0), final=0.4),
    Lessons("whole pictures", 200, 4, 4e-4, final=0.02, warm_up=10),
]  # fmt: skip

# Layers and heads with the attention loss: late enough for the words of a question to be combined.
_TOLD_LAYERS, _TOLD_HEADS = ((2, 3), (4, 5)), 2  # layers of the first step and of the second


class Looks:
    """Attention loss: targets of the question tokens' attention, and the loss to them."""

    def __init__(self, wanted: Sequence[Tensor]):  # for each step (B, T, L) bool, all False where there is no question
        self.wanted = wanted
        self.asking = wanted[0].any(-1)
        self.losses: list[Tensor] = []

    def add(self, layer: int, query: Tensor, key: Tensor, mask: Tensor, scale: float) -> None:
        """Record the negative logarithm of the attention on the target patches."""
        step = next((i for i, layers in enumerate(_TOLD_LAYERS) if layer in layers), None)
        if step is None:
            return
        scores = (query[:, :_TOLD_HEADS].float() @ key[:, :_TOLD_HEADS].float().transpose(2, 3)) * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        everywhere = scores.logsumexp(-1)
        there = scores.masked_fill(~self.wanted[step][:, None], -1e4).logsumexp(-1)
        self.losses.append((everywhere - there).mean(1)[self.asking].mean())

    def loss(self) -> Tensor:
        """Mean over all supervised layers."""
        return sum(self.losses, torch.zeros(())) / max(1, len(self.losses))


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, H, L, D)
    value: Tensor,  # (B, H, L, D)
    attention_mask: Tensor,  # (B, 1, T, L) bool: visible keys of the last T tokens, the text
    looks: Looks | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention that is causal in the image and masked in the questions after it."""
    head = query.shape[2] - attention_mask.shape[2]
    picture = F.scaled_dot_product_attention(query[:, :, :head], key[:, :, :head], value[:, :, :head], is_causal=True)
    text = F.scaled_dot_product_attention(query[:, :, head:], key, value, attn_mask=attention_mask)
    if looks is not None:
        looks.add(module.layer_idx, query[:, :, head:], key, attention_mask, module.scaling)
    return torch.cat([picture, text], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", packed_attention)


@dataclass
class Pack:
    """Packed questions about a batch of images."""

    ids: Tensor  # (B, T) int64
    places: Tensor  # (B, T) int64, within the question
    block: Tensor  # (B, T) int64, index of the question, -1: padding
    answer: Tensor  # (B, T) int64, next token, -100: no question
    hint: Tensor  # (B, T) int64, the answer, at the tokens that have the hint loss
    questions: list[list[Question]]


class Words:
    """Turns questions into tokens."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.prefix = self._ids(_PREFIX)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def pack(self, asked: list[list[Question]]) -> Pack:
        """One row per image."""
        rows = []
        for questions in asked:
            row: list[list[int]] = []
            for number, question in enumerate(questions):
                ids = self._ids(f"{question.text} assistant : {question.answer}")
                key = len(ids) - 1 - ids[::-1].index(self._ids(question.key)[0], 1)
                after = [-100] * (len(ids) - 2) + [ids[-1], EOS]
                told = [ids[-1] if key <= i < len(ids) - 2 else -100 for i in range(len(ids))]
                row += [list(each) for each in zip(ids, range(len(ids)), [number] * len(ids), after, told, strict=True)]
            rows.append(torch.tensor(row))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        ids, places, block, answer, hint = padded.unbind(2)
        return Pack(ids.clamp(min=0).where(ids >= 0, PAD), places.clamp(min=0), block, answer, hint, asked)


class LanguageTask:
    """Training task of projector and language model."""

    name = "language"

    def __init__(self, model: nn.Module, seed: int, stages: list[Lessons], validation: int = 30):
        self.module, self.seed, self.stages = model, seed, stages
        self.vision, self.words = tower(model), Words()
        self.language = model.model.language_model
        self.language.config._attn_implementation = "packed"
        self.vision.requires_grad_(False)
        self.pool: dict[tuple[tuple[int, int], float, int], tuple[Scene, Tensor]] = {}
        self.validation = []
        for i in range(validation):
            seen = scene("validation", seed, i)
            self.validation.append((seen, questions(seen, _EVEN, np.random.default_rng((seed, i, 3)))))

    def trained(self) -> Iterable[nn.Parameter]:
        """All parameters except the tower's."""
        return [weight for weight in self.module.parameters() if weight.requires_grad]

    def loss(self, stage: Lessons, first: int, done: float) -> Tensor:
        """Cross entropy of the answers and, at first, of the hints."""
        draw = np.random.default_rng((self.seed, first, 4))
        seen, features = self._pictures(stage, range(first, first + stage.pictures))
        pack = self.words.pack([questions(each, stage.asked, draw) for each in seen])
        at = torch.from_numpy(np.stack([_chosen(each, stage.tokens, draw) for each in seen]))
        hint, told = (begin + (end - begin) * done for begin, end in (stage.hint, stage.look))
        looks = Looks(self._wanted(seen, at, pack)) if told else None
        hidden = self.hidden(features, at, pack, looks)
        loss = self._entropy(hidden, pack.answer)
        if hint:
            loss = loss + hint * self._entropy(hidden, pack.hint)
        return loss if looks is None else loss + told * looks.loss()

    def _wanted(self, seen: list[Scene], at: Tensor, pack: Pack) -> list[Tensor]:  # (B, T, L) bool, twice
        """The patches that show the answer, for the tokens from the word on that determines the question.

        For questions about a box relative to another, the named box is the first step and the target the second.
        """
        first = len(self.words.prefix)
        shape = *pack.ids.shape, first + at.shape[1] + pack.ids.shape[1]
        wanted = [torch.zeros(shape, dtype=torch.bool) for _ in _TOLD_LAYERS]
        asking = (pack.hint >= 0) | ((pack.answer >= 0) & (pack.answer != EOS))
        for row, (each, asked) in enumerate(zip(seen, pack.questions, strict=True)):
            shown = [torch.from_numpy(box.coverage().reshape(-1) >= 0.4)[at[row]] for box in each.boxes]
            for number, question in enumerate(asked):
                mine = asking[row] & (pack.block[row] == number)
                for step, box in zip(wanted, question.boxes[:1] + question.boxes[-1:], strict=False):
                    step[row, mine, first : first + at.shape[1]] = shown[box]
        return wanted

    def _entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        asked = labels >= 0
        return F.cross_entropy(self.module.lm_head(hidden[asked]), labels[asked])

    def _pictures(self, stage: Lessons, numbers: range) -> tuple[list[Scene], Tensor]:
        """Scenes and their features (B, 576, width)."""
        if stage.pool is None:
            seen = [scene("train", self.seed + 1, i, stage.boxes, stage.tilt) for i in numbers]
            return seen, self.features(seen)
        keys = [(stage.boxes, stage.tilt, i % stage.pool) for i in numbers]
        missing = [key for key in keys if key not in self.pool]
        if missing:
            fresh = [scene("train", self.seed + 1, i, boxes, tilt) for boxes, tilt, i in missing]
            for key, each, feature in zip(missing, fresh, self.features(fresh), strict=True):
                self.pool[key] = Scene(np.empty(0), each.boxes, each.photograph), feature.half()
        found, features = zip(*(self.pool[key] for key in keys), strict=True)
        return list(found), torch.stack(features).float()

    @torch.no_grad()
    def features(self, seen: list[Scene]) -> Tensor:
        """Image features of the frozen tower, (B, 576, width)."""
        x = torch.stack([patches(each.pixels) for each in seen])
        whole = torch.arange(GRID * GRID).expand(len(seen), -1)
        return encode(self.vision, x, whole, last=False)[-1][:, 1:]

    def hidden(self, features: Tensor, at: Tensor, pack: Pack, looks: Looks | None = None) -> Tensor:
        """Last hidden states of the text, (B, T, width), given the image tokens `at` (B, N)."""
        features = features.gather(1, at[..., None].expand(-1, -1, features.shape[2]))
        embed = self.language.embed_tokens
        prefix = embed(torch.tensor(self.words.prefix)).expand(len(at), -1, -1)
        picture = self.module.model.multi_modal_projector(features)
        x = torch.cat([prefix, picture, embed(pack.ids)], dim=1)
        head, text = x.shape[1] - pack.ids.shape[1], pack.ids.shape[1]
        begin = torch.arange(len(self.words.prefix)).expand(len(at), -1)
        places = torch.cat([begin, begin.shape[1] + at, begin.shape[1] + GRID * GRID + pack.places], dim=1)
        own = (pack.block[:, :, None] == pack.block[:, None]) & torch.ones(text, text, dtype=torch.bool).tril()
        mask = torch.cat([torch.ones(len(at), text, head, dtype=torch.bool), own], dim=2)[:, None]
        rotary = self.language.rotary_emb(x, position_ids=places)
        for layer in self.language.layers:
            x = layer(x, attention_mask=mask, position_embeddings=rotary, looks=looks)
        return self.language.norm(x[:, head:])

    def validate(self) -> dict[str, float]:
        """Accuracy by kind, with all image tokens."""
        right, total = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for begin in range(0, len(self.validation), 5):
            seen, asked = map(list, zip(*self.validation[begin : begin + 5], strict=True))
            pack = self.words.pack(asked)
            at = torch.arange(GRID * GRID).expand(len(seen), -1)
            hidden = self.hidden(self.features(seen), at, pack)
            last = (pack.answer >= 0) & (pack.answer != EOS)
            hit = self.module.lm_head(hidden[last]).argmax(-1) == pack.answer[last]
            for kind, good in zip((q.kind for row in asked for q in row), hit.tolist(), strict=True):
                right[kind] += good
                total[kind] += 1
        shares = {kind: right[kind] / max(1, total[kind]) for kind in KINDS}
        return {**shares, "all": sum(shares.values()) / len(shares)}


def questions(seen: Scene, asked: Mapping[str, int], draw: np.random.Generator) -> list[Question]:
    """The given number of questions of each kind, if the scene has an answer."""
    found = [ask(seen, kind, draw) for kind, count in asked.items() for _ in range(count)]
    return [question for question in found if question is not None]


def _chosen(seen: Scene, tokens: int, draw: np.random.Generator) -> np.ndarray:
    """Indices of patches: those that show boxes, then random others."""
    share = np.max([box.coverage().reshape(-1) for box in seen.boxes], axis=0)
    first = (share >= 0.25) + draw.random(share.shape)
    return np.sort(np.argsort(-first)[:tokens])
