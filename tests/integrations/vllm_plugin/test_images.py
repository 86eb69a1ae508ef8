# SPDX-License-Identifier: Apache-2.0
"""Images are where vLLM's multimodal features are, whatever tokens a prompt holds and however it is given."""

from __future__ import annotations

import base64
import io

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import tiny_llava
import torch
from engines import ASKS, BUDGETS, KEEP_ALL, PLANS, drop_record, engine, sampling
from http_server import TEMPLATE, data_url

NEW = 8
SETTINGS = {"enable_mm_embeds": True, "enable_prompt_embeds": True}
SHARED = "USER: What is on the street? " * 7  # text of more than two blocks
PICTURE = ASKS[0]
SERVED = {"plain": None, "keep-all": KEEP_ALL, "budgets": BUDGETS, "key tokens": PLANS["key tokens"]}


def ids(text):
    return tiny_llava.tokenizer()(text)["input_ids"]


def text_requests(model):
    """Prompts without an image."""
    typed = SHARED + "<image> " * 90 + "car? ASSISTANT:"
    question = torch.tensor(ids("USER: What is a car? ASSISTANT:"))
    return {
        "image tokens in the text": {"prompt": typed},
        "the next user behind the same text": {"prompt": SHARED + "What is a car? ASSISTANT:"},
        "image tokens in token ids": {"prompt_token_ids": ids(typed)},
        "the text again": {"prompt": typed},
        "image tokens only": {"prompt_token_ids": [ids("<image>")[-1]] * 150},
        "embeddings of text": {"prompt_embeds": model.get_input_embeddings()(question)},
        "embeddings of a whole prompt, image included": {"prompt_embeds": prompt_embeddings(model)},
    }


def picture_requests(model):
    """Prompts with images, and how many vision tokens each has."""
    (image,), (other,) = PICTURE.images(), ASKS[2].images()
    features = image_features(model)
    one, two = 144, 288
    return {
        "a picture": (PICTURE.for_vllm(), one),
        "token ids": ({"prompt_token_ids": ids(PICTURE.text), "multi_modal_data": {"image": image}}, one),
        "image tokens after the picture": (
            {"prompt": PICTURE.text.replace("image?", "<image> <image>"), "multi_modal_data": {"image": image}},
            one,
        ),
        "image tokens after the last of two pictures": (
            {"prompt": ASKS[3].text + "<image>", "multi_modal_data": {"image": [image, other]}},
            two,
        ),
        "the same picture twice": ({"prompt": ASKS[3].text, "multi_modal_data": {"image": [image, image]}}, two),
        "features of the picture": ({"prompt": PICTURE.text, "multi_modal_data": {"image": features}}, one),
        "the picture again": (PICTURE.for_vllm(), one),
        "an identifier": ({**PICTURE.for_vllm(), "multi_modal_uuids": {"image": ["a-picture"]}}, one),
    }


@torch.no_grad()
def image_features(model):
    pixels = tiny_llava.processor().image_processor(PICTURE.images(), return_tensors="pt")["pixel_values"]
    features = model.get_image_features(pixel_values=pixels)
    return torch.stack(list(getattr(features, "pooler_output", features)))  # (1, 144, C)


@torch.no_grad()
def prompt_embeddings(model):
    inputs = tiny_llava.processor()(images=PICTURE.images(), text=PICTURE.text, return_tensors="pt")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])[0]
    embeddings[inputs["input_ids"][0] == model.config.image_token_id] = image_features(model)[0]
    return embeddings


def chat(llm, model):
    """Tokens of a chat whose text beside the picture is given as embeddings."""
    file = io.BytesIO()
    torch.save(model.get_input_embeddings()(torch.tensor(ids("What is in the image?"))).detach(), file)
    embeddings = {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
    picture = {"type": "image_url", "image_url": {"url": data_url(PICTURE.images()[0])}}
    message = {"role": "user", "content": [picture, embeddings, {"type": "text", "text": "car?"}]}
    (output,) = llm.chat([message], sampling(NEW), use_tqdm=False, chat_template=TEMPLATE)
    return list(output.outputs[0].token_ids)


def answers(llm, requests):
    """Tokens of each request, and how many of its prompt were dropped."""
    dropped = {}
    with pytest.MonkeyPatch.context() as patch:
        if (record := drop_record(llm)) is not None:
            add = record.add
            patch.setattr(record, "add", lambda request, count: add(request, dropped.setdefault(request, count)))
        outputs = llm.generate(list(requests.values()), sampling(NEW), use_tqdm=False)
    counts = {request.split("-")[0]: count for request, count in dropped.items()}
    found = {name: list(output.outputs[0].token_ids) for name, output in zip(requests, outputs, strict=True)}
    return found, {name: counts.get(output.request_id, 0) for name, output in zip(requests, outputs, strict=True)}


@pytest.fixture(scope="module")
def served(checkpoint, transformers_of):
    """Answers and drops of each plan, all requests at once and then in threes."""
    model = transformers_of.model
    requests = {**text_requests(model), **{name: r for name, (r, _) in picture_requests(model).items()}}
    found = {}
    for name, plan in SERVED.items():
        with engine(checkpoint, plan, **SETTINGS) as llm:
            found[name] = *answers(llm, requests), chat(llm, model)
            names = list(requests)
            parts = [answers(llm, {key: requests[key] for key in names[i : i + 3]}) for i in range(0, len(names), 3)]
            assert {key: tokens for part, _ in parts for key, tokens in part.items()} == found[name][0]
    return found


def test_text_with_image_tokens_is_text(served, transformers_of):
    for plan in SERVED:
        for name in text_requests(transformers_of.model):
            assert served[plan][0][name] == served["plain"][0][name], (plan, name)
            assert served[plan][1][name] == 0


def test_pictures_equal_plain_vllm_if_all_is_kept(served):
    assert served["keep-all"][0] == served["plain"][0]
    assert served["keep-all"][2] == served["plain"][2] != served["budgets"][2]
    assert set(served["keep-all"][1].values()) == {0}


def test_only_vision_tokens_are_dropped(served, transformers_of):
    for name, (_, vision) in picture_requests(transformers_of.model).items():
        assert served["budgets"][1][name] == vision - BUDGETS["budgets"][-1], name


def test_ways_to_give_a_picture_agree(served, transformers_of):
    tokens = served["budgets"][0]
    expected = transformers_of.generate(PICTURE, BUDGETS, NEW)[0]
    for name in ("a picture", "token ids", "features of the picture", "the picture again", "an identifier"):
        assert tokens[name] == expected, name
