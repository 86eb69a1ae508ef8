# SPDX-License-Identifier: Apache-2.0
"""Reference without shortening: the whole prompt passes through every layer, and dropped tokens are masked.

Written apart from the package, in loops, with decisions of its own. Positions are the plain prompt's.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch
from reference_vision import Margin, encode
from torch import Tensor
from transformers import AttentionInterface

from mustdrop_kernels.config import MustDropConfig

_running: list[MaskedReference] = []


class MaskedReference:
    """``generate`` with the language model's attention replaced; ``alive[layer]`` is what that layer's tokens see."""

    def __init__(self, model, config: MustDropConfig) -> None:
        self.model, self.config = model, config
        self.before: list[Tensor] = []  # per layer, (B, past) bool: what is seen of earlier turns
        self.mask: Tensor | None = None  # (B, 1, L, L) bool or added to the scores, in place of the causal one
        self.cache = None
        self.margin = Margin()  # of the decisions of all stages

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], new_tokens: int, **settings) -> tuple[Tensor, Tensor]:
        """New tokens (B, new_tokens) and their logits (B, new_tokens, V). A second call is the next turn."""
        if self.cache is not None:
            settings["past_key_values"] = self.cache
        with self._replacing(inputs):
            output = self.model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
                **{"do_sample": False, **settings},
            )
        length = inputs["input_ids"].shape[1]
        self.sequences, self.scores = output.sequences, output.get("sequences_scores")
        self._remember(output)
        return output.sequences[:, length:], torch.stack(output.logits, 1)

    def check(self, output, inputs: dict[str, Tensor], new_tokens: int, **settings) -> None:
        """The new tokens and logits of generate() are those that this reference generates for the same inputs."""
        tokens, logits = self.generate(inputs, new_tokens, **settings)
        assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], tokens)
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=1e-4, rtol=0)

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Logits (B, new, V) of one forward pass, with a mask (B, 1, L, L). A second call is the next turn.

        ``input_ids`` and ``attention_mask`` are those of all turns, ``position_ids`` those of the new tokens.
        """
        self.mask = mask
        with self._replacing(inputs):
            new = {**inputs, "input_ids": inputs["input_ids"][:, self.offset :]}
            output = self.model(**new, past_key_values=self.cache, use_cache=True)
        self._remember(output)
        return output.logits

    @contextlib.contextmanager
    def _replacing(self, inputs: dict[str, Tensor]) -> Iterator[None]:
        """The language model's attention and the contents of placeholders are this reference's."""
        self.offset = 0 if self.cache is None else self.cache.get_seq_length()
        self._read(inputs)
        self.alive: list[Tensor] = []
        self.rows, length = inputs["input_ids"].shape
        language = self.model.model.language_model
        implementation = language.config._attn_implementation

        def put_images(module, args, kwargs):
            if kwargs["inputs_embeds"].shape[1] == length - self.offset:
                times = kwargs["inputs_embeds"].shape[0] // self.rows
                kwargs["inputs_embeds"] = self.embeds.repeat_interleave(times, 0)
            return args, kwargs

        hook = language.register_forward_pre_hook(put_images, with_kwargs=True)
        _running.append(self)
        language.config._attn_implementation = "masked_reference"
        try:
            yield
        finally:
            language.config._attn_implementation = implementation
            _running.pop()
            hook.remove()

    def _remember(self, output) -> None:
        """Tokens of this turn that the next one attends to."""
        self.cache = getattr(output, "cache", None) or output.past_key_values
        total = self.cache.get_seq_length()
        seen = []
        for layer in range(len(self.alive) - 1):
            parts = [*self.before[layer : layer + 1], self.seen_at_decode(layer)]
            generated = total - sum(part.shape[1] for part in parts)
            seen.append(torch.cat([*parts, torch.ones(self.rows, generated, dtype=torch.bool)], 1))
        self.before = seen

    # Stage 1

    def _read(self, inputs: dict[str, Tensor]) -> None:
        """Flags of each position of the prompt, (B, L) each."""
        ids, mask = inputs["input_ids"][:, self.offset :], inputs["attention_mask"][:, self.offset :].bool()
        self.earlier = inputs["attention_mask"][:, : self.offset].bool()  # what this turn's mask shows of earlier ones
        self.embeds = self.model.get_input_embeddings()(ids).clone()
        self.present, self.key, self.text_queries = mask.clone(), torch.zeros_like(mask), torch.zeros_like(mask)
        config = self.model.config
        tokens = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        hidden = {token: (~mask[ids == token]).tolist() for token in tokens if token is not None}
        images = encode(self.model, self.config, inputs, hidden, self.margin)
        placeholder = torch.zeros_like(mask)
        for token_id in {image.token_id for image in images}:
            placeholder |= ids == token_id
            places = iter((ids == token_id).nonzero().tolist())
            for image in (image for image in images if image.token_id == token_id):
                for number, (row, column) in enumerate(itertools.islice(places, len(image.owner))):
                    self.embeds[row, column] = image.features[number]
                    self.key[row, column] = number in image.keys
                    self.present[row, column] = image.owner[number] == number
        placeholder &= mask
        self.tokens = placeholder & self.present
        for row in range(len(ids)):
            if placeholder[row].any():
                last = int(mask[row].nonzero().max())
                self.present[row, last] = True  # its logits are the output
                begin = int(placeholder[row].nonzero().max()) + 1
                if self.config.text_queries == "last":
                    begin = last
                self.text_queries[row, begin:] = mask[row, begin:]
        self.vision = placeholder & self.present & ~self.text_queries

    # Stages 2 and 3

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        layer, length = module.layer_idx, key.shape[2]
        repeat = lambda x: x.repeat_interleave(query.shape[0] // self.rows, 0)  # noqa: E731  beams
        if query.shape[2] > 1 and layer == 0:
            self.alive = [self.present]
        prompt = self.alive[layer] if query.shape[2] > 1 else self.seen_at_decode(layer)
        prompt = repeat(prompt)
        seen = torch.ones(query.shape[0], length, dtype=torch.bool)
        seen[:, self.offset : self.offset + prompt.shape[1]] = prompt
        if self.before:
            seen[:, : self.offset] = repeat(self.before[layer] & self.earlier)
        mask = seen[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()[-query.shape[2] :]
        own = torch.eye(length, dtype=torch.bool)[-query.shape[2] :]  # no NaN in rows without visible tokens
        bias = torch.zeros(())
        if self.mask is not None:
            mask = seen[:, None, None, :].expand_as(self.mask)
            bias = self.mask if self.mask.is_floating_point() else bias
            mask = mask if self.mask.is_floating_point() else mask & self.mask
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling + bias).masked_fill(~(mask | own), -math.inf).softmax(-1)
        if query.shape[2] > 1:
            alive = self.alive[layer]
            if layer in self.config.pruning_layers:
                mean = weights.mean(1)[:: query.shape[0] // self.rows, :, self.offset :]
                alive = torch.stack([self._keep(layer, row, mean[row]) for row in range(self.rows)])
            self.alive.append(alive)
        return (weights @ value).transpose(1, 2)

    def seen_at_decode(self, layer: int) -> Tensor:
        """(B, L) bool: what of the prompt this layer's cache still has."""
        first = self.config.first_evicted_layer
        return self.alive[-1] if first is not None and layer >= first else self.alive[layer]

    def _keep(self, layer: int, row: int, attention: Tensor) -> Tensor:
        alive = self.alive[layer][row]
        vision = alive & self.vision[row]
        queries = attention[self.text_queries[row]][:, vision]
        if not vision.any() or not len(queries):
            return alive
        total, peak, key = queries.sum(0), queries.amax(0), self.key[row][vision]
        if self.config.budgets is None:
            share, individual = float(self.config.global_threshold * total.sum()), self.config.individual_threshold
            reaches = self.margin.reaches
            pairs = zip(key.tolist(), total.tolist(), peak.tolist(), strict=True)
            stays = torch.tensor([is_key or reaches(t, share) or reaches(p, individual) for is_key, t, p in pairs])
        else:
            others = (~key).nonzero().flatten()
            budget = self.config.budgets[self.config.pruning_layers.index(layer)] - int(key.sum())
            best = self.margin.best(total[others].tolist(), max(budget, 0))
            stays = key.index_fill(0, others[best], True)
        alive = alive.clone()
        alive[vision] = stays
        return alive


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    return _running[-1].attend(module, query, key, value, scaling), None


AttentionInterface.register("masked_reference", _attention)
