# SPDX-License-Identifier: Apache-2.0
"""Views of vLLM's caches, and what is refused."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import engines  # noqa: F401 - sets vLLM's environment
import torch
from vllm import _custom_ops

from mustdrop_kernels.integrations.vllm.attention import backend_of
from mustdrop_kernels.integrations.vllm.attention.backend import AttentionBackend
from mustdrop_kernels.integrations.vllm.attention.cpu_attn import CpuAttn

SERVED = ["CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"]


def layer(cache=None, name="FLASH_ATTN", kind="auto", isa="vec"):
    backend = types.SimpleNamespace(get_name=lambda: name)
    return types.SimpleNamespace(attn_backend=backend, kv_cache=cache, kv_cache_dtype=kind, isa=isa)


@pytest.mark.parametrize(
    ("isa", "size", "dtype", "kind"),
    [
        ("vec", 32, torch.float32, "auto"),
        ("vec16", 80, torch.bfloat16, "auto"),
        ("vec", 64, torch.float16, "auto"),
        ("vec", 64, torch.bfloat16, "fp8_e4m3"),
    ],
)
def test_views_of_the_cpu_cache_hold_what_vllm_writes(isa, size, dtype, kind):
    blocks, heads, slots = 5, 2, 32
    cache = torch.zeros(blocks, heads, slots, 2 * size, dtype=dtype if kind == "auto" else torch.uint8)
    key, value = torch.randint(-8, 8, (2, 7, heads, size)).to(dtype)  # exact in fp8
    places = torch.tensor([3, 31, 32, 64 + 5, 96, 159, 0])
    halves = cache.view(blocks, heads, 2 * slots, size).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(
        key, value, *halves, places, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=kind
    )
    views = CpuAttn([layer(cache, "CPU_ATTN")]).views(cache)
    for written, view in zip((key, value), views, strict=True):
        assert view.shape == (blocks, slots, heads, size)
        held = view if kind == "auto" else view.contiguous().view(torch.float8_e4m3fn).to(dtype)
        assert torch.equal(held[places // slots, places % slots], written)
        assert held.count_nonzero() == written.count_nonzero()


@pytest.mark.parametrize("heads_first", [True, False])
def test_views_of_the_cache_of_gpus(heads_first):
    """A row holds the key before the value, in both of vLLM's layouts."""
    blocks, heads, slots, size = 3, 2, 16, 8
    rows = torch.arange(blocks * heads * slots * 2 * size).view(blocks, slots, heads, 2 * size)
    cache = rows.transpose(1, 2).contiguous() if heads_first else rows.transpose(1, 2)
    keys, values = AttentionBackend([layer(cache)]).views(cache)
    assert torch.equal(keys, rows[..., :size])
    assert torch.equal(values, rows[..., size:])


def test_other_layouts_of_the_cpu_are_refused():
    with pytest.raises(ValueError, match="mustdrop: the CPU attention's 'amx' cache is not served"):
        backend_of([layer(name="CPU_ATTN", isa="amx")]).check(32)


@pytest.mark.parametrize("names", [["FLEX_ATTENTION"], ["FLASH_ATTN", "TRITON_ATTN"]])
def test_other_backends_are_refused(names):
    sentence = f"mustdrop: the attention backend {' with '.join(names)} is not served; attention_backend can be one of "
    with pytest.raises(ValueError, match=sentence + ", ".join(SERVED)):
        backend_of([layer(name=name) for name in names])


def test_each_group_of_layers_builds_its_metadata():
    """vLLM puts layers of equal caches into a group; a kernel's plan depends on the type of the cache."""
    layers, groups = [layer(kind=kind) for kind in ("auto", "fp8", "fp8", "auto")], []
    for i, found in enumerate(layers):
        found.layer_name = f"layer {i}"
    for kind, names in (("of the tower", ["tower"]), ("auto", ["layer 0", "layer 3"]), ("fp8", ["layer 1", "layer 2"])):
        groups.append(types.SimpleNamespace(layer_names=names, build_metadata=lambda common, kind=kind: (kind, common)))
    built = backend_of(layers).build(groups, "step")
    assert built == {f"layer {i}": (found.kv_cache_dtype, "step") for i, found in enumerate(layers)}


@pytest.mark.parametrize("kind", ["auto", "bfloat16", "fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head"])
def test_caches_that_can_be_compacted(kind):
    backend_of([layer(torch.zeros(4, 2, 16, 8), kind=kind)]).check(16)


@pytest.mark.parametrize(("part", "expected"), [("wrapper", ["build", "synchronize"]), ("block_tables", ["build"])])
def test_plans_of_flashinfer_are_on_the_device_before_the_next_one(part, expected, monkeypatch):
    """A plan of its own kernels is copied from one pinned buffer; those of trtllm-gen need none."""
    events = []

    def build(common):
        events.append("build")
        return types.SimpleNamespace(decode=None, prefill=types.SimpleNamespace(**{part: None}))

    stream = types.SimpleNamespace(synchronize=lambda: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    attention = layer(name="FLASHINFER")
    attention.layer_name = "layer"
    group = types.SimpleNamespace(layer_names=["layer"], build_metadata=build)
    common = types.SimpleNamespace(seq_lens=types.SimpleNamespace(is_cuda=True, device="cuda"))
    backend_of([attention]).build([group], common)
    assert events == expected


def test_caches_that_cannot_be_compacted():
    cache = torch.zeros(4, 2, 16, 8)
    with pytest.raises(ValueError, match="mustdrop: kv_cache_dtype 'nvfp4' is not served"):
        backend_of([layer(cache), layer(cache, kind="nvfp4")]).check(16)
    with pytest.raises(ValueError, match=r"block_size 32 is split .* into blocks of 16 slots; give block_size=16"):
        backend_of([layer(cache)]).check(32)
