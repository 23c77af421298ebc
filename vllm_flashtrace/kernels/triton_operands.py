"""What the Triton kernels share: launches and their arguments, reads of the paged cache, logits.

Kernels read only what a block table names for the tokens of the request: what other slots hold,
NaN included, never reaches a result. Values are widened, never rounded. Both kernels over attention
form logits with the same functions, so that an attention weight exceeds one by no more than
rounding.

Triton has no structs, so arguments are lists inside kernels; `LayerBatch.arguments` keeps their
order in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_flashtrace.kernels.paged_attention import AttentionInputs, KeptQueries, LayerKeys
from vllm_flashtrace.kernels.target_rows import PagedRows
from vllm_flashtrace.kernels.triton_rows import next_power_of_2, to_device

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LAYER = tl.constexpr(6)
"""Numbers of a layer of a launch: its number, addresses of K cache, sinks and slopes, and the bits
of two float32, the factor on dot products and the cap; see `load_layer`."""

_ALIGNMENT = 16

# From here on whole numbers have other types in kernels.
_LARGE, _LARGEST = 1 << 31, 1 << 63

_EIGHT_BIT_FORMATS = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e5m2: "e5m2"}
_TRITON_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.uint8: tl.uint8,
}


@dataclass(frozen=True, slots=True)
class Operands:
    """How two factors of a matrix product are multiplied: queries and keys, or values and ``W_O``.

    Attributes:
        dtype: Type of the factors, which holds both exactly.
        precision: How products of float32 are taken (`tl.dot`'s ``input_precision``).
        padded_dim: Head size rounded up to a power of two.
    """

    dtype: torch.dtype
    precision: str
    padded_dim: int

    @classmethod
    def choose(cls, cached: torch.dtype, other: torch.dtype, head_dim: int) -> Operands:
        """Sixteen-bit factors where they are exact, else float32 at no less than its precision.

        Args:
            cached: Type of the vectors in the cache.
            other: Type of the other factor.
            head_dim: Head size.
        """
        padded_dim = max(16, next_power_of_2(head_dim))
        if other in (torch.bfloat16, torch.float16) and cached in (other, *_EIGHT_BIT_FORMATS):
            return cls(other, "ieee", padded_dim)
        return cls(torch.float32, "ieee" if cached == other else "tf32x3", padded_dim)

    @classmethod
    def of_attention(cls, query: Tensor, key_cache: Tensor) -> Operands:
        """Of queries and keys; float16 holds eight-bit floats exactly."""
        dtype = torch.float16 if query.dtype in _EIGHT_BIT_FORMATS else query.dtype
        return cls.choose(key_cache.dtype, dtype, query.shape[-1])

    @property
    def tile_key(self) -> tuple[int, int]:
        """What tiles are chosen by: bytes of an operand and padded head size, at least 64."""
        return self.dtype.itemsize, max(64, self.padded_dim)

    @property
    def triton_type(self) -> tl.dtype:
        """`dtype` as a kernel takes it."""
        return _TRITON_TYPES[self.dtype]


@dataclass(slots=True)
class Compilation:
    """What was compiled in the place of launches.

    Attributes:
        kernels: The variants, which later launches find.
        failures: What went wrong, one line for each variant.
    """

    kernels: set[Any] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    _failed: set[tuple[str, str]] = field(default_factory=set)

    def add(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Any
    ) -> None:
        """Compiles what a launch needs; a variant that cannot be is noted once and left out."""
        name = kernel.__name__
        if (name, repr(constants)) in self._failed:
            return
        try:
            self.kernels.add(kernel.warmup(*arguments, grid=grid, **constants))
        except Exception as error:
            self._failed.add((name, repr(constants)))
            reason = (str(error).strip().splitlines() or [""])[-1]
            self.failures.append(f"{name}: {type(error).__name__}: {reason}"[:300])


_compilation: ContextVar[Compilation | None] = ContextVar("compilation", default=None)


@contextmanager
def compiling() -> Iterator[Compilation]:
    """Compiles what is launched within the block, and runs none of it."""
    compilation = Compilation()
    token = _compilation.set(compilation)
    try:
        yield compilation
    finally:
        _compilation.reset(token)


_STOCK_RUN = JITFunction.run
_launched: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches a kernel; every launch of this package goes through here, see `compiling`.

    Triton binds and inspects all arguments at each launch to find the variant that it has compiled,
    which takes longer than to launch it. Here variants are found by less, see `_kind_of`, and
    launched as Triton's own `CompiledKernel` is.

    Args:
        kernel: The kernel; its constants must come last in its signature.
        grid: Numbers of programs.
        *arguments: What it takes before its constants: tensors, numbers not below 0.
        **constants: Its constants, and how many warps and stages it has.
    """
    compilation = _compilation.get()
    if compilation is not None:
        compilation.add(kernel, grid, arguments, constants)
        return
    if type(kernel) is not JITFunction or JITFunction.run is not _STOCK_RUN:
        kernel[grid](*arguments, **constants)  # It is interpreted, or watched.
        return
    key = (
        kernel.fn,
        driver.active.get_current_device(),
        *constants.values(),
        *map(_kind_of, arguments),
    )
    found = _launched.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        names = kernel.arg_names[len(arguments) :]
        _launched[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, last = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *last)


def _kind_of(argument: Any) -> Any:
    """What Triton compiles a kernel anew for, and no less."""
    if type(argument) is int:
        kind = (argument == 1) + 2 * (argument % _ALIGNMENT == 0)
        return kind + 4 * ((argument >= _LARGE) + (argument >= _LARGEST))
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT == 0
    return type(argument)


def as_compiled_for(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where it would need a variant of its own.

    Triton compiles for addresses and strides that are multiples of 16 and strides that are 1. What
    a step hands over is nearly always like a contiguous tensor in this; `triton_variants` compiles
    for nothing else.
    """
    aligned = tensor.data_ptr() % _ALIGNMENT == 0
    # A dimension of one may have any stride, and is contiguous all the same.
    if aligned and min(tensor.shape) > 1 and tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if _specialised(stride) != _specialised(expected):
            break
        expected *= size
    else:
        if aligned:
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _specialised(number: int) -> tuple[bool, bool]:
    return number == 1, number % _ALIGNMENT == 0


class _Alike(NamedTuple):
    """What a kernel is compiled for, or takes once for all layers of a launch."""

    dtype: torch.dtype
    block_size: int
    strides: tuple[int, ...]
    aligned: bool
    window: int
    chunk: int
    has_cap: bool
    has_alibi: bool
    has_sinks: bool


def _alike(keys: LayerKeys) -> tuple[Any, ...]:
    """What `_Alike` is made of; a plain tuple, because every layer of a step is asked."""
    cache, form = keys.key_cache, keys.form
    return (
        cache.dtype,
        cache.shape[2],
        cache.stride(),
        cache.data_ptr() % _ALIGNMENT == 0,
        form.sliding_window or 0,
        form.chunk_size or 0,
        form.soft_cap > 0,
        form.alibi_slopes is not None,
        form.sinks is not None,
    )


class GivenLse(NamedTuple):
    """A log-sum-exp to base e that lies anywhere in memory.

    That of layer ``l``, head ``h`` and row ``i`` lies at ``first + l * layer + h * head + i``.
    Kernels would be compiled anew for a view that begins at an odd address.

    Attributes:
        memory: float32, all of the memory that it lies in.
        first: Where it begins.
        layer: 0 where there is one layer.
        head: Stride of heads.
    """

    memory: Tensor
    first: int
    layer: int
    head: int

    @classmethod
    def of(cls, lse: Tensor) -> GivenLse:
        """Of ``[L, H, R]``, rows adjacent."""
        memory = lse.as_strided((1,), (1,), 0)
        layer, head, _ = lse.stride()
        return cls(memory, int(lse.storage_offset()), layer if len(lse) > 1 else 0, head)


@dataclass(frozen=True, slots=True, eq=False)
class LayerBatch:
    """Layers whose attention one launch computes.

    Attributes:
        query: ``[R, H, d]``, the target rows' queries of layer 0, rows of all segments one after
            another; those of layer ``l`` lie ``l * stride`` numbers behind.
        stride: A multiple of 16.
        rows: The target rows.
        layers: At least one.
        alike: What they have in common.
        operands: How queries and keys are multiplied.
        table: Their numbers on the device, int64 ``[layers, 6]``, see `LAYER`.
        scales: float32, factors on the weights of the rows: that of row ``i`` in layer ``l`` lies
            at ``l * scales_stride + i``; None for 1.
        scales_stride: 0 where there is one layer.
        lse: The log-sum-exp of the queries, see `GivenLse`; None where it is to be computed.
    """

    query: Tensor
    stride: int
    rows: PagedRows
    layers: Sequence[LayerKeys]
    alike: _Alike
    operands: Operands
    table: Tensor
    scales: Tensor | None = None
    scales_stride: int = 0
    lse: GivenLse | None = None

    @classmethod
    def of_one(cls, inputs: AttentionInputs, layer: int) -> LayerBatch:
        """One layer, its rows anywhere in the step."""
        query, rows, lse = inputs.query, inputs.rows, inputs.lse
        if rows.adjacent is not None:
            query = as_compiled_for(query[rows.adjacent])
            lse = None if lse is None else lse[:, rows.adjacent]
        else:
            # Eight-bit floats cannot be indexed.
            picked = _stored(query).index_select(0, rows.places)
            query = picked.view(query.dtype)
            lse = None if lse is None else lse.index_select(1, rows.places)
        keys = LayerKeys(layer, inputs.key_cache, inputs.form)
        given = None if lse is None else GivenLse.of(lse[None])
        return cls._of(query, 0, rows, [keys], inputs.scales, given)

    @classmethod
    def of_kept(cls, kept: KeptQueries, layers: Sequence[LayerKeys]) -> list[LayerBatch]:
        """Layers in as few batches as there are kinds of them."""
        batches: dict[tuple[Any, ...], list[LayerKeys]] = {}
        for keys in layers:
            batches.setdefault(_alike(keys), []).append(keys)
        query, stride = kept.queries[0], kept.queries.stride(0)
        for first, *_ in batches.values():
            AttentionInputs(query, first.key_cache, kept.rows, first.form)  # Refuses misfits.
        given = None if kept.lse is None else GivenLse.of(kept.lse)
        return [
            cls._of(query, stride, kept.rows, keys, kept.scales, given) for keys in batches.values()
        ]

    @classmethod
    def _of(
        cls,
        query: Tensor,
        stride: int,
        rows: PagedRows,
        layers: Sequence[LayerKeys],
        scales: Tensor | None,
        lse: GivenLse | None,
    ) -> LayerBatch:
        operands = Operands.of_attention(query, layers[0].key_cache)
        table = _layer_table(tuple(map(_numbers_of, layers)), query.device)
        alike = _Alike(*_alike(layers[0]))
        if scales is None:
            return cls(query, stride, rows, layers, alike, operands, table, lse=lse)
        if scales.data_ptr() % _ALIGNMENT:
            scales = scales.clone(memory_format=torch.contiguous_format)
        by_layer = scales.stride(0) if scales.dim() > 1 else 0
        return cls(query, stride, rows, layers, alike, operands, table, scales, by_layer, lse)

    def part(self, first: int, last: int) -> LayerBatch:
        """Some of the layers."""
        layers, table = self.layers[first:last], self.table[first:last]
        return replace(self, layers=layers, table=table)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What both kernels over attention take first, in the order of their parameters."""
        tables = self.rows.on_device
        return (
            _stored(self.query),
            self.stride,
            self.query.stride(0),
            self.query.stride(1),
            *self.alike.strides,
            self.table,
            tables.segments,
            tables.positions,
        )

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time numbers of both kernels over attention."""
        rows, alike, operands = self.rows, self.alike, self.operands
        return {
            "SHARED": rows.num_heads // rows.num_kv_heads,
            "HEAD_DIM": self.query.shape[2],
            "PADDED_DIM": operands.padded_dim,
            "BLOCK_SIZE": alike.block_size,
            "CACHED": stored_type(alike.dtype),
            "ALIGNED": alike.aligned,
            "WINDOW": alike.window,
            "CHUNK": alike.chunk,
            "HAS_CAP": alike.has_cap,
            "HAS_ALIBI": alike.has_alibi,
            "EIGHT_BIT": eight_bit_format(alike.dtype),
            "EIGHT_BIT_QUERY": eight_bit_format(self.query.dtype),
            "OPERANDS": operands.triton_type,
            "PRECISION": operands.precision,
        }


def _numbers_of(keys: LayerKeys) -> tuple[int, int, int, int, float, float]:
    """See `LAYER`; the factor makes logits to base 2, or, with a cap, what is capped."""
    form = keys.form
    return (
        keys.layer,
        keys.key_cache.data_ptr(),
        0 if form.sinks is None else form.sinks.data_ptr(),
        0 if form.alibi_slopes is None else form.alibi_slopes.data_ptr(),
        form.scale * LOG2E.value / (form.soft_cap or 1.0),
        form.soft_cap,
    )


@functools.lru_cache(maxsize=1024)
def _layer_table(
    layers: tuple[tuple[int, int, int, int, float, float], ...], device: torch.device
) -> Tensor:
    """int64 ``[L, 6]``, see `LAYER`; the same numbers are copied to the device once."""
    table = np.array([numbers[:4] for numbers in layers], np.int64)
    floats = np.array([numbers[4:] for numbers in layers], np.float32)
    table = np.concatenate([table, floats.view(np.int32).astype(np.int64)], 1)
    with torch.inference_mode(False):
        return to_device([table], device)[0]


def eight_bit_format(dtype: torch.dtype) -> str:
    """The format of a type of eight-bit floats, else empty; see `widen`."""
    return _EIGHT_BIT_FORMATS.get(dtype, "")


def stored_type(dtype: torch.dtype) -> tl.dtype:
    """What a kernel loads from an address at which tensors of a type lie; see `widen`."""
    return tl.uint8 if dtype in _EIGHT_BIT_FORMATS else _TRITON_TYPES[dtype]


def _stored(tensor: Tensor) -> Tensor:
    """Eight-bit floats go as bytes: which of them a compiler knows depends on the GPU."""
    return tensor.view(torch.uint8) if tensor.dtype in _EIGHT_BIT_FORMATS else tensor


@triton.jit
def load_layer(layers, CACHED: tl.constexpr, ALIGNED: tl.constexpr):
    """The layer of a program: its number, K cache, sinks, slopes, factor and cap; see `LAYER`."""
    entry = layers + tl.program_id(2) * LAYER
    cache = tl.load(entry + 1).to(tl.pointer_type(CACHED))
    if ALIGNED:
        # What is known of an address that is an argument; without it loads are narrow.
        cache = tl.multiple_of(cache, 16)
    sinks = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    slopes = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    scale = tl.load(entry + 4).to(tl.int32).to(tl.float32, bitcast=True)
    soft_cap = tl.load(entry + 5).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(entry), cache, sinks, slopes, scale, soft_cap


@triton.jit
def load_cached(
    cache,
    block_table,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    group,
    tokens,
    valid,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """Vectors of `tokens` as cached: ``[tokens, PADDED_DIM]``.

    Those that are not `valid` are zero; None where all are, which costs fewer instructions.
    """
    if valid is None:
        block = tl.load(block_table + tokens // BLOCK_SIZE).to(tl.int64)
    else:
        block = tl.load(block_table + tokens // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    rows = block * stride_block + group.to(tl.int64) * stride_group
    rows += (tokens % BLOCK_SIZE).to(tl.int64) * stride_slot
    stored = load_vectors(cache, rows, stride_dim, valid, HEAD_DIM, PADDED_DIM)
    return widen(stored, EIGHT_BIT)


@triton.jit
def load_queries(
    query,
    stride_row,
    stride_head,
    rows,
    heads,
    valid,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """Query vectors of target rows; `valid` as in `load_cached`."""
    offsets = rows.to(tl.int64) * stride_row + heads * stride_head
    stored = load_vectors(query, offsets, 1, valid, HEAD_DIM, PADDED_DIM)
    return widen(stored, EIGHT_BIT)


@triton.jit
def load_vectors(
    memory, starts, stride_dim, valid, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """Vectors that begin at `starts`, zero where not `valid` and behind the head's size."""
    dims = tl.arange(0, PADDED_DIM)
    places = starts[:, None] + dims[None, :] * stride_dim
    if valid is None:
        if HEAD_DIM == PADDED_DIM:
            stored = tl.load(memory + places)
        else:
            stored = tl.load(memory + places, mask=(dims < HEAD_DIM)[None, :], other=0)
    else:
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        stored = tl.load(memory + places, mask=mask, other=0)
    return stored


@triton.jit
def widen(stored, EIGHT_BIT: tl.constexpr):
    """Bytes of an eight-bit float format as float16, which holds both; other types as they are."""
    if EIGHT_BIT == "e5m2":
        result = (stored.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif EIGHT_BIT == "e4m3fn":
        magnitude = stored.to(tl.uint16) & 0x7F
        # No infinity; the exponent's bias is smaller by eight.
        bits = tl.where(magnitude == 0x7F, 0x7FFF, magnitude << 7)
        bits |= (stored.to(tl.uint16) & 0x80) << 8
        result = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256
    else:
        result = stored
    return result


@triton.jit
def unit_of(scale, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """What `shaped_logits` is to be multiplied with to give logits to base 2."""
    return 1.0 if HAS_CAP or HAS_ALIBI else scale


@triton.jit
def shaped_logits(dots, scale, soft_cap, HAS_CAP: tl.constexpr):
    """Dot products, capped if there is a cap; `scale` and cap as `load_layer` gives them.

    Without a cap the factor is left to the subtraction that follows, which then costs no more.
    """
    logits = dots
    if HAS_CAP:
        # tanh by the exponential: an overflow gives 1, as it should.
        logits = (soft_cap * LOG2E) * (1 - 2 / (tl.exp2(dots * (2 * scale)) + 1))
    return logits


@triton.jit
def masked_logits(
    dots,
    positions,
    tokens,
    slopes,
    scale,
    soft_cap,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """As `shaped_logits`, and ``-inf`` where a query does not see a key.

    `positions` of queries and keys' `tokens` lie along the axes of `dots`.
    """
    distances = positions - tokens
    logits = shaped_logits(dots, scale, soft_cap, HAS_CAP)
    if HAS_ALIBI:
        logits = logits if HAS_CAP else logits * scale
        logits -= (slopes * LOG2E) * distances.to(tl.float32)
    visible = tokens <= positions
    if WINDOW > 0:
        visible &= distances < WINDOW
    if CHUNK > 0:
        visible &= distances <= positions % CHUNK
    return tl.where(visible, logits, float("-inf"))
