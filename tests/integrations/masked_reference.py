# SPDX-License-Identifier: Apache-2.0
"""The method without shortening anything: the whole prompt goes through every layer, and dropped tokens are masked.

Written apart from the package, in loops, with decisions of its own. Positions are the plain prompt's.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from mustdrop_kernels.config import MustDropConfig

_running: list[MaskedReference] = []


class MaskedReference:
    """``generate`` with the language model's attention replaced; ``alive[layer]`` is what that layer's tokens see."""

    def __init__(self, model: LlavaForConditionalGeneration, config: MustDropConfig) -> None:
        self.model, self.config = model, config

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], new_tokens: int, **settings) -> tuple[Tensor, Tensor]:
        """New tokens (B, new_tokens) and their logits (B, new_tokens, V)."""
        embeds, self.present, self.voters, self.vision, self.key = self._prompt(inputs)
        self.alive: list[Tensor] = []
        self.rows = embeds.shape[0]
        language = self.model.model.language_model.config
        implementation = language._attn_implementation
        _running.append(self)
        language._attn_implementation = "masked_reference"
        try:
            output = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=inputs["attention_mask"],
                max_new_tokens=new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
                **{"do_sample": False, **settings},
            )
        finally:
            language._attn_implementation = implementation
            _running.pop()
        return output.sequences, torch.stack(output.logits, 1)

    # Stage 1

    def _prompt(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        placeholder = ids == self.model.config.image_token_id
        embeds = self.model.get_input_embeddings()(ids).clone()
        present, key = mask.clone(), torch.zeros_like(mask)
        places = iter(placeholder.nonzero().tolist())
        for image in inputs.get("pixel_values", ()):
            features, first, keys = self._encode(image)
            patches = (image.shape[-1] // self.model.config.vision_config.patch_size) ** 2
            for patch, (row, column) in enumerate(itertools.islice(places, patches)):
                if patch in first:
                    embeds[row, column] = features[first.index(patch)]
                    key[row, column] = first.index(patch) in keys
                else:
                    present[row, column] = False
        voters = torch.zeros_like(mask)
        for row in range(len(ids)):
            if placeholder[row].any():
                begin = int(placeholder[row].nonzero().max()) + 1
                voters[row, begin:] = mask[row, begin:]
                if self.config.votes == "last":
                    voters[row, :-1] = False
        return embeds, present, voters, placeholder & present, key

    def _encode(self, image: Tensor) -> tuple[Tensor, list[int], set[int]]:
        """Features (S, C), each token's first patch, and the key tokens."""
        config = self.config
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        x = tower.pre_layrnorm(tower.embeddings(image[None]))[0]
        first = list(range(x.shape[0] - 1))
        hidden = [x]
        for number, layer in enumerate(tower.encoder.layers):
            attention = layer.self_attn
            y = layer.layer_norm1(x)
            projections = (attention.q_proj(y), attention.k_proj(y), attention.v_proj(y))
            q, k, v = (z.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for z in projections)
            weights = (q @ k.transpose(1, 2) * attention.scale).softmax(-1)
            x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.layer_norm2(x))
            if config.merge and number == config.merge_layer:
                x, first = self._merge(x)
            hidden.append(x)
        cls = weights[:, 0, 1:].mean(0)
        number_of_keys = math.ceil(config.key_rate * len(first))
        keys = set(cls.topk(number_of_keys).indices.tolist())
        chosen = hidden[self.model.config.vision_feature_layer][1:]
        return self.model.model.multi_modal_projector(chosen), first, keys

    def _merge(self, x: Tensor) -> tuple[Tensor, list[int]]:
        side, (height, width) = math.isqrt(x.shape[0] - 1), self.config.window
        windows = {}
        for top in range(0, side, height):
            for left in range(0, side, width):
                rows, columns = range(top, min(top + height, side)), range(left, min(left + width, side))
                windows[top, left] = [row * side + column for row in rows for column in columns]
        similarity = {}
        for window in windows.values():
            if len(window) > 1:
                unit = torch.nn.functional.normalize(x[1:][window].double(), dim=-1)
                pairs = unit @ unit.T
                similarity[window[0]] = float((pairs.sum() - pairs.trace()) / (len(window) * (len(window) - 1)))
        if self.config.merge_budget is not None:
            merging = sorted(similarity, key=similarity.get, reverse=True)[: self.config.merge_budget]
        else:
            merging = [begin for begin, value in similarity.items() if value >= self.config.merge_threshold]
        tokens = {patch: x[1 + patch] for patch in range(side * side)}
        for window in windows.values():
            if window[0] in merging:
                tokens[window[0]] = x[1:][window].mean(0)
                for patch in window[1:]:
                    del tokens[patch]
        first = sorted(tokens)
        return torch.stack([x[0], *(tokens[patch] for patch in first)]), first

    # Stages 2 and 3

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        layer, length = module.layer_idx, key.shape[2]
        repeat = lambda x: x.repeat_interleave(query.shape[0] // self.rows, 0)  # noqa: E731  beams
        if query.shape[2] > 1 and layer == 0:
            self.alive = [self.present]
        prompt = self.alive[layer] if query.shape[2] > 1 else self.seen_at_decode(layer)
        prompt = repeat(prompt)
        seen = torch.ones(query.shape[0], length, dtype=torch.bool)
        seen[:, : prompt.shape[1]] = prompt
        mask = seen[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()[-query.shape[2] :]
        mask = mask | torch.eye(length, dtype=torch.bool)[-query.shape[2] :]  # tokens that nobody sees: no NaN
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -math.inf).softmax(-1)
        if query.shape[2] > 1:
            alive = self.alive[layer]
            if layer in self.config.pruning_layers:
                mean = weights.mean(1)[:: query.shape[0] // self.rows]
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
        votes = attention[self.voters[row]][:, vision]
        if not vision.any() or not len(votes):
            return alive
        total, peak, key = votes.sum(0), votes.amax(0), self.key[row][vision]
        if self.config.budgets is None:
            share = self.config.global_threshold * total.sum()
            stays = (total >= share) | (peak >= self.config.individual_threshold) | key
        else:
            budget = max(self.config.budgets[self.config.pruning_layers.index(layer)], int(key.sum()))
            best = total.masked_fill(key, math.inf).topk(min(budget, len(total))).indices
            stays = torch.zeros_like(key).index_fill(0, best, True)
        alive = alive.clone()
        alive[vision] = stays
        return alive


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    return _running[-1].attend(module, query, key, value, scaling), None


AttentionInterface.register("masked_reference", _attention)
