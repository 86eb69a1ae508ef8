# SPDX-License-Identifier: Apache-2.0
"""MustDropConfig: layers, thresholds, budgets and positions of the method, validated at construction."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

POSITIONS = ("original", "published")
MERGE_AT = ("tower", "features")
TEXT_QUERIES = ("after_image", "last")
_MAX_INTEGER, _MAX_FLOAT = 2**31 - 1, 3.4e38  # of the operators' arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class MustDropConfig:
    """Settings of the three stages of MustDrop (arXiv 2411.10803). The defaults are the published ones (preset "192").

    Stage 1, in the vision tower: similar patches of a window merge into one token, and the tokens that the CLS token
    attends to most become key tokens, which no later stage drops.

    Stage 2, in the language model: after each layer of ``pruning_layers`` the vision tokens that the text attends to
    least are dropped, either by two thresholds or down to a fixed number.

    Stage 3, before decoding: the KV cache of earlier layers, written before the later drops, is cut to the surviving
    tokens.

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    merge: bool = True
    """Merge similar patches. If False every patch is a token of its own."""
    merge_layer: int = 0
    """The vision layer, from 0, whose output is merged."""
    merge_at: str = "tower"
    """Place of merging: "tower", inside the vision tower, so that its later layers process fewer tokens, or "features",
    the features for the language model: for towers that require all patches, and for videos, whose windows can span
    frames."""
    window: tuple[int, ...] = (3, 3)
    """Height and width of a merge window in patches. With merge_at="features", three numbers are frames, height and
    width of a window in a video; images use the last two."""
    merge_threshold: float = 0.8
    """A window merges if the mean cosine similarity of its patches is at least this."""
    merge_budget: int | float | None = None
    """Merge the most similar windows of each image instead of using the threshold: this many (int), or this share of
    the image's whole windows (float, from 0 to 1, rounded). Images with fewer whole windows merge all of them; windows
    that the border of the grid cuts off do not merge."""
    merge_uniform: bool = False
    """Merge as many windows in every image of a batch as in the image with the fewest, as the published code does."""
    key_rate: float = 0.08
    """Share of an image's tokens after merging that become key tokens, rounded up. 0: none."""

    pruning_layers: tuple[int, ...] = (2, 6, 10, 14)
    """The language layers, from 0 and ascending, after which tokens are dropped."""
    global_threshold: float = 0.001
    """A token is dropped only if its share of the attention of the text to all vision tokens is below this value ..."""
    individual_threshold: float = 0.001
    """... and its attention from every single text query is below this value."""
    budgets: tuple[int, ...] | None = None
    """Keep this many vision tokens of a sequence after each pruning layer, all its images together, instead of using
    the thresholds. Key tokens are kept even beyond the budget."""
    text_queries: str = "after_image"
    """The text queries, whose attention scores the vision tokens: "after_image", all text after the last image of the
    sequence, or "last", its last token, whatever it is: a vision token that is the query is kept beyond the budget. A
    sequence without text queries, which ends with its image, keeps all of its vision tokens."""

    evict: bool = True
    """Cut the KV cache of earlier layers to the final survivors."""
    evict_from: int | None = None
    """The first layer whose cache is cut. By default the first pruning layer: layers before it keep every token."""
    positions: str = "original"
    """"original": a token keeps its RoPE position in the plain prompt, a merged token that of its window's first patch,
    and decoding continues from the plain prompt's length. "published": positions are renumbered 0, 1, 2, ... after
    merging and after each drop, and in decoding each layer continues from its own cache length; only for reproducing
    published figures, since positions of queries and keys then differ between layers."""
    backend: str | None = None
    """Name of an explicit backend. By default the one that serves each operator on the device."""

    def __post_init__(self) -> None:
        for name in ("merge", "merge_uniform", "evict"):
            self._require(isinstance(getattr(self, name), bool), name, "True or False")
        self._integer("merge_layer", minimum=0)
        self._integers("window", minimum=1)
        self._require(self.merge_at in MERGE_AT, "merge_at", f"one of {MERGE_AT}")
        if self.merge_at == "tower":
            self._require(len(self.window) == 2, "window", "two numbers, height and width")
        else:
            self._require(len(self.window) in (2, 3), "window", "two numbers, height and width, or frames before them")
            self._require(not self.merge_uniform, "merge_uniform", "False where merge_at is 'features'")
        self._require(math.prod(self.window) > 1 or not self.merge, "window", "of more than one patch")
        self._number("merge_threshold", -1.0, 1.0)
        if self.merge_budget is not None:
            if isinstance(self.merge_budget, float):
                self._number("merge_budget", 0.0, 1.0)
            else:
                self._integer("merge_budget", minimum=0)
            self._require(not self.merge_uniform, "merge_uniform", "False where merge_budget is given")
        self._number("key_rate", 0.0, 1.0)

        self._integers("pruning_layers", minimum=0)
        ascending = all(a < b for a, b in itertools.pairwise(self.pruning_layers))
        self._require(ascending, "pruning_layers", "strictly ascending")
        self._number("global_threshold", 0.0, math.inf)
        self._number("individual_threshold", 0.0, math.inf)
        if self.budgets is not None:
            self._integers("budgets", minimum=0)
            layers = len(self.pruning_layers)
            self._require(len(self.budgets) == layers, "budgets", f"one number per pruning layer ({layers})")
            falling = all(a >= b for a, b in itertools.pairwise(self.budgets))
            self._require(falling, "budgets", "falling: dropped tokens do not come back")
        self._require(self.text_queries in TEXT_QUERIES, "text_queries", f"one of {TEXT_QUERIES}")

        if self.evict_from is not None:
            self._integer("evict_from", minimum=0)
        self._require(self.positions in POSITIONS, "positions", f"one of {POSITIONS}")
        named = self.backend is None or isinstance(self.backend, str)
        self._require(named, "backend", "a backend's name or None")

    def _require(self, condition: bool, name: str, requirement: str) -> None:
        if not condition:
            raise ValueError(f"MustDropConfig: {name} must be {requirement}, got {getattr(self, name)!r}")

    def _integer(self, name: str, minimum: int) -> None:
        self._require(_is_integer(getattr(self, name), minimum), name, f"an integer of at least {minimum}")

    def _integers(self, name: str, minimum: int) -> None:
        """Checks a tuple of integers; converts a list, as in JSON, to a tuple."""
        value = getattr(self, name)
        valid = isinstance(value, (list, tuple)) and all(_is_integer(item, minimum) for item in value)
        self._require(valid, name, f"a tuple of integers of at least {minimum}")
        object.__setattr__(self, name, tuple(value))

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        self._require(number and low <= value <= min(high, _MAX_FLOAT), name, f"a number {bound}")

    @property
    def merges_in_tower(self) -> bool:
        """Whether patches merge inside the vision tower."""
        return self.merge and self.merge_at == "tower"

    @property
    def drops_nothing(self) -> bool:
        """Whether no token can be merged or dropped, whatever the prompt: preset "keep-all"."""
        never = self.budgets is None and 0.0 in (self.global_threshold, self.individual_threshold)
        return not self.merge and (never or not self.pruning_layers)

    @property
    def needs_vision_stage(self) -> bool:
        """Whether stage 1 runs inside the vision tower, to merge patches or to select key tokens."""
        return self.merges_in_tower or self.key_rate > 0

    def merged_windows(self, windows: int) -> int:
        """The number of windows that ``merge_budget`` merges in an image of this many whole windows."""
        budget = self.merge_budget or 0
        return round(budget * windows) if isinstance(budget, float) else min(budget, windows)

    @property
    def first_evicted_layer(self) -> int | None:
        """The first layer whose cache stage 3 cuts; None if there is none."""
        if not self.evict or not self.pruning_layers:
            return None
        return self.pruning_layers[0] if self.evict_from is None else self.evict_from

    def for_depth(self, num_layers: int) -> MustDropConfig:
        """This config without the pruning layers, and their budgets, beyond the depth of a model of `num_layers`."""
        layers = tuple(layer for layer in self.pruning_layers if layer < num_layers)
        budgets = None if self.budgets is None else self.budgets[: len(layers)]
        return dataclasses.replace(self, pruning_layers=layers, budgets=budgets)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MustDropConfig:
        """A config from the result of `to_dict`, or from part of it.

        Raises:
            ValueError: a field is unknown or invalid.
        """
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"MustDropConfig: unknown field(s) {', '.join(unknown)}")
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MustDropConfig:
        """A named config, with single fields changed: ``MustDropConfig.preset("64", positions="published")``.

        Raises:
            ValueError: the name is unknown or a field is invalid.
        """
        if not isinstance(name, str) or name not in _PRESETS:
            raise ValueError(f"MustDropConfig: no preset {name!r}; there are {', '.join(_PRESETS)}")
        return cls(**{**_PRESETS[name], **changes})

    @classmethod
    def presets(cls) -> dict[str, MustDropConfig]:
        """All presets by name.

        "192", "128", "64" and "64-strict" hold the published thresholds, named after the number of vision tokens
        that they keep on average over the layers of LLaVA-1.5-7B. "budget-192", "budget-128" and "budget-64" keep
        exactly that average there (576 patches, 32 layers) with fixed counts at every step, so all shapes are known
        beforehand. "small-64" is for the small model of ``mustdrop demo``, which has 12 layers. "keep-all" scores at
        every pruning layer and drops nothing.
        """
        return {name: cls.preset(name) for name in _PRESETS}


_PRESETS: dict[str, dict[str, Any]] = {
    "192": dict(global_threshold=0.001, individual_threshold=0.001),
    "128": dict(global_threshold=0.0012, individual_threshold=0.001),
    "64": dict(global_threshold=0.011, individual_threshold=0.01),
    "64-strict": dict(global_threshold=0.005, individual_threshold=0.001),
    # r of LLaVA-1.5's 64 windows of 9 patches merge: 3 layers see 576 - 8 r tokens, 4 each of the first three budgets,
    # 17 the last one.
    "budget-192": dict(merge_budget=32 / 64, budgets=(272, 228, 184, 144)),
    "budget-128": dict(merge_budget=40 / 64, budgets=(200, 164, 128, 80)),
    "budget-64": dict(merge_budget=56 / 64, budgets=(108, 82, 56, 40)),
    # For 12 layers: mustdrop_kernels.evaluation.methods.mustdrop.read.
    "small-64": dict(merge_budget=40 / 64, pruning_layers=(0, 2, 5), budgets=(106, 84, 8), key_rate=0.0),
    "keep-all": dict(merge=False, key_rate=0.0, global_threshold=0.0, individual_threshold=0.0),
}


def _is_integer(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= _MAX_INTEGER
