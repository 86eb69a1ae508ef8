# SPDX-License-Identifier: Apache-2.0
"""``drop_tokens``: the context in which a model drops vision tokens."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

from torch import nn

from ...config import MustDropConfig
from ...report import Report
from .calls import calls_of
from .families import family_of
from .generating import Generating
from .passes import Passes
from .session import FirstStage, Session
from .vision import VisionStage
from .wrappers import unwrap

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def drop_tokens(
    model: nn.Module,
    config: MustDropConfig | str | None = None,
    *,
    heat_maps: bool = False,
    vision_stage: FirstStage = VisionStage,
) -> Iterator[Report]:
    """Drops vision tokens of prompts with images within the context, by `config`, and restores the model after it.

    ``model.generate(**inputs)`` and ``model(**inputs)`` are called as usual, with the processor's plain inputs. The
    output of ``generate`` begins with the given ``input_ids``, all placeholders included, so slicing by the prompt's
    length and decoding work as without dropping. ``model(**inputs)`` returns the logits of the remaining tokens, padded
    on the left; the last one is the prompt's last token, and ``report.last.rows`` maps the prompt's positions to rows.
    Prompts without an image run unchanged.

    The cache that ``generate(return_dict_in_generate=True)`` returns can be continued inside a context, by one token or
    by a whole turn. Passes of several threads run one after the other. What was taken from the model inside the context
    and is called after it runs the model's own code.

    With ``cache_implementation="static"``, or a ``StaticCache`` as the cache, the remaining tokens move to the front of
    its buffers, and decoding can be compiled into one graph. Prompts with images run eagerly, compiled parts of the
    model included.

    Args:
        model: LLaVA-1.5, -NeXT, -NeXT-Video, -OneVision, Video-LLaVA, Qwen2.5-VL, InternVL (``families``), or what
            ``wrappers.unwrap`` finds one in: a compiled or PEFT model, a pipeline.
        config: by default ``MustDropConfig()``; the name of a preset is that preset at the model's depth, which merges
            features if patches cannot merge in the model's tower.
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
    wrappers, model = unwrap(model)
    family = family_of(model)
    if isinstance(config, str):
        config = family.preset(config)
    config = MustDropConfig() if config is None else config
    family.check(config)
    calls = calls_of(model)
    session = Session(family, config, calls, heat_maps, vision_stage)
    passes = Passes(session)
    with contextlib.ExitStack() as stack:
        with calls.lock:
            if model in _active:
                raise RuntimeError("drop_tokens is active on this model already")
            for _ in range(2):  # the second one completes what an interrupt in the first has left
                stack.callback(_close, model, session, passes)
            _active.add(model)
            passes.install(wrappers)
            Generating(passes).install()
        yield session.report


def _close(model: nn.Module, session: Session, passes: Passes) -> None:
    """Restores the model, after the pass that another thread may run."""
    with session.calls.lock:
        passes.close()
        session.lifetime.end()
        _active.discard(model)
