# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in: LLaVA that drops vision tokens inside an unmodified vLLM.

vLLM finds ``register`` by the entry point group ``vllm.general_plugins`` and calls it in each of its processes. It is
switched on for one model by ``hf_overrides``, for every LLaVA by the environment variable ``MUSTDROP_VLLM``::

    LLM(model, hf_overrides={"architectures": ["MustDropLlavaForConditionalGeneration"],
                             "mustdrop": {"merge": False, "key_rate": 0.0, "pruning_layers": [2], "budgets": [64]}})

plugin.py registers; settings.py reads and checks what was asked for; engine.py sets the engine up; scheduler.py and
blocks.py in the engine core; worker.py, model.py, dropping.py, tower.py, vision.py, anyres.py, keys.py, batch.py,
prefill.py and pages.py where the model is. How many tokens a prompt lost travels with the step's output from there to
the scheduler.
"""

from .plugin import register

__all__ = ["register"]
