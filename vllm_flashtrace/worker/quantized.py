"""``M`` of an output projection whose weights are quantised, got from the layer itself.

A quantised layer is linear in what its kernel multiplies: its inputs, rounded to eight bits where
the scheme quantises activations. So the layer, applied to multiples of unit vectors that this
rounding leaves as they are, gives its matrix in its own arithmetic, however the kernel has packed
or transposed the weights, and whatever blocks of them share a scale. Where each token, group or
batch has a scale of its own, the unit vector itself is such a multiple, because the largest number
of a row or group is the largest of the type, and a group of zeros stays one. Where the scale is
static, it is a whole multiple of that scale.

Rounding to four bits leaves too little to prove anything by, so those schemes are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_flashtrace.base.errors import UnsupportedModelError

# vLLM's methods and compressed-tensors' schemes: weights alone, or activations of eight bits too.
_WEIGHT_ONLY = {
    "AutoAWQMarlinLinearMethod": "AWQ",
    "AutoAWQLinearMethod": "AWQ",
    "AutoGPTQLinearMethod": "GPTQ",
    "CompressedTensorsWNA16": "compressed-tensors WNA16",
    "CompressedTensorsW8A16Fp8": "compressed-tensors FP8 W8A16",
}
_EIGHT_BITS = {
    "Fp8LinearMethod": "FP8",
    "Fp8PerTensorOnlineLinearMethod": "FP8 per tensor, made while loading",
    "Fp8PtpcOnlineLinearMethod": "FP8 per channel, made while loading",
    "Fp8PerBlockOnlineLinearMethod": "FP8 in blocks, made while loading",
    "CompressedTensorsW8A8Int8": "compressed-tensors int8 W8A8",
    "CompressedTensorsW8A8Fp8": "compressed-tensors FP8 W8A8",
    "CompressedTensorsW4A8Int": "compressed-tensors int W4A8",
}
_PACKS_ITS_BIAS = "CompressedTensorsW4A8Int"
# Those whose kernel decides whether activations are rounded, and to how many bits.
_BY_KERNEL = {
    "CompressedTensorsW4A4Fp4": "compressed-tensors NVFP4",
    "CompressedTensorsW4A4Mxfp4": "compressed-tensors MXFP4",
    "CompressedTensorsW8A8Mxfp8": "compressed-tensors MXFP8",
}
# Kernels that leave activations as they are, though the checkpoint says how to quantise them.
_WEIGHT_ONLY_KERNELS = (
    "CPUFp8BlockScaledMMKernel",
    "CPUFp8PerTensorScaledMMLinearKernel",
    "EmulationMxfp8LinearKernel",
    "MarlinFP8ScaledMMLinearKernel",
    "MarlinMxFp4LinearKernel",
    "MarlinMxfp8LinearKernel",
    "MarlinNvFp4LinearKernel",
    "XPUW8A16FP8LinearKernel",
)

_ROWS = 256
"""Unit vectors that a layer is applied to at a time."""

_MULTIPLE = 64
"""Of a static scale; int8 and both eight-bit floats have it, and it is within their range."""

_PROBES = 4
_SEED = 1402


@dataclass(frozen=True, slots=True)
class Quantization:
    """How an output projection is quantised.

    Attributes:
        name: The scheme's name.
        rounds_inputs: Whether its kernel rounds activations to eight bits.
        by_batch: Whether the scale of that rounding is one for all rows of a step.
    """

    name: str
    rounds_inputs: bool
    by_batch: bool = False


def quantization_of(
    projection: nn.Module, what: str = "an output projection"
) -> Quantization | None:
    """How a linear layer is quantised; None if it is not.

    Args:
        projection: The layer.
        what: What a message calls it.

    Raises:
        UnsupportedModelError: Its scheme is not one whose matrix can be had; the message names it.
    """
    layer: Any = projection
    method = layer.quant_method
    if isinstance(method, UnquantizedLinearMethod):
        return None
    compressed = type(method).__name__ == "CompressedTensorsLinearMethod"
    scheme = layer.scheme if compressed else method
    kind = type(scheme).__name__
    if type(scheme).__module__.startswith("vllm."):
        if kind in _WEIGHT_ONLY and not _rounds_to_eight_bits(layer, scheme):
            return Quantization(_WEIGHT_ONLY[kind], rounds_inputs=False)
        if kind == _PACKS_ITS_BIAS and layer.bias is not None:
            kind += " with a bias, which its kernel adds unasked"
        elif kind in _EIGHT_BITS:
            kernel = getattr(scheme, "fp8_linear", None)
            blocks = getattr(layer, "weight_block_size", None) is not None
            name = _EIGHT_BITS[kind]
            name += " in blocks" if blocks and "in blocks" not in name else ""
            rounds = type(kernel).__name__ not in _WEIGHT_ONLY_KERNELS
            # Marlin's may be told to round them (`VLLM_MARLIN_INPUT_DTYPE`).
            rounds = rounds or getattr(kernel, "marlin_input_dtype", None) is not None
            return Quantization(name, rounds, rounds and _has_one_scale(kernel))
        kernel = type(getattr(scheme, "kernel", None)).__name__
        if kind in _BY_KERNEL and kernel in _WEIGHT_ONLY_KERNELS:
            return Quantization(_BY_KERNEL[kind], rounds_inputs=False)
        if kind in _BY_KERNEL:
            kind = f"{kind} ({kernel})"
    rounds = kind in _WEIGHT_ONLY or kind.startswith(tuple(_BY_KERNEL))
    raise UnsupportedModelError(
        f"traces are not supported with {what} quantized by {kind}"
        + (" with quantized activations" if rounds else "")
    )


def dequantize(projection: nn.Module, quantization: Quantization, out: Tensor) -> None:
    """Writes the matrix of a quantised layer, without its bias; never waits for a GPU.

    Takes memory for `_ROWS` rows beside ``out``.

    Args:
        projection: The layer.
        quantization: How it is quantised.
        out: ``[D, H * d]``, of the type that the layer computes with.
    """
    layer: Any = projection
    multiple, unit = _unit(layer, quantization, out)
    width = out.shape[1]
    for start in range(0, width, _ROWS):
        places = torch.arange(start, min(start + _ROWS, width), device=out.device)
        rows = torch.zeros(len(places), width, dtype=out.dtype, device=out.device)
        rows.scatter_(1, places[:, None], multiple.expand(len(places), 1))
        product = layer.quant_method.apply(layer, rows)
        out[:, start : start + len(places)] = (product.float() / unit).t()


def applied_bias(projection: nn.Module, quantization: Quantization) -> Tensor:
    """The bias that a quantised layer adds, float32 ``[D]``: its kernel may keep it permuted."""
    layer: Any = projection
    width = layer.input_size_per_partition
    row = torch.zeros(1, width, dtype=layer.params_dtype, device=layer.bias.device)
    row[:, 0] = _unit(layer, quantization, row)[0].flatten()
    with_bias = layer.quant_method.apply(layer, row, layer.bias)
    return (with_bias.float() - layer.quant_method.apply(layer, row).float())[0]


def product_error(
    projection: nn.Module, quantization: Quantization, weight: Tensor, gain: Tensor | None = None
) -> float:
    """How far a layer's products are from those of the matrix that was read of it.

    The inputs are sums of what `dequantize` uses, so that no rounding of activations hides a wrong
    channel or group.

    Args:
        projection: The layer.
        quantization: How it is quantised.
        weight: ``[D, H * d]``, what was read, times the gain.
        gain: ``[D]``, of a norm behind the layer, or None.

    Returns:
        The largest difference of any number, relative to the norm of its row of ``weight``.
    """
    layer: Any = projection
    bits = torch.Generator().manual_seed(_SEED)
    rows = torch.randint(2, (_PROBES, weight.shape[1]), generator=bits)
    rows = rows.to(weight.device, layer.params_dtype)
    multiple, unit = _unit(layer, quantization, rows)
    product = layer.quant_method.apply(layer, rows * multiple).double() / unit.double()
    product = product if gain is None else product * gain.double()
    expected = rows.double() @ weight.double().t()
    norms = weight.double().norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
    error = float(((product - expected).abs() / norms).max())
    return error if error == error else float("inf")


def packed_int8(module: nn.Module) -> object | None:
    """What holds an int8 matrix that the CPU backend has packed with oneDNN, which is not changed.

    vLLM then drops ``weight``, and makes another when it packs new weights.
    """
    kernel = getattr(getattr(module, "scheme", None), "kernel", None)
    return getattr(kernel, "dnnl_handler", None)


def _rounds_to_eight_bits(layer: Any, scheme: Any) -> bool:
    """Whether a kernel for weights of few bits was told to round activations too."""
    config = getattr(getattr(scheme, "kernel", None), "config", None)
    act_type = getattr(config, "act_type", None)
    return bool(getattr(layer, "use_w4a8", False)) or (
        act_type is not None and act_type.itemsize == 1
    )


def _has_one_scale(kernel: Any) -> bool:
    """Whether a kernel takes the scale of its inputs from all of them together."""
    key = getattr(getattr(kernel, "config", None), "activation_quant_key", None)
    return key is not None and not key.scale.static and key.scale.group_shape.is_per_tensor()


def _unit(layer: Any, quantization: Quantization, like: Tensor) -> tuple[Tensor, Tensor]:
    """The multiple of a unit vector to apply a layer to, and what its kernel takes it for."""
    scale = getattr(layer, "input_scale", None) if quantization.rounds_inputs else None
    if scale is None:
        one = torch.ones(1, 1, dtype=like.dtype, device=like.device)
        return one, one.float()
    unit = scale.detach().float().max() * _MULTIPLE
    zero_point = getattr(layer, "input_zero_point", None)
    if zero_point is not None:  # Away from the end of the range that it has moved to.
        unit = torch.where(zero_point.max() > 0, -unit, unit)
    return unit.to(like.dtype).reshape(1, 1), unit.reshape(1, 1)
