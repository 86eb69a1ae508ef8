# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in: LLaVA that drops vision tokens inside an unmodified vLLM.

vLLM finds ``register`` by the entry point group ``vllm.general_plugins`` and calls it in each of its processes. It is
switched on for one model by ``hf_overrides``, for every LLaVA by the environment variable ``MUSTDROP_VLLM``::

    LLM(model, hf_overrides={"architectures": ["MustDropLlavaForConditionalGeneration"],
                             "mustdrop": {"merge": False, "key_rate": 0.0, "pruning_layers": [2], "budgets": [64]}})

plugin.py registers the models; settings.py reads and checks the settings; engine.py configures the engine; scheduler.py
and blocks.py run in the engine core; worker.py, model.py, dropping.py, tower.py, vision.py, anyres.py, key_tokens.py,
batch.py, prefill.py, metadata.py and adapters.py where the model is; images.py in both; beams.py marks requests of beam
search before they are sent. The number of tokens that a prompt has lost reaches the scheduler with the step's output.
"""

from .plugin import register

__all__ = ["register"]
