"""Which of vLLM's schemes of a linear layer are read, by the classes that apply them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.modelopt import ModelOptLinearMethod
from vllm.model_executor.layers.quantization.online.mxfp4 import Mxfp4OnlineLinearMethod
from vllm.model_executor.layers.quantization.quark.quark import QuarkLinearMethod
from vllm.model_executor.layers.quantization.torchao import TorchAOLinearMethod

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.worker.quantized import quantization_of

READ = {
    "compressed-tensors NVFP4": ("W4A4Fp4", "MarlinNvFp4LinearKernel"),
    "compressed-tensors MXFP4": ("W4A4Mxfp4", "MarlinMxFp4LinearKernel"),
    "compressed-tensors MXFP8": ("W8A8Mxfp8", "MarlinMxfp8LinearKernel"),
}
REFUSED = [
    ("W4A4Fp4", "EmulationNvFp4LinearKernel"),
    ("W4A4Fp4", "CutlassNvFp4LinearKernel"),
    ("W4A4Mxfp4", "FlashInferMxFp4LinearKernel"),
    ("W8A8Mxfp8", "FlashInferCutlassMxfp8LinearKernel"),
]
OTHERS = [
    schemes.CompressedTensorsW4A8Fp8,
    schemes.CompressedTensorsW4A8Mxfp4,
    schemes.CompressedTensorsWNA4Int,
    schemes.CompressedTensorsWNA8Int,
    schemes.CompressedTensorsWNA8O8Int,
    ModelOptLinearMethod,
    Mxfp4OnlineLinearMethod,
    QuarkLinearMethod,
    TorchAOLinearMethod,
]


def bare(kind: type, **attributes: Any) -> Any:
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


def layer_of(kind: type, kernel: str = "", bias: Any = None) -> Any:
    attributes = {"kernel": bare(getattr(linear, kernel))} if kernel else {}
    scheme = bare(kind, **attributes)
    compressed = kind.__name__.startswith("CompressedTensors")
    method = bare(CompressedTensorsLinearMethod) if compressed else scheme
    return SimpleNamespace(quant_method=method, scheme=scheme, bias=bias)


def compressed(name: str) -> type:
    return getattr(schemes, f"CompressedTensors{name}")  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", READ)
def test_kernels_that_leave_activations(name: str) -> None:
    kind, kernel = READ[name]
    found = quantization_of(layer_of(compressed(kind), kernel))
    assert found is not None and found.name == name
    assert not found.rounds_inputs and not found.by_batch


@pytest.mark.parametrize(("kind", "kernel"), REFUSED)
def test_kernels_that_round_them(kind: str, kernel: str) -> None:
    named = rf"by CompressedTensors{kind} \({kernel}\) with quantized activations"
    with pytest.raises(UnsupportedModelError, match=named):
        quantization_of(layer_of(compressed(kind), kernel))


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_other_schemes(kind: type) -> None:
    with pytest.raises(UnsupportedModelError, match=f"quantized by {kind.__name__}"):
        quantization_of(layer_of(kind))


def test_a_bias_within_the_weights() -> None:
    found = quantization_of(layer_of(schemes.CompressedTensorsW4A8Int))
    assert found is not None and found.rounds_inputs
    with pytest.raises(UnsupportedModelError, match="with a bias, which its kernel adds unasked"):
        quantization_of(layer_of(schemes.CompressedTensorsW4A8Int, bias=torch.zeros(1)))
