"""Every launch finds a variant of its kernel that was compiled before it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs

from tests.kernels.attention import CPU
from tests.kernels.compiler import Variant, compiled_only, variants_only
from vllm_flashtrace.kernels import (
    Accumulators,
    AttentionForm,
    AttentionInputs,
    KeptQueries,
    LayerKeys,
    PagedRows,
    ProximityLayer,
    ProximityTrace,
    RowSegment,
)
from vllm_flashtrace.kernels.triton_column_sums import (
    triton_column_sums,
    triton_kept_column_sums,
)
from vllm_flashtrace.kernels.triton_operands import Compilation, as_compiled_for, compiling
from vllm_flashtrace.kernels.triton_proximity import triton_proximities, triton_sum_shares
from vllm_flashtrace.kernels.triton_row_sums import triton_inverse_rms, triton_row_sums
from vllm_flashtrace.kernels.triton_variants import (
    LayerTensors,
    launch_every_variant,
    target_rows_of_every_kind,
)

# Their functions bear the same names.
triton_column_sums_module = importlib.import_module(triton_column_sums.__module__)
triton_proximity_module = importlib.import_module(triton_proximities.__module__)

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAYERS, BLOCKS = 3, 2

KERNELS = {
    "_lse_kernel": 4,
    "_offsets_kernel": 2,
    "_column_sums_kernel": 3,
    "_add_parts_kernel": 1,
    "_row_sums_kernel": 2,
    "_norms_kernel": 1,
    "_nearest_kernel": 1,
    "_screen_kernel": 1,
    "_complete_kernel": 1,
    "_sum_heads_kernel": 1,
    "_totals_kernel": 1,
    "_sum_shares_kernel": 1,
}
SCALED = {"_inverse_rms_kernel": 1}
"""Our kernels, and the most variants of each that a layer has without adapters."""


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Nothing is interpreted here."""
    yield


@dataclass(frozen=True)
class Model:
    """A layer as far as the kernels' variants depend on it.

    Attributes:
        latents: Size of values, where these and keys are made of latents, head by head; else 0.
    """

    groups: int = 2
    shared: int = 4
    dim: int = 128
    hidden: int = 1024
    block_size: int = 16
    dtype: torch.dtype = BFLOAT16
    cached: torch.dtype = BFLOAT16
    query_dtype: torch.dtype = BFLOAT16
    tokens_first: bool = False
    latents: int = 0
    adapters: bool = False
    window: int | None = None
    chunk: int | None = None
    soft_cap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    scaled: bool = False

    @property
    def heads(self) -> int:
        return self.groups * self.shared

    def caches(self, blocks: int = BLOCKS) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        if self.latents:
            keys, values = (
                torch.zeros(self.groups, blocks, self.block_size, size, dtype=self.cached)
                for size in (self.dim, self.latents)
            )
            return keys.transpose(0, 1), values.transpose(0, 1)
        sizes = [blocks, self.groups, self.block_size, 2 * self.dim]
        if self.tokens_first:
            sizes[1], sizes[2] = sizes[2], sizes[1]
        cache = torch.zeros(sizes).to(self.cached)
        cache = cache.transpose(1, 2) if self.tokens_first else cache
        return cache[..., : self.dim], cache[..., self.dim :]

    def tensors(self) -> LayerTensors:
        keys, values = self.caches()
        width = self.heads * values.shape[-1]
        weight = torch.zeros(self.hidden, width, dtype=self.dtype)
        meta = torch.empty(weight.shape, dtype=FLOAT32, device="meta")
        per_head = torch.zeros(self.heads)
        return LayerTensors(
            query=torch.zeros(1, self.heads, self.dim).to(self.query_dtype),
            keys=keys,
            values=values,
            stream=torch.zeros(1, self.hidden, dtype=self.dtype),
            weights=[weight, meta] if self.adapters else [meta if self.scaled else weight],
            form=AttentionForm(
                0.1,
                sliding_window=self.window,
                chunk_size=self.chunk,
                soft_cap=self.soft_cap,
                alibi_slopes=per_head if self.alibi else None,
                sinks=per_head if self.sinks else None,
            ),
            scaled=self.scaled,
        )


def warm_up(model: Model) -> Compilation:
    layer = model.tensors()
    with compiling() as compilation:
        launch_every_variant(layer, target_rows_of_every_kind(layer))
    return compilation


@functools.cache
def warmed_up(model: Model) -> frozenset[Variant]:
    with variants_only() as found:
        assert not warm_up(model).failures
    assert not found.launched
    return frozenset(found.warmed)


MODELS = {
    "8B": Model(groups=8, shared=4, hidden=4096),
    "70B on 8 ranks": Model(groups=1, shared=8, hidden=8192),
    "one head": Model(groups=1, shared=1, dim=64, hidden=576, dtype=FLOAT16, cached=FLOAT16,
                      query_dtype=FLOAT16),
    "three heads of 72": Model(groups=1, shared=3, dim=72, hidden=216),
    "SmolLM2 in float32": Model(groups=3, shared=3, dim=64, hidden=576, dtype=FLOAT32,
                                cached=FLOAT32, query_dtype=FLOAT32, tokens_first=True),
    "float32, 256": Model(groups=1, shared=2, dim=256, dtype=FLOAT32, cached=FLOAT32,
                          query_dtype=FLOAT32),
    "heads of 33, hidden size 99": Model(groups=1, shared=3, dim=33, hidden=99, block_size=17),
    "fp8 cache": Model(cached=E4M3, tokens_first=True),
    "fp8 queries": Model(cached=E4M3, query_dtype=E4M3),
    "e5m2": Model(cached=E5M2, query_dtype=E4M3, block_size=64),
    "window": Model(window=100),
    "window of one": Model(window=1, shared=1),
    "chunks": Model(chunk=8192),
    "window, cap, sinks": Model(window=4096, soft_cap=30.0, sinks=True),
    "cap and alibi": Model(soft_cap=30.0, alibi=True, shared=5),
    "many heads without groups": Model(groups=64, shared=1, hidden=4096),
    "adapters": Model(adapters=True, dim=80, shared=7),
    "latents": Model(groups=16, shared=1, dim=192, latents=128, hidden=2048, block_size=64),
    "normed blocks": Model(scaled=True, dim=256, groups=1, shared=4, hidden=1152, soft_cap=50.0),
}  # fmt: skip


@st.composite
def targets(draw: st.DrawFn) -> list[int]:
    """Positions of up to 4,096 rows in a context of any length."""
    count = draw(st.one_of(st.integers(1, 70), st.integers(1, 4096)))
    first, gap = draw(st.integers(0, 20_000)), draw(st.sampled_from([0, 1, 1, 3]))
    return [first + gap * row for row in range(count)]


def _odd(whole: Tensor) -> Tensor:
    return whole[:1].as_strided((1, *whole.shape[1:]), (1, *whole.stride()[1:]))


def _not_aligned(whole: Tensor) -> Tensor:
    flat = torch.zeros(whole.numel() + 1).to(whole.dtype)
    return flat[1:].view(whole.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda whole: whole.contiguous(),
    "beside others": lambda whole: whole,
    "one token of odd stride": _odd,
    "not aligned": _not_aligned,
    "other order": lambda whole: whole.transpose(0, 1).contiguous().transpose(0, 1),
}


def launch_as_traces_do(
    model: Model,
    positions: list[list[int]],
    layout: str = "contiguous",
    where: int = 0,
    offset: int = 0,
    fraction: float = 1.0,
) -> None:
    """What a step of several traces, and their end, launch."""
    layer, tokens = model.tensors(), max(map(len, positions))
    wide = torch.zeros(tokens, model.heads + 2 * model.groups, model.dim).to(model.query_dtype)
    query = LAYOUTS[layout](wide[:, : model.heads])
    stream = torch.zeros(tokens, 2, model.hidden, dtype=model.dtype)[:, 0]
    stream = LAYOUTS[layout](stream)
    blocks = -(-(max(own[-1] for own in positions) + 1) // model.block_size)
    tables = torch.zeros(4, blocks + offset, dtype=torch.int32)
    segments = []
    for own, table in zip(positions, tables, strict=False):
        shapes = (model.heads, own[-1] + 1), (model.hidden,), (model.hidden,)
        sums = Accumulators(*(torch.zeros(LAYERS, *shape) for shape in shapes))
        zeros, ones = torch.zeros(len(own), dtype=torch.int64), torch.ones(len(own))
        mass = torch.zeros(LAYERS, model.heads, 3) if where else None
        segments.append(RowSegment(zeros, torch.tensor(own), ones, table, sums, mass))
    rows = PagedRows.build(segments, model.heads, model.groups, CPU, kept_rows=1024)
    scales = None
    if model.scaled:
        padded = -(-len(rows) // 4) * 4
        scales = torch.ones(LAYERS, padded)[:, : len(rows)]
    by_layer = None if scales is None else scales[where]
    inputs = AttentionInputs(query, layer.keys, rows, layer.form, by_layer)
    triton_column_sums(inputs, where)
    told = torch.zeros(model.heads, tokens + offset)
    triton_column_sums(dataclasses.replace(inputs, lse=told), where)
    if model.latents:
        _launch_for_some_heads(model, query, segments, layer.form, where)
    memory = torch.empty(len(rows) * LAYERS * model.heads * model.dim * 8, dtype=torch.uint8)
    kept = KeptQueries.within(memory, rows, LAYERS, model.dim, model.query_dtype)
    if kept is not None:
        kept.scales = scales
        keys = [LayerKeys(index, layer.keys, layer.form) for index in range(where, LAYERS)]
        triton_kept_column_sums(kept, keys)
        kept.lse = torch.zeros(LAYERS, model.heads, len(rows) + offset)[..., offset:]
        triton_kept_column_sums(kept, keys)
    triton_row_sums(rows, where, residual=stream)
    if by_layer is None:
        triton_row_sums(rows, where, stream=stream)
        triton_row_sums(rows, where, residual=stream, stream=stream)
    else:
        triton_inverse_rms(rows, stream, 1e-6, by_layer)
        triton_row_sums(rows, where, stream=stream, scales=by_layer)
    totals = torch.zeros(len(segments), 2, LAYERS, dtype=torch.float64)
    traces = [
        ProximityTrace(segment.sums, segment.block_table, *results, exact_fraction=fraction)
        for segment, results in zip(segments, totals, strict=True)
    ]
    for weight in layer.weights:
        values = [
            ProximityLayer(index, layer.values, weight, 0.5 + where) for index in range(where + 1)
        ]
        triton_proximities(values, traces)
    for segment, results in zip(segments, totals, strict=True):
        proximities = segment.sums.column_sums[:, 0]
        scores = torch.zeros(proximities.shape[1] + offset)
        triton_sum_shares(proximities, results[0], scores, keep=where == 1)


def _launch_for_some_heads(
    model: Model, query: Tensor, segments: list[RowSegment], form: AttentionForm, where: int
) -> None:
    """As keys are made of latents: of one trace, and of as many heads as there is room for."""
    for segment in segments:
        for some in (slice(0, 7), slice(7, 8), slice(8, model.heads)):
            heads = some.stop - some.start
            blocks = min(segment.columns // model.block_size + 1, 40)
            keys, _ = dataclasses.replace(model, groups=heads).caches(blocks)
            sums = segment.sums._replace(column_sums=segment.sums.column_sums[:, some])
            mass = None if segment.mass is None else segment.mass[:, some]
            own = dataclasses.replace(segment, sums=sums, mass=mass)
            rows = PagedRows.build([own], heads, heads, CPU)
            triton_column_sums(AttentionInputs(query[:, some], keys, rows, form), where)


EVERY_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@EVERY_MODEL
@pytest.mark.timeout(900)
@settings(deadline=None, max_examples=10)
@given(
    positions=st.lists(targets(), min_size=1, max_size=4),
    layout=st.sampled_from(sorted(LAYOUTS)),
    where=st.integers(0, LAYERS - 1),
    offset=st.integers(0, 5),
    fraction=st.sampled_from([1.0, 0.9, 0.0]),
)
def test_every_launch_was_compiled_for(model: Model, **step: Any) -> None:
    """Any number of rows, contexts and traces, any layer, any place in memory."""
    with variants_only() as found:
        launch_as_traces_do(model, **step)
    assert found.launched and not found.launched - warmed_up(model)


@EVERY_MODEL
def test_nothing_else_is_compiled(model: Model) -> None:
    """Each size of tile is used; few variants are compiled, whatever the model."""
    with variants_only() as found:
        # Tiles follow the number of queries, by powers of two.
        for count in (*range(1, 7), 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 65, 69):
            launch_as_traces_do(model, [[*range(count)]])
        launch_as_traces_do(model, [[*range(300)]])
        launch_as_traces_do(model, [[0] * 300, [0, 9000]])
    warmed = warmed_up(model)
    assert found.launched == warmed
    counts = collections.Counter(name for name, _ in warmed)
    kernels = KERNELS | SCALED if model.scaled else KERNELS
    assert counts.keys() == kernels.keys()
    most = {name: count * (1 + model.adapters) for name, count in kernels.items()}
    assert all(count <= most[name] for name, count in counts.items()), counts


def test_a_launch_that_was_not_compiled_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would say of a tile that follows the number of rows further."""
    model = MODELS["8B"]
    warmed = warmed_up(model)
    larger = triton_column_sums_module._TILES | {(2, 128): (128, 1024, 4, 3)}
    tiles = {key: triton_column_sums_module.Tile(*tile) for key, tile in larger.items()}
    monkeypatch.setattr(triton_column_sums_module, "_TILES", tiles)
    with variants_only() as found:
        launch_as_traces_do(model, [[*range(900)]])
    assert {name for name, _ in found.launched - warmed} == {"_column_sums_kernel"}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.timeout(900)
def test_compiled_variants_serve_launches() -> None:
    """With Triton's own cache, under a hook like that of vLLM's JIT monitor in its error mode."""
    model = Model(groups=1, shared=2, dim=64, hidden=64)

    def refuse(**event: Any) -> None:
        raise RuntimeError(f"compiled during inference: {event['fn'].name}")

    with compiled_only(90) as kernels, knobs.runtime.scope():
        compilation = warm_up(model)
        assert not compilation.failures
        assert len(compilation.kernels) == len(warmed_up(model))
        knobs.runtime.jit_post_compile_hook = refuse
        kernels.clear()
        launch_as_traces_do(model, [[*range(300)], [5, 900], [7] * 20])
        assert kernels.keys() == KERNELS.keys()
        with pytest.raises(RuntimeError, match="compiled during inference"):
            launch_as_traces_do(dataclasses.replace(model, window=77), [[1]])


def test_a_kernel_that_fails_is_named_once_and_the_others_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing:
        __name__ = "_complete_kernel"
        tries = 0

        def warmup(self, *_: Any, **__: Any) -> None:
            self.tries += 1
            raise ValueError("in the code\n  of a kernel\nno such layout")

    model, failing = MODELS["8B"], Failing()
    expected = {variant for variant in warmed_up(model) if variant[0] != "_complete_kernel"}
    monkeypatch.setattr(triton_proximity_module, "_complete_kernel", failing)
    layer = model.tensors()
    with variants_only() as found, compiling() as compilation:
        for _ in range(3):
            launch_every_variant(layer, target_rows_of_every_kind(layer))
    assert compilation.failures == ["_complete_kernel: ValueError: no such layout"]
    assert failing.tries == 1 and found.warmed == expected == compilation.kernels


def test_only_what_would_need_another_variant_is_copied() -> None:
    whole = torch.arange(3 * 6 * 16.0).view(3, 6, 16)
    assert as_compiled_for(whole) is whole
    part = whole[:, :4]
    assert as_compiled_for(part) is part
    for other in (whole[:, :, 1:], whole.flatten()[1:97].view(6, 16), whole.transpose(1, 2)):
        copied = as_compiled_for(other)
        assert copied.is_contiguous() and torch.equal(copied, other)
        assert copied.data_ptr() % 16 == 0 and copied.data_ptr() != other.data_ptr()
    one = whole[:1].as_strided((1, 6, 16), (1, 16, 1))
    assert as_compiled_for(one).stride() == (96, 16, 1)
