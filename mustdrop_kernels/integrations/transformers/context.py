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
    """Within the context, prompts with images lose vision tokens as `config` says; the model is not changed for good.

    ``model.generate(**inputs)`` and ``model(**inputs)`` are called as ever, on the processor's plain inputs. What
    ``generate`` returns begins with the ``input_ids`` that were given, all placeholders included, so slicing by the
    prompt's length and decoding work as without dropping. ``model(**inputs)`` returns logits of the tokens that are
    left, padded on the left; the last one is the prompt's last token. Prompts without an image, and everything after
    the context, run as if it had never been there.

    The cache that ``generate(return_dict_in_generate=True)`` returns can be continued inside a context with more text,
    by a whole turn as by one token. One prompt is read at a time: do not share the model between threads.

    With ``cache_implementation="static"``, or a ``StaticCache`` as the cache, survivors move to the front of its
    buffers, and decoding can be compiled into one graph. A prompt with images is read outside of compiled code: what
    was compiled of the model, or all of it, runs uncompiled then.

    Args:
        model: LLaVA-1.5, -NeXT, -NeXT-Video, -OneVision, Video-LLaVA, Qwen2.5-VL, InternVL (``families``).
        config: by default ``MustDropConfig()``.
        heat_maps: record what the text looks at in every layer, for pictures; costs time and memory.
        vision_stage: makes stage 1, where another one than MustDrop's is to be compared with it.

    Yields:
        A report that fills up with each prompt.

    Raises:
        TypeError: a model of another class.
        ValueError: the config asks for what the model cannot do: layers that it does not have, merging in a vision
            tower that needs all its patches, a language model with sliding windows.
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
