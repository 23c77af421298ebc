"""Tiny random models in quantised checkpoints, beside the same weights dequantised.

Every tensor is written as its format defines it, without code of vLLM or of a quantiser, so that
the reference does not share a mistake with the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.tiny_models import Family, make_tiny_model

GROUP = 32
"""Input features that share a scale, where a scheme has groups."""

_PACK = 8  # Numbers of four bits in an int32.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MXFP4_SHARED = 32  # Inputs that share an exponent.
_NVFP4_SHARED, _NVFP4_GLOBAL = 16, 1024.0
_FP8, _FP8_MAX, _INT8_MAX = torch.float8_e4m3fn, 448.0, 127

Activations = Literal[
    "int8", "int8 asymmetric", "int8 static", "fp8", "fp8 static", "fp8 in groups"
]


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised.

    Attributes:
        config: Its ``quantization_config``.
        write: Makes of ``weight`` ``[out, in]`` the tensors of the checkpoint, by suffix, and the
            weight dequantised.
        activations: How the inputs of linear layers are quantised.
        skipped: Ends of the names of projections that are not quantised.
    """

    config: dict[str, Any]
    write: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
    activations: Activations | None = None
    skipped: tuple[str, ...] = ()


def _pack(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(_PACK))) -> Tensor:
    """Packs numbers of four bits along a dimension; ``order[i]`` is the number at bits 4i."""
    blocks = numbers.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, _PACK))
    packed = sum(blocks[..., source] << 4 * place for place, source in enumerate(order))
    assert isinstance(packed, Tensor)
    packed = packed - ((packed >> 31) << 32)  # As a signed number of 32 bits.
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def _symmetric_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from -8 to 7 ``[out, in]``, scales ``[out, groups]``, and the weight they make."""
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).bfloat16().float()
    numbers = (groups / scales[..., None]).round().clamp(-8, 7)
    return numbers.flatten(1), scales, (numbers * scales[..., None]).flatten(1)


def _gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scales, dequantized = _symmetric_groups(weight)
    tensors = {
        "qweight": _pack(numbers.t() + 8, 0),
        "scales": scales.t().half().contiguous(),
        # The format keeps zero points less one.
        "qzeros": _pack(torch.full_like(scales.t(), 7), 1),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, dequantized


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).bfloat16().float()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    tensors = {
        "qweight": _pack(numbers.flatten(1).t(), 1, _AWQ_ORDER),
        "scales": scales.t().half().contiguous(),
        "qzeros": _pack(zeros.t(), 1, _AWQ_ORDER),
    }
    return tensors, ((numbers - zeros[..., None]) * scales[..., None]).flatten(1)


def _packed_groups(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scales, dequantized = _symmetric_groups(weight)
    tensors = {
        "weight_packed": _pack(numbers + 8, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, dequantized


def _int8_channels(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    # Not to 127: oneDNN's products of larger numbers saturate on CPUs without VNNI.
    scales = weight.abs().amax(1, keepdim=True) / 63
    numbers = (weight / scales).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scales}, numbers * scales


def _fp8(scales: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    numbers = (weight / scales).to(_FP8)
    return {"weight": numbers, "weight_scale": scales}, numbers.float() * scales


def _fp8_tensor(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    # One scale for all: vLLM would quantise again what it fuses if that had several.
    return _fp8(torch.tensor(0.6 / _FP8_MAX), weight)


def _fp8_channels(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return _fp8(weight.abs().amax(1, keepdim=True) / _FP8_MAX, weight)


def _fp8_blocks(
    weight: Tensor, columns: int = GROUP, name: str = "weight_scale_inv"
) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks of `GROUP` output channels and ``columns`` inputs share a scale."""
    blocks = weight.unflatten(0, (-1, GROUP)).unflatten(2, (-1, columns))
    scales = blocks.abs().amax((1, 3)) / _FP8_MAX
    every = scales.repeat_interleave(GROUP, 0).repeat_interleave(columns, 1)
    numbers = (weight / every).to(_FP8)
    return {"weight": numbers, name: scales}, numbers.float() * every


def _nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Groups of 16 inputs share a scale of eight bits, all of them one of 32."""
    numbers = weight.unflatten(1, (-1, _NVFP4_SHARED))
    scales = (numbers.abs().amax(-1) / 6 * _NVFP4_GLOBAL).to(_FP8)
    codes, nearest = _nearest_fp4(numbers / (scales.float() / _NVFP4_GLOBAL)[..., None])
    tensors = {
        "weight_packed": _packed_fp4(codes.flatten(1)),
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([_NVFP4_GLOBAL]),
    }
    return tensors, (nearest * (scales.float() / _NVFP4_GLOBAL)[..., None]).flatten(1)


def _mxfp4_weight(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    packed, exponents, dequantized = _mxfp4(weight)
    return {"weight_packed": packed.flatten(-2), "weight_scale": exponents}, dequantized


def _mxfp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    exponents = (groups.abs().amax(-1) / _FP8_MAX).log2().ceil()
    numbers = (groups / exponents.exp2()[..., None]).to(_FP8)
    tensors = {"weight": numbers.flatten(1), "weight_scale": (exponents + 127).to(torch.uint8)}
    return tensors, (numbers.float() * exponents.exp2()[..., None]).flatten(1)


def _four_bits_in_eight(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scales, dequantized = _symmetric_groups(weight)
    return {"weight": numbers.to(torch.int8), "weight_scale": scales}, dequantized


def _with_input_scale(
    write: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], scale: float
) -> Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]:
    def both(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, dequantized = write(weight)
        return {**tensors, "input_scale": torch.tensor([scale])}, dequantized

    return both


def _compressed(
    form: str,
    weights: dict[str, Any],
    activations: dict[str, Any] | None = None,
    skipped: tuple[str, ...] = (),
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *skipped],
        "config_groups": {"group_0": group},
    }


def _numbers(bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **others}


def _blocks(columns: int) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [GROUP, columns],
    }


# Of the scales of static activations: inputs of a tiny model's linear layers are within ±8.
_INT8_STATIC, _FP8_STATIC = 8 / 127, 8 / 448

_WIDE = 128

_SKIPPED = ("model.layers.1.self_attn.o_proj", "model.layers.2.self_attn.o_proj")

_MXFP8 = _numbers(8, "float", "group", group_size=GROUP, scale_dtype="torch.uint8")

SCHEMES: dict[str, Scheme] = {
    "AWQ": Scheme(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        _awq,
    ),
    "GPTQ": Scheme(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
        },
        _gptq,
    ),
    "compressed-tensors W4A16": Scheme(
        _compressed("pack-quantized", _numbers(4, "int", "group", group_size=GROUP)),
        _packed_groups,
    ),
    "compressed-tensors int8 W8A8": Scheme(
        _compressed(
            "int-quantized",
            _numbers(8, "int", "channel"),
            _numbers(8, "int", "token", dynamic=True),
        ),
        _int8_channels,
        "int8",
    ),
    "compressed-tensors int8 W8A8, asymmetric activations": Scheme(
        _compressed(
            "int-quantized",
            _numbers(8, "int", "channel"),
            {**_numbers(8, "int", "token", dynamic=True), "symmetric": False},
        ),
        _int8_channels,
        "int8 asymmetric",
    ),
    "compressed-tensors int8 W8A8 in some layers, static activations": Scheme(
        _compressed(
            "int-quantized", _numbers(8, "int", "channel"), _numbers(8, "int", "tensor"), _SKIPPED
        ),
        _with_input_scale(_int8_channels, _INT8_STATIC),
        "int8 static",
        skipped=_SKIPPED,
    ),
    "compressed-tensors FP8 W8A8": Scheme(
        _compressed(
            "float-quantized",
            _numbers(8, "float", "channel"),
            _numbers(8, "float", "token", dynamic=True),
        ),
        _fp8_channels,
        "fp8",
    ),
    "FP8 per tensor, static activations": Scheme(
        {"quant_method": "fp8", "activation_scheme": "static"},
        _with_input_scale(_fp8_tensor, _FP8_STATIC),
        "fp8 static",
    ),
    "FP8 in blocks": Scheme(_blocks(GROUP), _fp8_blocks, "fp8 in groups"),
    # The blocks that vLLM's kernel for CPUs takes.
    "FP8 in blocks, activations in 16 bits": Scheme(
        _blocks(_WIDE), partial(_fp8_blocks, columns=_WIDE)
    ),
    "compressed-tensors FP8 W8A8 in blocks": Scheme(
        _compressed(
            "float-quantized",
            _numbers(8, "float", "block", block_structure=[GROUP, GROUP]),
            _numbers(8, "float", "group", group_size=GROUP, dynamic=True),
        ),
        partial(_fp8_blocks, name="weight_scale"),
        "fp8 in groups",
    ),
    "compressed-tensors FP8 W8A16": Scheme(
        _compressed("float-quantized", _numbers(8, "float", "channel")), _fp8_channels
    ),
    "compressed-tensors int W4A8": Scheme(
        _compressed(
            "int-quantized",
            _numbers(4, "int", "group", group_size=GROUP),
            {**_numbers(8, "int", "token", dynamic=True), "symmetric": False},
        ),
        _four_bits_in_eight,
        "int8 asymmetric",
    ),
    "compressed-tensors MXFP8, activations in 16 bits": Scheme(
        _compressed("mxfp8-quantized", _MXFP8, {**_MXFP8, "dynamic": True}), _mxfp8
    ),
    "compressed-tensors MXFP4, activations in 16 bits": Scheme(
        _compressed(
            "mxfp4-pack-quantized",
            _numbers(4, "float", "group", group_size=GROUP, scale_dtype="torch.uint8"),
        ),
        _mxfp4_weight,
    ),
    "compressed-tensors NVFP4 W4A16": Scheme(
        _compressed(
            "nvfp4-pack-quantized", _numbers(4, "float", "tensor_group", group_size=_NVFP4_SHARED)
        ),
        _nvfp4,
    ),
}


def rounded(numbers: Tensor, activations: Activations) -> Tensor:
    """Activations as a scheme rounds them, ``[..., features]``."""
    if activations == "int8 asymmetric":
        low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round()
        return (((numbers / scale).round() + zero).clamp(-128, 127) - zero) * scale
    if activations == "fp8 in groups":
        return rounded(numbers.unflatten(-1, (-1, GROUP)), "fp8").flatten(-2)
    largest = numbers.abs().amax(-1, keepdim=True)
    if activations.startswith("int8"):
        scale = largest / _INT8_MAX if activations == "int8" else torch.tensor(_INT8_STATIC)
        return (numbers / scale).round().clamp(-128, 127) * scale
    scale = torch.tensor(_FP8_STATIC) if activations == "fp8 static" else largest / _FP8_MAX
    eight = (numbers / scale).clamp(-_FP8_MAX, _FP8_MAX).float().to(_FP8)
    return eight.to(numbers.dtype) * scale


def truncated(numbers: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers as vLLM's CPU backend turns them into eight bits: rounded towards zero."""
    largest = torch.finfo(kind).max
    nearest = numbers.float().clamp(-largest, largest).to(kind)
    beyond = nearest.float().abs() > numbers.float().abs()
    return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(kind)


def make_quantized_model(
    scheme: Scheme, folder: Path, dtype: torch.dtype, family: Family = "llama"
) -> tuple[Path, Any]:
    """Writes a quantised checkpoint and makes its reference.

    Args:
        scheme: How linear layers are quantised.
        folder: Where the checkpoint goes.
        dtype: Type of what is not quantised, to which it is rounded in both.
        family: The model's.

    Returns:
        The checkpoint's folder, and the Hugging Face model in float32 with the dequantised weights,
        which rounds activations as the scheme does.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    make_tiny_model(family, folder, experts=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight")
            if _is_quantised(stem, scheme):
                written, dequantized = scheme.write(parameter.float())
                parameter.copy_(dequantized)
                tensors.update({f"{stem}.{suffix}": t for suffix, t in written.items()})
            else:
                parameter.copy_(parameter.to(dtype))
                tensors[name] = parameter.to(dtype)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": scheme.config, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    if (activations := scheme.activations) is not None:
        for name, module in model.named_modules():
            if _is_quantised(name, scheme):
                module.register_forward_pre_hook(
                    lambda _, inputs: (rounded(inputs[0], activations),)
                )
    return folder, model


def _is_quantised(name: str, scheme: Scheme) -> bool:
    return "_proj" in name.rpartition(".")[2] and not name.endswith(scheme.skipped)


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[..., out, in]`` in numbers of four bits, as gpt-oss keeps its experts.

    Returns:
        ``[..., out, in / 32, 16]``, two numbers to a byte, the first in its low bits; exponents
        plus 127 ``[..., out, in / 32]``; and the weight that they make.
    """
    shared = weight.unflatten(-1, (-1, _MXFP4_SHARED))
    exponents = (shared.abs().amax(-1) / 6).log2().ceil()
    codes, nearest = _nearest_fp4(shared / exponents.exp2()[..., None])
    dequantized = nearest * exponents.exp2()[..., None]
    return _packed_fp4(codes), (exponents + 127).to(torch.uint8), dequantized.flatten(-2)


def _nearest_fp4(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest numbers of four bits, and these numbers."""
    indices = (numbers.abs()[..., None] - _FP4).abs().argmin(-1)
    return (indices + 8 * (numbers < 0)).to(torch.uint8), _FP4[indices] * numbers.sign()


def _packed_fp4(codes: Tensor) -> Tensor:
    """Two codes to a byte, the first in its low bits."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def make_gpt_oss_with_mxfp4_experts(folder: Path) -> tuple[Path, Any]:
    """A tiny gpt-oss in the form of the published ones: bfloat16 but for its experts.

    Returns:
        As `make_quantized_model`.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    make_tiny_model("gpt_oss", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # [experts, in, out]
                blocks, scales, dequantized = _mxfp4(parameter.transpose(1, 2))
                parameter.copy_(dequantized.transpose(1, 2))
                tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            else:
                parameter.copy_(parameter.bfloat16())
                tensors[name] = parameter.bfloat16()
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model
