"""CUDA parts of vLLM that run here: everything is vLLM's own but the kernels.

A model is built with a CUDA attention backend on CPU tensors; its cache is allocated, laid out and
bound by vLLM. What only a GPU can run, the attention kernels that write and read the cache, is
replaced by the plainest torch form.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_flashtrace.patches import attention_backends

CPU = torch.device("cpu")
PACKAGE = "vllm_flashtrace.patches"
BACKENDS = {
    "FLASH_ATTN": f"{PACKAGE}.attention_backends.RecordingFlashAttentionBackend",
    "TRITON_ATTN": f"{PACKAGE}.attention_backends.RecordingTritonAttentionBackend",
    "FLASHINFER": f"{PACKAGE}.attention_backends.RecordingFlashInferBackend",
}
_FLASHINFER = ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils")


# --- models ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """vLLM's process groups of one rank."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


@contextlib.contextmanager
def flashinfer_names() -> Iterator[None]:
    """Lets vLLM's FlashInfer module be imported without FlashInfer; nothing in it can run."""
    modules = {name: _Names(name) for name in _FLASHINFER if name not in sys.modules}
    sys.modules.update(modules)
    patch = pytest.MonkeyPatch()
    # vLLM would look for kernels to download.
    patch.setattr("vllm.utils.flashinfer.has_nvidia_artifactory", lambda: False)
    try:
        yield
    finally:
        patch.undo()
        for name in (*modules, "vllm.v1.attention.backends.flashinfer"):
            sys.modules.pop(name, None)
        vars(attention_backends).pop("RecordingFlashInferBackend", None)


class _Names(types.ModuleType):
    """A module in which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


def backend_class(name: str) -> Any:
    module, _, attribute = BACKENDS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def load_model(
    folder: Path, backend: str | type, monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> tuple[Any, VllmConfig]:
    """A model as vLLM loads it where it has chosen ``backend``, and its configuration.

    Must be called under `single_rank`. The output projections keep their weights, as on a GPU.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention import selector

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 8 << 20,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "max_num_seqs": 8,
    }
    arguments = {**defaults, **arguments}
    config = EngineArgs(model=str(folder), **arguments).create_engine_config()
    # The CPU's kernels for latent attention know blocks of one size only.
    config.cache_config.block_size = arguments["block_size"]
    if isinstance(backend, str):
        backend = backend_class(backend)
    module, name = backend.full_cls_name()
    with monkeypatch.context() as patch, set_current_vllm_config(config):
        path = classmethod(lambda cls, *args, **kwargs: f"{module}.{name}")
        patch.setattr(CpuPlatform, "get_attn_backend_cls", path)
        selector._cached_get_attn_backend.cache_clear()
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(config.model_config.dtype):
            model = loader.create_model(config, config.model_config)
            for name, layer in model.named_modules():
                if name.endswith("o_proj"):
                    layer._cpu_skip_gemm_dispatch = True
            loader.load_weights(model, config.model_config)
            process_weights_after_loading(model, config.model_config, CPU)
        selector._cached_get_attn_backend.cache_clear()
    return model.eval(), config


def bind_cache(config: VllmConfig, layout: KVCacheLayout, megabytes: int = 4) -> Any:
    """Allocates the KV cache in a layout and binds it to the layers, all by vLLM's functions.

    Returns:
        An object with ``kv_cache_config`` and ``attn_groups`` as the V2 runner keeps them.
    """
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend
    from vllm.v1.worker.utils import (
        allocate_kv_cache,
        bind_kv_cache_to_layers,
        map_kv_caches_to_kernel_blocks,
    )

    config.cache_config.kv_cache_layout = layout.name
    with set_current_vllm_config(config):
        groups = get_kv_cache_groups(config, get_kv_cache_spec(config))
        kv_cache_config = get_kv_cache_config_from_groups(config, groups, megabytes << 20)
        attn_groups, _, kernel_sizes = init_attn_backend(kv_cache_config, config, CPU)
        caches = allocate_kv_cache(kv_cache_config, CPU, layout, kernel_sizes)
        flat = [group for members in attn_groups for group in members]
        bind_kv_cache_to_layers(
            map_kv_caches_to_kernel_blocks(caches, flat),
            config.compilation_config.static_forward_context,
        )
    return SimpleNamespace(kv_cache_config=kv_cache_config, attn_groups=attn_groups)


# --- attention kernels ----------------------------------------------------------------------------


_STOCK_FORWARDS: dict[type, Any] = {}


def use_torch_kernels(impl_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the stock ``forward`` and ``do_kv_cache_update`` that need a GPU."""
    _STOCK_FORWARDS.setdefault(impl_class, impl_class.forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(impl_class, "forward", attention_kernel)
    monkeypatch.setattr(impl_class, "do_kv_cache_update", write_kernel)


class FlashKernel:
    """Stands in for ``flash_attn_varlen_func``, under the stock ``forward`` of FlashAttention.

    Attributes:
        asked: Of each call, whether it was asked for the log-sum-exp, and its ``max_seqlen_q``.
        change: What it does to the log-sum-exp that it tells.
    """

    def __init__(self, layers: list[Any], monkeypatch: pytest.MonkeyPatch, version: int = 3):
        """Puts it into vLLM's module until the test ends; the layers' backend is FLASH_ATTN."""
        from vllm.v1.attention.backends import flash_attn

        self.asked: list[tuple[bool, int]] = []
        self.change: Callable[[Tensor], Tensor] = lambda lse: lse
        impl_class = flash_attn.FlashAttentionImpl
        monkeypatch.setattr(impl_class, "forward", _STOCK_FORWARDS[impl_class])
        monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", self, raising=False)
        for layer in [layer for layer in layers if hasattr(layer, "impl")]:
            monkeypatch.setattr(layer.impl, "vllm_flash_attn_version", version)

    def __call__(
        self, *, q: Tensor, out: Tensor, return_softmax_lse: bool = False, **call: Any
    ) -> Any:
        self.asked.append((return_softmax_lse, call["max_seqlen_q"]))
        scales = [call["k_descale"].flatten()[0], call["v_descale"].flatten()[0]]
        lse = _attend(
            q,
            (call["k"], call["v"]),
            scales,
            out,
            call["cu_seqlens_q"],
            call["seqused_k"],
            call["block_table"],
            call["softmax_scale"],
            call["window_size"][0],
            call["s_aux"],
        )
        return (out, self.change(lse.float())) if return_softmax_lse else out


def stock_halves(impl: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V ``[blocks, tokens, G, d]`` by the expression of all three stock backends."""
    key_cache, value_cache = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    return key_cache, value_cache


def write_kernel(
    impl: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
) -> None:
    written = slots >= 0
    size = kv_cache.shape[2]
    blocks, places = slots[written] // size, slots[written] % size
    scales = (layer._k_scale, layer._v_scale)
    for half, new, scale in zip(stock_halves(impl, kv_cache), (key, value), scales, strict=True):
        new = new[: len(slots)][written]
        if half.dtype == torch.uint8:
            new = (new.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        half[blocks, places] = new.to(half.dtype)


def attention_kernel(
    impl: Any,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    metadata: Any,
    output: Tensor,
    output_scale: Any = None,
    output_block_scale: Any = None,
) -> Tensor:
    if metadata is None:
        return output.fill_(0)
    keys, values = stock_halves(impl, kv_cache)
    if kv_cache.dtype == torch.uint8:
        keys, values = (half.view(torch.float8_e4m3fn) for half in (keys, values))
    factor = impl.scale * (layer._q_scale_float if query.itemsize == 1 else 1.0)
    _attend(
        query,
        (keys, values),
        (layer._k_scale, layer._v_scale),
        output,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_table,
        factor,
        impl.sliding_window[0],
        impl.sinks,
    )
    return output


def _attend(
    query: Tensor,
    halves: tuple[Tensor, Tensor],
    scales: Sequence[Tensor],
    output: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    factor: float,
    left: int,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in float64, and the log-sum-exp ``[H, tokens]``, NaN where there is no token."""
    starts, size = query_starts.tolist(), halves[0].shape[1]
    heads = query.shape[1]
    lse = torch.full((heads, len(query)), torch.nan, dtype=torch.float64)
    for request, length in enumerate(seq_lens.tolist()):
        first, last = starts[request], starts[request + 1]
        if first == last:
            continue
        blocks = block_table[request, : -(-length // size)].long()
        k, v = (
            (half.double()[blocks].flatten(0, 1)[:length] * scale).repeat_interleave(
                heads // half.shape[2], 1
            )
            for half, scale in zip(halves, scales, strict=True)
        )
        logits = torch.einsum("ihd,jhd->hij", query[first:last].double(), k) * factor
        rows = torch.arange(length - (last - first), length)
        logits.masked_fill_(torch.arange(length) > rows[:, None], float("-inf"))
        if left >= 0:
            logits.masked_fill_(torch.arange(length) < rows[:, None] - left, float("-inf"))
        if sinks is not None:
            sunk = sinks.double()[:, None, None].expand(-1, len(rows), 1)
            logits = torch.cat([logits, sunk], dim=-1)
        lse[:, first:last] = logits.logsumexp(-1)
        mixed = torch.einsum("hij,jhd->ihd", logits.softmax(-1)[..., :length], v)
        output[first:last] = mixed.view(last - first, *output.shape[1:]).to(output.dtype)
    return lse
