"""vLLM's backends of latent attention for GPUs on CPU tensors.

Layers, implementations, builders of metadata and the split of a batch into rows that decode and
rows that prefill are vLLM's own; prefills run in its own torch code. What only a GPU can run, the
kernels that write latents and that decode, is replaced by the plainest torch form.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends import fa_utils

from tests.gpu.standin import flashinfer_names

_FOLDER = "vllm.v1.attention.backends.mla"
LATENT_BACKENDS = {
    "CUTLASS_MLA": ("cutlass_mla", "CutlassMLABackend"),
    "FLASHINFER_MLA": ("flashinfer_mla", "FlashInferMLABackend"),
    "FLASHMLA": ("flashmla", "FlashMLABackend"),
    "FLASH_ATTN_MLA": ("flashattn_mla", "FlashAttnMLABackend"),
    "TRITON_MLA": ("triton_mla", "TritonMLABackend"),
}


@contextlib.contextmanager
def latent_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A backend that runs here; its class is vLLM's own."""
    module_name, class_name = LATENT_BACKENDS[name]
    path = f"{_FOLDER}.{module_name}"
    with flashinfer_names(), monkeypatch.context() as patch:
        patch.setattr(CpuPlatform, "num_compute_units", classmethod(lambda *_: 4), raising=False)
        for kernel in ("flash_attn_varlen_func", "get_scheduler_metadata"):
            patch.setattr(fa_utils, kernel, None, raising=False)
        # What is imported without its kernels is not left to others.
        patch.delitem(sys.modules, path, raising=False)
        with patch.context() as importing:
            empty = torch.empty
            importing.setattr(
                torch, "empty", lambda *size, device=None, **kwargs: empty(*size, **kwargs)
            )
            module = importlib.import_module(path)
        for question, answer in (
            ("flash_attn_supports_mla", True),
            ("is_flashmla_dense_supported", (True, None)),
            ("get_flash_attn_version", 2),
        ):
            patch.setattr(module, question, lambda answer=answer: answer, raising=False)
        # That of the CPU wants a cache without gaps.
        patch.setattr(_custom_ops, "gather_mla_context_cache_cpu", gather_kernel)
        backend = getattr(module, class_name)
        impl, builder = backend.get_impl_cls(), backend.get_builder_cls()
        patch.setattr(impl, "forward_mqa", decode_kernel)
        patch.setattr(impl, "do_kv_cache_update", write_latents_kernel)
        patch.setattr(builder, "_build_decode", MLACommonMetadataBuilder._build_decode)
        try:
            yield backend
        finally:
            sys.modules.pop(path, None)


def write_latents_kernel(
    impl: Any, latents: Tensor, rotated: Tensor, cache: Tensor, slots: Tensor, *_: Any
) -> None:
    written = slots.flatten() >= 0
    slots, size = slots.flatten()[written], cache.shape[1]
    tokens = torch.cat([latents, rotated.squeeze(1)], -1)[: len(written)][written]
    cache[slots // size, slots % size] = tokens.to(cache.dtype)


def gather_kernel(
    src_cache: Tensor, dst: Tensor, block_table: Tensor, starts: Tensor, cu_seq_lens: Tensor
) -> None:
    """Latents of each request from a token on, one request after the other."""
    size, ends = src_cache.shape[1], cu_seq_lens.tolist()
    for request, start in enumerate(starts.tolist()):
        first, last = ends[request : request + 2]
        tokens = torch.arange(start, start + last - first)
        dst[first:last] = src_cache[block_table[request, tokens // size].long(), tokens % size]


def decode_kernel(
    impl: Any, query: Any, cache: Tensor, metadata: Any, layer: Any
) -> tuple[Tensor, None]:
    """Queries of 576 numbers over latents that all heads share."""
    query = torch.cat(query, -1) if isinstance(query, tuple) else query
    output = query.new_zeros(len(query), query.shape[1], impl.kv_lora_rank)
    starts = metadata.query_start_loc.tolist()
    for request, length in enumerate(metadata.decode.seq_lens.tolist()):
        first, last = starts[request], starts[request + 1]
        blocks = metadata.decode.block_table[request, : -(-length // cache.shape[1])].long()
        tokens = cache[blocks].flatten(0, 1)[:length].double()
        logits = torch.einsum("ihd,jd->hij", query[first:last].double(), tokens) * impl.scale
        rows = torch.arange(length - (last - first), length)
        logits.masked_fill_(torch.arange(length) > rows[:, None], float("-inf"))
        latents = tokens[:, : impl.kv_lora_rank]
        mixed = torch.einsum("hij,jd->ihd", logits.softmax(-1), latents)
        output[first:last] = mixed.to(output.dtype)
    return output, None
