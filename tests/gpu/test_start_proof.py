"""The proof at the start on a GPU worker: V2 runner, each backend, an fp8 cache."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from tests.gpu.standin import BACKENDS
from tests.gpu.test_fp8_cache import SCALES, layers, quantize_queries
from tests.gpu.v2_engine import V2Engine, apply_patches, v2_engine
from vllm_flashtrace.worker import start_proof
from vllm_flashtrace.worker.gpu_model import GPUTracedModel
from vllm_flashtrace.worker.runner import worker_report
from vllm_flashtrace.worker.start_proof import default_limit, prove


def worker(engine: V2Engine) -> Any:
    runner = engine.runner

    def sample_tokens(_: Any) -> None:
        runner.execute_model_state = None

    return SimpleNamespace(
        vllm_config=engine.config,
        model_runner=runner,
        execute_model=lambda output: runner.execute_model(output, None),
        sample_tokens=sample_tokens,
    )


def proof(engine: V2Engine) -> dict[str, Any]:
    made = worker(engine)
    prove(made)
    return worker_report(made)["proof"]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_backends(backend: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with v2_engine(tiny_llama, monkeypatch, backend) as engine:
        apply_patches(monkeypatch)
        caches = [layer.kv_cache for layer in layers(engine)]
        for cache in caches:
            cache.normal_(generator=torch.Generator().manual_seed(1))
        before = [cache.clone() for cache in caches]
        report = proof(engine)
        assert report["refusal"] is None and 0 < report["largest_error"] < 1e-5, report
        assert all(map(torch.equal, caches, before))
        assert not engine.runner.requests
        stock = GPUTracedModel.read_values

        def swapped(self: GPUTracedModel, index: int, *args: Any) -> torch.Tensor:
            values = stock(self, index, *args)
            return values.flip(1) if index == 3 else values

        monkeypatch.setattr(GPUTracedModel, "read_values", swapped)
        assert "failed in layer 3" in proof(engine)["refusal"]


def test_a_kv_connector_is_left_out(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no request that the scheduler has not told it of."""
    with v2_engine(tiny_llama, monkeypatch, "FLASH_ATTN") as engine:
        apply_patches(monkeypatch)
        agent: Any = SimpleNamespace(
            register_kv_caches=lambda _: None, set_host_xfer_buffer_ops=lambda _: None
        )
        monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", agent)
        monkeypatch.setattr(engine.runner, "kv_connector", ActiveKVConnector(engine.config, {}))
        assert proof(engine)["refusal"] is None
        assert kv_transfer_state._KV_CONNECTOR_AGENT is agent
        assert not engine.runner.kv_connector._disabled
        monkeypatch.setattr(start_proof, "_without_connector", nullcontext)
        assert "could not be run" in proof(engine)["refusal"]


def test_an_fp8_cache(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are part of what is read: with the wrong one of keys or values the proof fails."""
    with v2_engine(tiny_llama, monkeypatch, "TRITON_ATTN", kv_cache_dtype="fp8") as engine:
        apply_patches(monkeypatch)
        quantize_queries(engine, True)
        for layer in layers(engine):
            for name, scale in SCALES.items():
                getattr(layer, name).fill_(scale)
                setattr(layer, f"{name}_float", float(getattr(layer, name)))
        report = proof(engine)
        assert report["refusal"] is None and report["limit"] == 0.1
        assert report["largest_error"] < 1e-5
        for name in ("_k_scale", "_v_scale"):
            with monkeypatch.context() as patch:
                patch.setattr(layers(engine)[1], f"{name}_float", 1.5 * SCALES[name])
                assert "failed in layer 1" in proof(engine)["refusal"]


@pytest.mark.parametrize(
    ("device", "dtype", "cache", "limit"),
    [
        ("cpu", torch.float32, "auto", 1e-4),
        ("cpu", torch.float32, "fp8", 1e-4),  # Its kernel computes in floats.
        ("cuda", torch.float32, "auto", 1e-2),  # TF32.
        ("cuda", torch.bfloat16, "auto", 3e-2),
        ("cuda", torch.float32, "fp8_e5m2", 0.1),
    ],
)
def test_the_limit_goes_by_the_coarsest_numbers(
    device: str, dtype: torch.dtype, cache: str, limit: float
) -> None:
    name = "CPU_ATTN" if device == "cpu" else "FLASHINFER"
    backend = SimpleNamespace(get_name=lambda: name)
    layer = SimpleNamespace(attention=SimpleNamespace(kv_cache_dtype=cache, attn_backend=backend))
    model: Any = SimpleNamespace(device=torch.device(device), layers=[layer])
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    assert default_limit(model, config) == limit
