# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in: LLaVA that drops vision tokens inside an unmodified vLLM.

vLLM finds ``register`` by the entry point group ``vllm.general_plugins`` and calls it in each of its processes. It is
switched on for one model by ``hf_overrides``, for every LLaVA by the environment variable ``MUSTDROP_VLLM``::

    LLM(model, hf_overrides={"architectures": ["MustDropLlavaForConditionalGeneration"],
                             "mustdrop": {"merge": False, "key_rate": 0.0, "pruning_layers": [2], "budgets": [64]}})

plugin.py registers the models; versions.py states the supported versions of vLLM; settings.py reads and checks the
settings; engine.py configures the engine.

Before the engine: inputs.py and beams.py check and mark requests. In the engine core: scheduler.py and blocks.py;
requests.py is what the scheduler decides about a request, reports.py what the workers report to it. Where the model is:
runner_v1.py and runner_v2.py turn the steps of vLLM's two model runners into a Step (step.py), dropping.py and
prefill.py run it, attention/ has a file for each of vLLM's attention backends, layout.py builds what these require,
record.py counts dropped tokens, adapters.py lays out LoRA, eager_kernels.py enables vLLM's kernels; model.py, tower.py,
vision.py, anyres.py and key_tokens.py are stage 1. images.py reads a request's features, in all of them.
"""

from .plugin import register

__all__ = ["register"]
