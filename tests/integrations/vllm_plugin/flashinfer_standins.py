# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch in place of the `flashinfer` package: FLASHINFER in a vLLM on a CPU.

vLLM's metadata, builder and layers are its own. The stand-ins check what the kernels require: that a plan, which is
made on the host, was made for the rows, lengths and pages of the call.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import types

import flash_standins
import pytest
import torch

BACKEND = "vllm.v1.attention.backends.flashinfer"
LIBRARY = {  # what the backend imports of `flashinfer`, by module
    "flashinfer": (
        "BatchAttentionWithAttentionSinkWrapper",
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
        "get_seq_lens",
        "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
    ),
    "flashinfer.decode": ("fast_decode_plan", "trtllm_batch_decode_with_kv_cache"),
    "flashinfer.prefill": ("trtllm_batch_context_with_kv_cache",),
    "flashinfer.utils": ("FP4Tensor", "get_device_sm_count", "get_trtllm_gen_multi_ctas_kv_counter_bytes"),
}


def get_seq_lens(indptr, last_page_len, page_size):
    """Lengths of requests from the numbers of their pages."""
    return torch.clamp(indptr.diff() - 1, min=0) * page_size + last_page_len


def get_device_sm_count(device):
    """Multiprocessors of a device."""
    return 1


def get_trtllm_gen_multi_ctas_kv_counter_bytes(tokens, heads, sm_count):
    """Bytes of a buffer of trtllm-gen's kernels."""
    return 1


def _attention(q, caches, layout, **settings):
    keys, values = (cache if layout == "NHD" else cache.transpose(1, 2) for cache in caches)
    return flash_standins.attention(q, keys, values, **settings)


class _Wrapper:
    """What the wrappers of paged caches share: a plan for as many runs as there are layers."""

    def __init__(self, workspace, kv_layout, **unused):
        self._layout = kv_layout
        self.truth = None  # on the device: lengths, block table and first rows of the requests

    def _plan(
        self,
        begins,  # (R + 1), rows
        indptr,  # (R + 1), pages
        indices,
        last_page_len,
        seq_lens,
        *,
        page_size,
        num_qo_heads,
        num_kv_heads,
        causal,
        sm_scale,
        window_left,
        logits_soft_cap,
        q_data_type,
        kv_data_type,
        **unused,
    ):
        assert all(x.device.type == "cpu" for x in (begins, indptr, last_page_len, seq_lens))
        assert begins[0] == 0
        assert seq_lens.tolist() == get_seq_lens(indptr, last_page_len, page_size).tolist()
        self._begins, self._lengths, self._causal = begins.tolist(), seq_lens.tolist(), causal
        self._heads, self._page_size = (num_qo_heads, num_kv_heads), page_size
        self._types = q_data_type, kv_data_type
        self._sm_scale, self._window_left, self._logits_soft_cap = sm_scale, window_left, logits_soft_cap or 0.0
        self._keep(indptr, indices, last_page_len)

    def _keep(self, indptr, indices, last_page_len):
        """Host tensors are copied to the device; the indices are there already and not copied."""
        self._buffers = indptr.clone(), indices, last_page_len.clone()

    def run(self, q, paged_kv_cache, *, q_scale, k_scale, v_scale, out, kv_cache_sf, sinks=None):
        indptr, indices, last_page_len = self._buffers
        begins, lengths, pages = self._begins, self._lengths, indptr.tolist()
        assert len(q) == begins[-1], f"{len(q)} rows in a plan for {begins[-1]}"
        assert get_seq_lens(indptr, last_page_len, self._page_size).tolist() == lengths, "buffers of another plan"
        table = [indices[a:b].tolist() for a, b in itertools.pairwise(pages)]
        self._check(begins, lengths, table)
        assert (q.shape[1], paged_kv_cache[0].shape[2 if self._layout == "NHD" else 1]) == self._heads
        assert (q.dtype, *(cache.dtype for cache in paged_kv_cache)) == (*self._types, self._types[1])
        longest = max(map(len, table))
        return _attention(
            q,
            paged_kv_cache,
            self._layout,
            out=out,
            cu_seqlens_q=torch.tensor(begins),
            max_seqlen_q=len(q),
            seqused_k=torch.tensor(lengths),
            max_seqlen_k=max(lengths),
            softmax_scale=self._sm_scale * q_scale,
            causal=self._causal,
            block_table=torch.tensor([row + [0] * (longest - len(row)) for row in table]),
            k_descale=torch.tensor([k_scale]),
            v_descale=torch.tensor([v_scale]),
        )

    def _check(self, begins, lengths, table):
        seq_lens, block_table, query_start_loc = self.truth
        assert lengths == seq_lens.tolist(), f"a plan for the lengths {lengths} of requests of {seq_lens.tolist()}"
        assert table == [block_table[i, : len(row)].tolist() for i, row in enumerate(table)], "pages of another step"
        real = [i for i, length in enumerate(lengths) if length > 0]  # the others are padding
        first = (query_start_loc - query_start_loc[0]).tolist()
        assert [begins[i] for i in real] == [first[i] for i in real], "rows of another step"


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Stands in for FlashInfer's."""

    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *, seq_lens, **settings):
        self._plan(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, seq_lens, **settings)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """Stands in for FlashInfer's. A graph reads the buffers that its wrapper was made with."""

    def __init__(
        self,
        workspace,
        kv_layout,
        *,
        use_cuda_graph,
        paged_kv_indptr_buffer,
        paged_kv_indices_buffer,
        paged_kv_last_page_len_buffer,
        **unused,
    ):
        super().__init__(workspace, kv_layout)
        self.is_cuda_graph_enabled = use_cuda_graph
        self._bound = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer

    def plan(self, indptr, indices, last_page_len, *, seq_lens, **settings):
        if self.is_cuda_graph_enabled:
            assert len(last_page_len) == len(self._bound[2]), "another number of requests than was captured"
        rows = torch.arange(len(last_page_len) + 1)
        self._plan(rows, indptr, indices, last_page_len, seq_lens, causal=False, **settings)

    def _keep(self, indptr, indices, last_page_len):
        if not self.is_cuda_graph_enabled:
            super()._keep(indptr, indices, last_page_len)
            return
        for buffer, value in zip(self._bound, (indptr, indices, last_page_len), strict=True):
            buffer[: len(value)] = value.clone()
        self._buffers = self._bound


def fast_decode_plan(wrapper, indptr, indices, last_page_len, **settings):
    """Stands in for the faster ``plan`` of a captured decode wrapper, which does not copy the indices."""
    assert indices.data_ptr() == wrapper._bound[1].data_ptr()
    seq_lens = get_seq_lens(indptr, last_page_len, settings["page_size"])
    wrapper.plan(indptr, indices, last_page_len, seq_lens=seq_lens, **settings)


def trtllm_batch_context_with_kv_cache(
    query, kv_cache, *, cum_seq_lens_q, cum_seq_lens_kv, max_q_len, max_kv_len, batch_size, seq_lens, **settings
):
    """Stands in for the kernel of trtllm-gen, which reads what it needs on the device."""
    assert batch_size == len(seq_lens) == len(cum_seq_lens_q) - 1
    assert cum_seq_lens_kv.diff().tolist() == [-(-n // kv_cache[0].shape[2]) for n in seq_lens.tolist()]
    _attention_by_table(query, kv_cache, "HND", cum_seq_lens_q, max_q_len, max_kv_len, seq_lens, **settings)


def trtllm_batch_decode_with_kv_cache(
    query, kv_cache, *, seq_lens, max_seq_len, q_len_per_req, max_q_len=None, cum_seq_lens_q=None, **settings
):
    """Stands in for the kernel of trtllm-gen; without `cum_seq_lens_q` all requests have the same number of rows."""
    longest = q_len_per_req or max_q_len
    if cum_seq_lens_q is None:
        assert len(query) == len(seq_lens) * longest
        cum_seq_lens_q = torch.arange(len(seq_lens) + 1) * longest
    _attention_by_table(
        query, kv_cache, begins=cum_seq_lens_q, longest=longest, max_len=max_seq_len, seq_lens=seq_lens, **settings
    )


def xqa_batch_decode_with_kv_cache(query, kv_cache, *, q_len_per_req, q_cu_seq_lens, mask, **settings):
    """Stands in for XQA, which reads from a mask that rows of drafts are causal."""
    assert (mask is None) == (q_len_per_req == 1)
    settings["cum_seq_lens_q"] = q_cu_seq_lens
    trtllm_batch_decode_with_kv_cache(query, kv_cache, q_len_per_req=q_len_per_req, **settings)


def _attention_by_table(
    query, kv_cache, kv_layout, begins, longest, max_len, seq_lens, *, block_tables, bmm1_scale, out, **unused
):
    assert all(x.is_contiguous() for x in (query, block_tables, seq_lens))
    _attention(
        query,
        kv_cache,
        kv_layout,
        out=out,
        cu_seqlens_q=begins,
        max_seqlen_q=longest,
        seqused_k=seq_lens,
        max_seqlen_k=max_len,
        softmax_scale=bmm1_scale,
        causal=True,
        block_table=block_tables,
    )


def _absent(name):
    def call(*args, **kwargs):
        raise NotImplementedError(f"flashinfer.{name}")

    return type(name, (), {"__init__": call}) if name[0].isupper() else call


def install(patch: pytest.MonkeyPatch, capability: int) -> None:
    """Makes FLASHINFER run with these classes and functions, as on a GPU of a (major) compute capability.

    8: FlashInfer's own kernels. 9: XQA for decoding. 10: trtllm-gen.
    """
    import vllm.utils.flashinfer as utils
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    for module, names in LIBRARY.items():
        found = types.ModuleType(module)
        for name in names:
            setattr(found, name, globals().get(name) or _absent(name))
        patch.setitem(sys.modules, module, found)
    patch.setitem(sys.modules, BACKEND, None)  # the backend is imported anew, and removed at the end
    del sys.modules[BACKEND]
    backend = importlib.import_module(BACKEND)
    for module in LIBRARY:  # to everything else the package is absent
        patch.delitem(sys.modules, module)

    def supports_trtllm(is_prefill=False):
        return capability == 10 or (capability == 9 and not is_prefill)

    for module in (utils, backend):
        patch.setattr(module, "supports_trtllm_attention", supports_trtllm)
    found = classmethod(lambda cls, device_id=0: DeviceCapability(capability, 0))
    patch.setattr(CpuPlatform, "get_device_capability", found)
    patch.setattr(backend, "flashinfer_xqa_batch_decode_with_kv_cache", xqa_batch_decode_with_kv_cache)
    patch.setattr(backend, "trtllm_workspace_buffer", torch.zeros(1))
    if hasattr(backend, "_get_multi_ctas_kv_counter_buffer"):  # from vLLM 0.33 on
        patch.setattr(backend, "_get_multi_ctas_kv_counter_buffer", lambda size, device: torch.zeros(size))
    patch.setattr(torch.ops._C_cache_ops, "reshape_and_cache_flash", flash_standins.write_cache, raising=False)
    patch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "1")
    _keep_truth(patch, backend)


def _keep_truth(patch, backend):
    """Tells the wrappers of metadata the tensors of the device that a plan stands for."""
    build = backend.FlashInferMetadataBuilder.build

    def build_and_keep(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common, metadata = common_attn_metadata, build(self, common_prefix_len, common_attn_metadata, fast_build)
        decodes = metadata.num_decodes
        for part, rows, begins in (
            (metadata.decode, slice(decodes), slice(decodes + 1)),
            (metadata.prefill, slice(decodes, None), slice(decodes, None)),
        ):
            if isinstance(part, (backend.FIDecode, backend.FIPrefill)):
                tensors = common.seq_lens[rows], common.block_table_tensor[rows], common.query_start_loc[begins]
                part.wrapper.truth = tensors
        return metadata

    patch.setattr(backend.FlashInferMetadataBuilder, "build", build_and_keep)
