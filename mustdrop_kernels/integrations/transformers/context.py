# SPDX-License-Identifier: Apache-2.0
"""``drop_tokens``: the context in which a model drops vision tokens."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

from torch import nn

from ...config import MustDropConfig
from ...report import Report
from . import generating
from .eager import wrapped_modules
from .families import family_of
from .hooks import Hooks
from .session import FirstStage, Session
from .vision import VisionStage

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def drop_tokens(
    model: nn.Module,
    config: MustDropConfig | None = None,
    *,
    heat_maps: bool = False,
    vision_stage: FirstStage = VisionStage,
) -> Iterator[Report]:
    """Drops vision tokens of prompts with images within the context, by `config`, and restores the model after it.

    ``model.generate(**inputs)`` and ``model(**inputs)`` are called as usual, with the processor's plain inputs. The
    output of ``generate`` begins with the given ``input_ids``, all placeholders included, so slicing by the prompt's
    length and decoding work as without dropping. ``model(**inputs)`` returns the logits of the remaining tokens, padded
    on the left; the last one is the prompt's last token. Prompts without an image run unchanged.

    The cache that ``generate(return_dict_in_generate=True)`` returns can be continued inside a context, by one token or
    by a whole turn. One prompt is read at a time: do not share the model between threads.

    With ``cache_implementation="static"``, or a ``StaticCache`` as the cache, the remaining tokens move to the front of
    its buffers, and decoding can be compiled into one graph. Prompts with images run eagerly, compiled parts of the
    model included.

    Args:
        model: LLaVA-1.5, -NeXT, -NeXT-Video, -OneVision, Video-LLaVA, Qwen2.5-VL, InternVL (``families``).
        config: by default ``MustDropConfig()``.
        heat_maps: record the attention of the text in every layer, for pictures; costs time and memory.
        vision_stage: makes stage 1; another one than MustDrop's can be compared with it.

    Yields:
        A report, with an entry for each prompt that has been read.

    Raises:
        TypeError: the model is of another class.
        ValueError: the model does not support the config: it lacks pruning layers, its vision tower requires all
            patches, its language model has sliding windows.
        RuntimeError: the model is in such a context already, or is called inside a compiled function.
    """
    config = MustDropConfig() if config is None else config
    *wrappers, model = wrapped_modules(model)
    if model in _active:
        raise RuntimeError("drop_tokens is active on this model already")
    family = family_of(model)
    family.check(config)
    session = Session(family, config, heat_maps, vision_stage)
    hooks = Hooks(session)
    with contextlib.ExitStack() as stack:
        _active.add(model)
        stack.callback(_active.discard, model)
        hooks.install(stack, wrappers)
        generating.install(stack, hooks)
        yield session.report
