"""What an engine step costs, as a handful of constants with their origin.

A step over decoding sequences, prefilled tokens and traces takes

    step (decode_step if nothing is prefilled)
         + decode_token * sequences + context * (their tokens in the KV cache)
         + token * prefilled tokens + pair * (visible pairs of a prefilled token and a key)
         + recording_pair * (visible pairs of a target row and a key)
         + (hop + hop_context * tokens of the context, for each hop that ends in it)  seconds.

Invariant: every set of constants says whether it was measured, where and on what, or follows from
a data sheet's best rates, or from an assumed share of them; nothing is two of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from benchmarks.capacity_shapes import Shape
from benchmarks.gpu_shapes import FAR_SHARE

MEASURED, DATA_SHEET, ASSUMED = BASES = "measured", "data sheet", "assumed"
_NEAREST = 8
_GPU_BLOCK = 16
_CACHE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Constants:
    """Seconds of the parts of a step; see the module.

    Attributes:
        name: As tables show it.
        basis: ``measured``, ``data sheet`` or ``assumed``.
        source: Where the numbers come from, with hardware.
        gpus: GPUs of one replica; 0 for none.
        block_size: Tokens of a KV cache block; a trace recomputes from a block's start.
        kv_tokens: Tokens that the KV cache holds; None if it never was the limit.
    """

    name: str
    basis: str
    source: str
    gpus: int
    block_size: int
    kv_tokens: int | None
    step_seconds: float
    decode_step_seconds: float
    token_seconds: float
    pair_seconds: float
    decode_token_seconds: float
    context_seconds: float
    recording_pair_seconds: float
    hop_seconds: float
    hop_context_seconds: float

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise ValueError(f"basis {self.basis!r} is none of {', '.join(BASES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_seconds") and not value >= 0:
                raise ValueError(f"{field.name} is {value}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: A key is missing or unknown, or a value cannot be.
        """
        names = {field.name for field in fields(cls)}
        if different := names ^ set(data):
            raise ValueError(f"missing or unknown constants: {', '.join(sorted(different))}")
        return cls(**data)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a JSON file: constants, or a result that holds them under ``constants``."""
        data = json.loads(path.read_text("utf-8"))
        return cls.from_dict(data.get("constants", data))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Gpu:
    """Best rates per second and memory, from the maker's data sheet."""

    name: str
    flops: float
    bytes_per_second: float
    memory_bytes: float


GPUS = {
    gpu.name: gpu
    for gpu in (Gpu("H100", 989e12, 3.35e12, 80e9), Gpu("H200", 989e12, 4.8e12, 141e9))
}


def from_data_sheet(
    shape: Shape, gpu: Gpu, ranks: int, *, compute: float, memory: float
) -> Constants:
    """Constants from the counts of operations and bytes, at a share of the best rates.

    Kernel launches, traffic between ranks and the host's work are not counted, so shares of 1 give
    a lower bound of every cost.

    Args:
        shape: The model, in bfloat16.
        gpu: The device.
        ranks: Tensor-parallel GPUs of a replica.
        compute: Reached share of the rate of dense matrix products.
        memory: Reached share of the rate of memory.
    """
    flop = 1 / (ranks * gpu.flops * compute)
    byte = 1 / (ranks * gpu.bytes_per_second * memory)
    query_width = shape.layers * shape.heads * shape.head_dim
    attention = 4 * query_width * flop
    proximity = 2 * query_width * (1 + _NEAREST + FAR_SHARE * shape.hidden)
    room = _CACHE_SHARE * ranks * gpu.memory_bytes - shape.weight_bytes
    if room <= 0:
        raise ValueError(f"{shape.name} does not fit {ranks} {gpu.name}")
    return Constants(
        name=f"{shape.name}, {ranks} x {gpu.name}",
        basis=DATA_SHEET if compute == memory == 1 else ASSUMED,
        source=f"operations and bytes at {compute:.0%} of the data sheet's bfloat16 rate and "
        f"{memory:.0%} of its memory rate; not measured",
        gpus=ranks,
        block_size=_GPU_BLOCK,
        kv_tokens=int(room // shape.kv_bytes_per_token),
        step_seconds=shape.weight_bytes * byte,
        decode_step_seconds=shape.weight_bytes * byte,
        token_seconds=2 * shape.layer_parameters * flop,
        pair_seconds=attention,
        decode_token_seconds=2 * (shape.layer_parameters + shape.head_parameters) * flop,
        context_seconds=shape.kv_bytes_per_token * byte,
        # Two products of queries and keys, one for the log-sum-exps and one for the sums.
        recording_pair_seconds=attention,
        hop_seconds=shape.output_projection_bytes * byte,
        hop_context_seconds=proximity * flop + shape.kv_bytes_per_token / 2 * byte,
    )
