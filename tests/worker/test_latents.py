"""Keys and values of latent attention, from latents in scattered blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_flashtrace.worker import latents
from vllm_flashtrace.worker.latents import write_keys, write_values

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
    cached, table = layer.kv_cache.clone(), torch.tensor(BLOCKS, dtype=torch.int32)
    tokens = torch.stack([layer.token(place) for place in range(length)])
    projected = layer.kv_b_proj(tokens[:, :LATENT]).detach().view(length, HEADS, -1)
    keys = torch.cat([projected[..., :PLAIN], tokens[:, None, LATENT:].expand(-1, HEADS, -1)], -1)
    near = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    monkeypatch.setattr(latents, "_GATHERED", 3)
    for heads in (slice(None), slice(1, 3)):
        shape = len(keys[0, heads]), length, PLAIN + ROTATED
        for found in (torch.empty(shape), torch.empty(shape).transpose(1, 2).contiguous().mT):
            write_keys(layer, table, length, heads, found)
            torch.testing.assert_close(found.transpose(0, 1), keys[:, heads].float(), **near)
        at_once = torch.empty(shape, dtype=dtype)
        write_keys(layer, table, length, heads, at_once, one_launch=True)
        torch.testing.assert_close(at_once.transpose(0, 1), keys[:, heads], **near)
    for first, last in ((0, length), (length // 2, length)):
        for one_launch, kind in ((False, torch.float32), (True, dtype)):
            values = torch.empty(HEADS, last - first, VALUE, dtype=kind)
            write_values(layer, table, first, last, values, one_launch=one_launch)
            expected = projected[first:last, :, PLAIN:].to(kind)
            torch.testing.assert_close(values.transpose(0, 1), expected, **near)
    assert torch.equal(layer.kv_cache, cached)
