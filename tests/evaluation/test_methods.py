# SPDX-License-Identifier: Apache-2.0
"""Every method keeps the number that it promises, and what it says that it keeps."""

from __future__ import annotations

import pytest
import torch

from mustdrop_kernels.evaluation.methods import METHODS, Method, Sizes, Unreachable, make
from mustdrop_kernels.evaluation.methods.schedules import scaled, shaped
from mustdrop_kernels.evaluation.tower import SharedTower
from mustdrop_kernels.integrations.transformers import drop_tokens


@pytest.fixture(scope="module")
def inputs(subject, asked):
    return subject.batch([e.picture() for e in asked.examples[:2]], [e.text for e in asked.examples[:2]])


def logits(subject, method: Method, inputs, seed: int = 0):
    stage = {} if method.stage is None else {"vision_stage": method.stage(seed)}
    with drop_tokens(subject.model, method.config, **stage) as report, torch.inference_mode():
        return subject.model(**inputs).logits[:, -1], report.last


@pytest.mark.parametrize("budget", [64, 32])
@pytest.mark.parametrize("name", METHODS)
def test_average_over_layers_is_the_budget(name: str, budget: int, subject, inputs) -> None:
    sizes = Sizes.of(subject.model.config)
    try:
        method = make(name, budget, sizes)
    except Unreachable:
        assert budget == 32
        assert name in ("fastv", "sparsevlm", "pyramiddrop"), (
            "they show all tokens to a layer: 576 / 12 is more than 32"
        )
        return
    found, report = logits(subject, method, inputs)
    assert budget - 1 < report.mean_tokens <= budget
    assert torch.isfinite(found).all()
    for image in report.images:
        kept = list(image.kept.values())
        assert kept == sorted(kept, reverse=True)
        if not method.config.pruning_layers:
            assert image.tokens == budget


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_same_twice_and_leaves_the_model_alone(name: str, subject, inputs) -> None:
    with torch.inference_mode():
        before = subject.model(**inputs).logits[:, -1]
    method = make(name, 64, Sizes.of(subject.model.config))
    first, _ = logits(subject, method, inputs, seed=5)
    again, _ = logits(subject, method, inputs, seed=5)
    assert torch.equal(first, again)
    assert not torch.equal(first, before)
    if name == "random":
        assert not torch.equal(first, logits(subject, method, inputs, seed=6)[0])
    with torch.inference_mode():
        assert torch.equal(subject.model(**inputs).logits[:, -1], before)


@pytest.mark.parametrize("name", ["random", "cls", "prumerge", "tome"])  # VisionZip merges at every budget
def test_a_budget_of_everything_is_the_plain_model(name: str, subject, inputs) -> None:
    with torch.inference_mode():
        plain = subject.model(**inputs).logits[:, -1]
    found, report = logits(subject, make(name, 576, Sizes.of(subject.model.config)), inputs)
    assert report.mean_tokens == 576
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "tome" and not n.startswith("mustdrop")])
def test_the_shared_tower_changes_nothing(name: str, subject, inputs) -> None:
    method = make(name, 128, Sizes.of(subject.model.config))
    assert method.leaves_tower
    alone, _ = logits(subject, method, inputs)
    tower = SharedTower(subject.model.model.vision_tower)
    for spared in (False, True):
        with tower.shared():
            shared, _ = logits(subject, method, inputs)
        assert tower.spared is spared
        assert torch.equal(alone, shared)


def test_cls_keeps_what_cls_looks_at(subject, inputs) -> None:
    """Against the attention weights of transformers' own eager attention."""
    method = make("cls", 32, Sizes.of(subject.model.config))
    _, report = logits(subject, method, inputs)
    kept = torch.zeros(576, dtype=torch.bool)
    tower = subject.model.model.vision_tower
    tower.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            weights = tower(inputs["pixel_values"][:1], output_attentions=True).attentions[-2]
    finally:
        tower.set_attn_implementation("sdpa")
    kept[weights.mean(1)[0, 0, 1:].topk(32).indices] = True
    seen = []
    with drop_tokens(subject.model, method.config, vision_stage=method.stage(0)), torch.inference_mode():
        body = subject.model.model
        features = body.get_image_features(inputs["pixel_values"][:1]).pooler_output[0]
        seen = features.abs().sum(-1) > 0
    assert report.images[0].tokens == 32
    assert torch.equal(seen, kept)


def test_published_layers_keep_their_depth() -> None:
    assert scaled((2, 6, 10, 14), 32) == (2, 6, 10, 14)
    assert scaled((2, 6, 10, 14), 12) == (0, 2, 3, 5)
    assert scaled((2, 6, 10, 14), 4) == (0, 1)


@pytest.mark.parametrize(("average", "shape"), [(192, (4, 2, 1)), (64, (66, 30, 17)), (100.5, (1, 1, 1))])
def test_schedules_meet_the_average_and_keep_their_shape(average: float, shape: tuple[int, ...]) -> None:
    budgets = shaped(576, (0, 2, 5), 12, average, shape)
    total = 576 + sum(n * b for n, b in zip((2, 3, 6), budgets, strict=True))
    assert average * 12 - 6 < total <= average * 12
    assert budgets == tuple(sorted(budgets, reverse=True))
    for a, b in zip(budgets, shape, strict=True):
        assert a / budgets[0] == pytest.approx(b / shape[0], abs=0.1)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no method 'best'"):
        make("best", 64, Sizes(12))
    with pytest.raises(ValueError, match="needs a budget"):
        make("cls", None, Sizes(12))
