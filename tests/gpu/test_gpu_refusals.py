"""What CUDA adapters refuse, by name, checked on vLLM's own layers, backends and caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.model_executor.layers.quantization.torchao import TorchAOLinearMethod
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from tests.gpu.standin import CPU, backend_class, flashinfer_names
from tests.gpu.v2_engine import V2Engine, apply_patches, traced, v2_engine
from tests.measured import Measured
from tests.tiny_models import FAMILY_NAMES
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.worker.gpu_model import GPUTracedModel
from vllm_flashtrace.worker.output_gates import OutputGate

Change = Callable[[Any, pytest.MonkeyPatch], None]
SLOPES = [0.5, 0.25, 0.125, 0.0625]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Iterator[V2Engine]:
    with pytest.MonkeyPatch.context() as patch, v2_engine(tiny_llama, patch, "TRITON_ATTN") as e:
        yield e


@pytest.fixture
def layer(loaded: V2Engine) -> Any:
    """The attention layer that tests change: the third of four."""
    context = loaded.config.compilation_config.static_forward_context
    return context["model.layers.2.self_attn.attn"]


def implementation(backend: str = "TRITON_ATTN", **arguments: Any) -> Any:
    """An implementation as vLLM builds it for a layer of the model."""
    plain = {"num_heads": 4, "head_size": 32, "scale": 32**-0.5, "num_kv_heads": 2}
    unset = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    return backend_class(backend).get_impl_cls()(**{**plain, **unset, **arguments})


def traced_model(loaded: V2Engine) -> GPUTracedModel:
    return GPUTracedModel(loaded.model, loaded.config, CPU)


def refusal(loaded: V2Engine) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        traced_model(loaded)
    return caught.value.message


def test_the_unchanged_model_is_traced(loaded: V2Engine) -> None:
    assert traced_model(loaded).shape.num_layers == 4


CONFIGS: dict[str, tuple[str, str, Any]] = {
    "elastic expert parallelism": ("parallel_config", "enable_elastic_ep", True),
    "decode context parallelism": ("parallel_config", "decode_context_parallel_size", 2),
    "prefill context parallelism": ("parallel_config", "prefill_context_parallel_size", 2),
    "micro-batching (DBO)": ("parallel_config", "enable_dbo", True),
    "non-causal attention": ("attention_config", "use_non_causal", True),
    "KV caches on the host (HiSparse)": ("attention_config", "hisparse_config", object()),
    "R-SWA attention": ("model_config.model_arch_config", "rswa_window", 128),
    "prompt embeddings": ("model_config", "enable_prompt_embeds", True),
    "weights offloaded to the host": ("offload_config.uva", "cpu_offload_gb", 1),
    "adaptive verification of drafts": (
        "",
        "speculative_config",
        SimpleNamespace(enable_adaptive_verification=True),
    ),
    "KV transfer by ExampleConnector": (
        "",
        "kv_transfer_config",
        KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both"),
    ),
}


@pytest.mark.parametrize("feature", CONFIGS)
def test_configurations(loaded: V2Engine, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, name, value = CONFIGS[feature]
    owner: Any = loaded.config
    for part in filter(None, path.split(".")):
        owner = getattr(owner, part)
    assert hasattr(owner, name)
    # Not through ``setattr``: vLLM's configurations validate what is assigned.
    monkeypatch.setitem(owner.__dict__, name, value)
    assert refusal(loaded) == f"traces are not supported with {feature}"


def test_image_tokens_in_a_prefix_and_prefetched_weights(
    loaded: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(loaded.config.model_config.__dict__, "is_mm_prefix_lm", True)
        assert "attention to later image tokens" in refusal(loaded)
    patched = loaded.config.offload_config.prefetch.__dict__
    monkeypatch.setitem(patched, "offload_group_size", 4)
    assert "weights offloaded to the host" in refusal(loaded)


def test_a_divided_stream(loaded: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's DeepSeek has it with expert and tensor parallelism beside data parallelism."""
    block = loaded.model.get_submodule("model.layers.2.self_attn")
    monkeypatch.setattr(block.o_proj, "reduce_results", False)
    assert traced_model(loaded)  # One rank has all of it.
    monkeypatch.setattr(block.o_proj, "tp_size", 2)
    found = refusal(loaded)
    assert "divide the residual stream" in found and "model.layers.2.self_attn.attn" in found


def test_multi_head_latent_attention(loaded: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = MLAAttention.__new__(MLAAttention)
    nn.Module.__init__(attention)
    attention.attn_backend = SimpleNamespace(get_name=lambda: "TOKENSPEED_MLA")  # type: ignore[assignment]
    context = loaded.config.compilation_config.static_forward_context
    monkeypatch.setitem(context, "model.layers.9.self_attn.mla_attn", attention)
    assert "latent attention (MLA) on the TOKENSPEED_MLA backend (model.layers.9" in refusal(loaded)


def test_output_gates(
    loaded: V2Engine, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    def read(_: str, block: Any, attention: Any, projection: str) -> OutputGate:
        return OutputGate(block, attention, projection, 1)

    monkeypatch.setattr(OutputGate, "read", read)
    # Before taps are placed, the device is known by the configuration alone.
    monkeypatch.setitem(vars(loaded.config.device_config), "device_type", "cuda")
    assert refusal(loaded) == "traces are not supported with an output gate on a GPU"
    for family in ("afmoe", "laguna", "laguna_elements"):
        measured("families", FAMILY_NAMES[family], gpu="refused")


def test_models_without_taps(loaded: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(loaded.model, "_flashtrace_taps")
    assert refusal(loaded) == "the model was loaded without taps"


def set_impl(**arguments: Any) -> Change:
    return lambda layer, patch: patch.setattr(layer, "impl", implementation(**arguments))


def set_layer(**attributes: Any) -> Change:
    def change(layer: Any, patch: pytest.MonkeyPatch) -> None:
        for name, value in attributes.items():
            owner = layer._buffers if name in layer._buffers else layer.__dict__
            patch.setitem(owner, name, value)

    return change


def set_backend(backend: Any) -> Change:
    return lambda layer, patch: patch.setattr(
        layer, "attn_backend", backend(layer.attn_backend) if callable(backend) else backend
    )


def other_impl(layer: Any, patch: pytest.MonkeyPatch) -> None:
    stock = TritonAttentionImpl(4, 32, 32**-0.5, 2, None, None, "auto")
    patch.setattr(layer, "impl", stock)


def derived(backend: Any) -> Any:
    return create_chunked_local_attention_backend(backend, 16)


LAYERS: dict[str, tuple[Change, str]] = {
    "impl": (other_impl, "on the TRITON_ATTN backend"),
    "derived": (set_backend(derived), "on the ChunkedLocalAttention_16_"),
    "alibi sqrt": (
        set_impl(alibi_slopes=SLOPES, use_alibi_sqrt=True),
        "ALiBi of square roots",
    ),
    "alibi and sinks": (
        set_impl(alibi_slopes=SLOPES, sinks=torch.zeros(4)),
        "ALiBi and attention sinks",
    ),
    "lookback": (set_impl(chunk_lookback=1), "chunks that see earlier ones"),
    "window both ways": (
        set_impl(sliding_window=8, attn_type=AttentionType.ENCODER),
        "a sliding window of (7, 7)",
    ),
    "mm prefix": (set_layer(use_mm_prefix=True), "attention to later image tokens"),
    "encoder": (set_layer(attn_type=AttentionType.ENCODER_ONLY), "encoder_only attention"),
    "sharing": (
        set_layer(kv_sharing_target_layer_name="model.layers.1.self_attn.attn"),
        "KV sharing between layers",
    ),
    "value size": (set_layer(head_size_v=16), "values of another size than keys"),
    "scales per head": (
        set_layer(_k_scale=torch.ones(2), kv_cache_dtype="fp8"),
        "KV cache scales per head",
    ),
    "query scales per head": (
        set_layer(_q_scale=torch.ones(2), kv_cache_dtype="fp8"),
        "KV cache scales per head",
    ),
    "scales without fp8": (set_layer(_v_scale_float=0.5), "for a KV cache that is not quantized"),
    "no scale": (
        set_layer(_k_scale_float=0.0, kv_cache_dtype="fp8"),
        "KV cache scales CacheScales(query=1.0, key=0.0",
    ),
    "unknown scale": (
        set_layer(_v_scale_float=float("nan"), kv_cache_dtype="fp8"),
        "KV cache scales CacheScales(query=1.0, key=1.0, value=nan",
    ),
    **{
        dtype: (set_layer(kv_cache_dtype=dtype), f"KV cache dtype {dtype} on the TRITON_ATTN")
        for dtype in ("fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "nvfp4")
    },
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(loaded: V2Engine, layer: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, feature = LAYERS[case]
    change(layer, monkeypatch)
    message = refusal(loaded)
    assert message.startswith("traces are not supported ") and feature in message


def test_output_projections(loaded: V2Engine, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    projection = loaded.model.model.layers[2].self_attn.o_proj
    with monkeypatch.context() as patch:
        patch.setattr(projection, "quant_method", TorchAOLinearMethod(None))
        assert "an output projection quantized by TorchAOLinearMethod (model" in refusal(loaded)
    for weight in (
        torch.zeros(128, 127),
        torch.zeros(128, 128, dtype=torch.float64),
        torch.zeros(0),
        torch.zeros(128, 128, device="meta"),
    ):
        with monkeypatch.context() as patch:
            parameter = nn.Parameter(weight, requires_grad=False)
            patch.setitem(projection._parameters, "weight", parameter)
            message = refusal(loaded)
            assert f"output projection of {weight.dtype} {tuple(weight.shape)}" in message


FLASHINFER: dict[str, dict[str, Any]] = {
    "ALiBi on the FLASHINFER backend": {"alibi_slopes": SLOPES},
    "soft-capped logits on the FLASHINFER backend": {"logits_soft_cap": 30.0},
}
CAPABILITIES = ("is_device_capability", "is_device_capability_family")


def test_flashinfer(loaded: V2Engine, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashinfer_names(), set_current_vllm_config(loaded.config):
        monkeypatch.setattr(layer, "attn_backend", backend_class("FLASHINFER"))
        for feature, arguments in FLASHINFER.items():
            monkeypatch.setattr(layer, "impl", implementation("FLASHINFER", **arguments))
            assert feature in refusal(loaded)
        monkeypatch.setattr(layer, "impl", implementation("FLASHINFER", kv_cache_dtype="fp8"))
        monkeypatch.setattr(layer, "kv_cache_dtype", "fp8")
        traced_model(loaded)
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_v_scale_float", 0.5)
            assert "fp8 scales on the FLASHINFER backend without quantized" in refusal(loaded)
            patch.setattr(layer, "query_quant", object())
            traced_model(loaded)
        for capability in CAPABILITIES:
            asked = {name: lambda _: False for name in CAPABILITIES}
            asked[capability] = lambda major: major in (90, 100)
            with monkeypatch.context() as patch:
                platform = "vllm_flashtrace.worker.gpu_model.current_platform"
                patch.setattr(platform, SimpleNamespace(**asked))
                assert "for which FlashInfer quantizes the queries" in refusal(loaded)
                attention = loaded.config.attention_config.__dict__
                patch.setitem(attention, "disable_flashinfer_q_quantization", True)
                traced_model(loaded)


def test_refusals_are_part_of_a_report(
    loaded: V2Engine, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that changes after the first trace fails the next one by name."""
    apply_patches(monkeypatch)
    engine = V2Engine(loaded.model, loaded.config, loaded.layout)
    first, second = traced(40, (20, 40)), traced(40, (20, 40))
    engine.step({"first": 40}, new={"first": first.new})
    assert engine.report(first).scores.sum() > 0
    monkeypatch.setattr(layer, "_k_scale_float", 0.5)
    engine.step({"second": 40}, new={"second": second.new})
    with pytest.raises(TraceError, match="not quantized") as caught:
        engine.report(second)
    assert caught.value.code == "unsupported_model"
