"""Keys and values of latent attention, from latents in scattered blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_flashtrace.worker import latents
from vllm_flashtrace.worker.cpu_cache import Scratch
from vllm_flashtrace.worker.latents import latent_keys, latent_values

HEADS, LATENT, ROTATED, PLAIN, VALUE = 3, 10, 4, 6, 5
BLOCK_SIZE, BLOCKS = 4, [5, 2, 3, 7]


class Layer:
    """What is read of vLLM's layer."""

    num_heads, kv_lora_rank, qk_rope_head_dim = HEADS, LATENT, ROTATED
    qk_nope_head_dim, v_head_dim, qk_head_dim = PLAIN, VALUE, PLAIN + ROTATED

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.kv_cache = torch.randn(9, BLOCK_SIZE, LATENT + ROTATED).to(dtype)
        self.kv_b_proj = nn.Linear(LATENT, HEADS * (PLAIN + VALUE), bias=False, dtype=dtype)
        self.kv_b_proj.quant_method = UnquantizedLinearMethod()

    def token(self, place: int) -> torch.Tensor:
        return self.kv_cache[BLOCKS[place // BLOCK_SIZE], place % BLOCK_SIZE]


class Quantized:
    """A method whose layer is applied as it is, and has no weight to be read."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.detach()

    def apply(self, _: Any, latents: torch.Tensor) -> torch.Tensor:
        assert latents.is_contiguous() and len(latents) <= 2
        return latents @ self._weight.t()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("length", [1, 4, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_the_layer_projects_them(
    length: int, dtype: torch.dtype, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer: Any = Layer(dtype)
    if quantized:
        layer.kv_b_proj.quant_method = Quantized(layer.kv_b_proj.weight)
        monkeypatch.setattr(latents, "_PROJECTED", 2)
    cached = layer.kv_cache.clone()
    tokens = torch.stack([layer.token(place) for place in range(length)])
    projected = layer.kv_b_proj(tokens[:, :LATENT]).detach().view(length, HEADS, -1)
    keys = torch.cat([projected[..., :PLAIN], tokens[:, None, LATENT:].expand(-1, HEADS, -1)], -1)
    near = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    scratch = Scratch()
    found = latent_keys(layer, BLOCKS, length, scratch, slice(None))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.permute(2, 0, 1), keys.float(), **near)
    found.zero_()  # As column sums may do.
    monkeypatch.setattr(latents, "_GATHERED", 3)
    some = latent_keys(layer, BLOCKS, length, scratch, slice(1, 3))
    torch.testing.assert_close(some.permute(2, 0, 1), keys[:, 1:].float(), **near)
    for first, last in ((0, length), (length // 2, length)):
        values = latent_values(layer, BLOCKS, first, last, scratch)
        assert values.transpose(0, 1).is_contiguous()
        torch.testing.assert_close(values, projected[first:last, :, PLAIN:].float(), **near)
    assert torch.equal(layer.kv_cache, cached)
