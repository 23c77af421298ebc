"""Trace steps replay piecewise CUDA graphs of their own; emulated, see `emulated_graphs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.worker.gpu import dp_utils as dp_utils_v2
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.engine.harness import relative_l1
from tests.gpu.emulated_graphs import Pool, capture, compiled_pieces, emulated_graphs
from tests.gpu.standin_runner import graph_manager
from tests.gpu.test_model_runner_v1 import v1_runner
from tests.gpu.test_rank_agreement import in_step, ranks_exchange  # noqa: F401
from tests.gpu.test_start_proof import proof
from tests.gpu.v2_engine import (
    Traced,
    V2Engine,
    apply_patches,
    assert_exact,
    traced,
    untraced,
    v2_engine,
)
from tests.oracle import as_float64
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.base.errors import FlashTraceError, TraceError
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.patches import graph_capture, model_runner_v1, model_runner_v2
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker import trace_graphs
from vllm_flashtrace.worker.observer import observing
from vllm_flashtrace.worker.rank_agreement import announce
from vllm_flashtrace.worker.runner import _ATTRIBUTE
from vllm_flashtrace.worker.step import StepRecorder
from vllm_flashtrace.worker.trace_graphs import (
    GraphSets,
    TapWriter,
    TraceBatchDescriptor,
    is_asked_for,
)

SIZES = (4, 8, 16, 24, 32)
LAYERS = 4
SAME = 1e-6
"""Relative L1 distance of scores of a trace through graphs and as code."""

A, B = traced(60, (30, 45)), traced(50, (20, 44), seed=2)


class Engines:
    """Engines with one compiled model, each with graphs of its own."""

    def __init__(self, loaded: V2Engine, pool: Pool, model: Any) -> None:
        self.loaded, self.pool, self.model = loaded, pool, model

    def fresh(self, patch: pytest.MonkeyPatch, asked_for: bool = True) -> V2Engine:
        """An engine that has captured its graphs, with the option or without."""
        CUDAGraphWrapper.clear_all_graphs()
        self.pool.graphs.clear()
        config = self.loaded.config
        options = {**config.additional_config, "flashtrace": {"trace_graphs": asked_for}}
        patch.setattr(config, "additional_config", options)
        engine = V2Engine(self.loaded.model, config, self.loaded.layout)
        capture(engine, SIZES, patch)
        self.pool.replayed.clear()
        return engine

    @property
    def replayed(self) -> list[int]:
        """Sizes of the trace steps that were replayed, one entry per piece."""
        found = self.pool.replayed
        return [key.num_tokens for key in found if isinstance(key, TraceBatchDescriptor)]


@pytest.fixture(scope="module")
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """Of a Llama, or of the family that a test asks for."""
    family = getattr(request, "param", "llama")
    folder = make_tiny_model(family, tmp_path_factory.mktemp("graphs") / family)
    with (
        pytest.MonkeyPatch.context() as patch,
        emulated_graphs() as pool,
        compiled_pieces(),
        v2_engine(folder, patch) as loaded,
    ):
        apply_patches(patch)
        for kind, name in (
            (GPUModelRunner, "capture_model"),
            (GPUModelRunner, "_capture_cudagraphs"),
            (GPUModelRunnerV2, "capture_model"),
            (CudaGraphManager, "capture"),
            (CUDAGraphWrapper, "__call__"),
        ):
            patch.setattr(kind, name, getattr(kind, name))
        graph_capture.check()
        graph_capture.apply()
        loaded.step({"first": 8}, new={"first": untraced(8, 1)})  # Compiles.
        model = AutoModelForCausalLM.from_pretrained(folder)
        yield Engines(loaded, pool, as_float64(model))


def hops_trace() -> Traced:
    """A trace of two further hops, whose rows are kept."""
    target = traced(40, (30, 40), seed=3)
    further = FurtherHops(TargetWeights.from_spans([(10, 30)]).positions, hops=2)
    spec = TraceSpec.create([TracedTarget(target.weights, further)], 40, exact_fraction=1.0)
    return dataclasses.replace(target, spec=spec)


def traces() -> dict[str, Traced]:
    """Fresh ones, since a nonce is used once."""
    fresh = {"a": A, "b": B}
    again = {
        name: dataclasses.replace(
            trace, spec=TraceSpec.create(trace.weights, trace.spec.length, exact_fraction=1.0)
        )
        for name, trace in fresh.items()
    }
    return {**again, "c": hops_trace()}


def run(engine: V2Engine, of: dict[str, Traced]) -> list[torch.Tensor]:
    """Steps of several sizes, with target rows of one, two and three traces, and without any."""
    other = untraced(60, 9)

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        return engine.step(*args, **kwargs).clone()  # Graphs write all of them to one place.

    return [
        step({"a": 33, "other": 5}, new={"a": of["a"].new, "other": other}),  # No graph.
        step({"a": 6, "other": 1}),  # 7 of 8
        step({"other": 3}),  # Stock graphs take the pool.
        step({"a": 3, "b": 18}, new={"b": of["b"].new}),  # 21 of 24
        step({"a": 1, "b": 3}),  # 4 of 4
        step({"other": 9}),
        step({"c": 15, "b": 6, "a": 2, "other": 1}, new={"c": of["c"].new}),  # 24 of 24
        step({"c": 15, "b": 14, "other": 2}),  # 31 of 32
        step({"c": 10, "b": 9, "a": 15}),  # No graph.
        step({"other": 2}, finished=["a", "b", "c"]),
    ]


def test_traces_through_graphs(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    own, code = traces(), traces()
    engine = engines.fresh(monkeypatch)
    run(engine, own)
    pieces = len(engines.pool.operations(BatchDescriptor(8)))
    assert pieces > LAYERS
    assert {size: engines.replayed.count(size) for size in set(engines.replayed)} == {
        8: pieces, 24: 2 * pieces, 4: pieces, 32: pieces,
    }  # fmt: skip
    seen = [mode for mode in engine.runner.seen if mode == CUDAGraphMode.NONE]
    assert len(seen) == 2 + 3 * len(SIZES)  # Two steps; warm-ups, measurements and trials.
    stock = engines.fresh(monkeypatch, asked_for=False)
    run(stock, code)
    assert not engines.replayed
    for name in own:
        report = assert_exact(engine, own[name], engines.model)
        expected = stock.report(code[name])
        assert relative_l1(report.scores, expected.scores) <= SAME
        assert len(report.later_scores) == len(expected.later_scores) == 2 * (name == "c")
        for later, as_code in zip(report.later_scores, expected.later_scores, strict=True):
            assert relative_l1(later, as_code) <= SAME


COPY = "aten.copy_.default"
VIEWS = ("aten.flatten.using_ints", "aten.slice.Tensor")


def stock_part(piece: list[str]) -> list[str]:
    """Operations but for what taps do: views, which launch nothing, and copies."""
    return [name for name in piece if name not in (COPY, *VIEWS)]


def test_stock_graphs_are_the_same(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the option there is nothing new; with it, vLLM's set has the same operations."""
    untouched = {name: new for name, new in (("x", untraced(40, 1)), ("y", untraced(20, 2)))}

    def steps(engine: V2Engine) -> list[torch.Tensor]:
        return [
            engine.step({"x": 7}, new={"x": untouched["x"]}).clone(),
            engine.step({"x": 9, "y": 13}, new={"y": untouched["y"]}).clone(),
            engine.step({"x": 1, "y": 1}).clone(),
        ]

    stock = engines.fresh(monkeypatch, asked_for=False)
    operations = [engines.pool.operations(BatchDescriptor(size)) for size in SIZES]
    assert len(engines.pool.graphs) == sum(map(len, operations))
    hidden = steps(stock)
    both = engines.fresh(monkeypatch)
    assert [engines.pool.operations(BatchDescriptor(size)) for size in SIZES] == operations
    assert len(engines.pool.graphs) == 2 * sum(map(len, operations))
    assert all(torch.equal(a, b) for a, b in zip(steps(both), hidden, strict=True))
    assert not engines.replayed
    for size, pieces in zip(SIZES, operations, strict=True):
        own = engines.pool.operations(TraceBatchDescriptor(size))
        assert [stock_part(piece) for piece in own] == [stock_part(piece) for piece in pieces]
        assert sum(piece.count(COPY) for piece in own) == 2 * LAYERS
        assert not any(COPY in piece for piece in pieces)


def test_stale_buffers_would_be_noticed(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece's taps are read behind its replay; before it these tests find other scores."""
    with monkeypatch.context() as patch:
        patch.setattr(TapWriter, "poison", lambda _: None)  # Stale numbers look like others.
        engine, of = engines.fresh(monkeypatch), traces()

    def too_early(wrapper: Any, stock: Any, observer: Any, args: Any, kwargs: Any) -> Any:
        context = trace_graphs.get_forward_context()
        piece = trace_graphs._captured(wrapper, context)
        if piece is None:
            return trace_graphs.run_piece(wrapper, stock, observer, args, kwargs)
        for name, views in piece.calls:
            getattr(observer, name)(*views)
        with trace_graphs._own_key(context, piece.set.descriptor):
            return stock(wrapper, *args, **kwargs)

    monkeypatch.setattr(graph_capture, "run_piece", too_early)
    run(engine, of)
    for name in ("a", "b"):
        with pytest.raises(AssertionError):
            assert_exact(engine, of[name], engines.model)


def test_taps_that_did_not_run_are_noticed(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, of = engines.fresh(monkeypatch), traces()
    [piece] = [
        piece
        for wrapper in CUDAGraphWrapper._all_instances
        for key, entry in wrapper.concrete_cudagraph_entries.items()
        if (piece := getattr(entry, "_flashtrace_piece", None)) and key.num_tokens == 24
        if piece.calls and piece.number == max(2, piece.number) and piece.number < 5
    ][:1]
    piece.calls.clear()
    run(engine, of)
    for name in of:
        with pytest.raises(TraceError) as caught:
            engine.report(of[name])
        assert caught.value.code == "recording_incomplete"


def test_pieces_that_are_gone_run_as_code(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From there on: a replay would read what the missing piece has not written."""
    engine, of = engines.fresh(monkeypatch), traces()
    for wrapper in CUDAGraphWrapper._all_instances:
        entry = wrapper.concrete_cudagraph_entries.get(TraceBatchDescriptor(24))
        if entry is not None and entry._flashtrace_piece.number == 3:
            wrapper.clear_graphs()
    run(engine, of)
    assert engines.replayed.count(24) == 2 * 3
    for name in of:
        assert_exact(engine, of[name], engines.model)


def test_no_memory_for_the_capture(
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    """One warning; traces run as code, and vLLM's own graphs are what they were."""
    copies = 0

    def fail(name: str) -> None:
        nonlocal copies
        copies += name == "copy_"
        if copies == 2 * LAYERS + 3:  # In the second size.
            raise torch.OutOfMemoryError("injected")

    untouched = untraced(40, 1)
    stock = engines.fresh(monkeypatch, asked_for=False)
    expected = stock.step({"x": 15}, new={"x": untouched}).clone()
    with monkeypatch.context() as patch:
        patch.setattr(engines.pool, "fails", fail)
        engine = engines.fresh(monkeypatch)
    [warning] = warnings
    assert "injected" in warning and "as code" in warning
    assert torch.equal(engine.step({"x": 15}, new={"x": untouched}), expected)
    of = traces()
    run(engine, of)
    assert set(engines.replayed) == {32}
    keys = {
        key
        for wrapper in CUDAGraphWrapper._all_instances
        for key in wrapper.concrete_cudagraph_entries
    }
    assert {key.num_tokens for key in keys if isinstance(key, TraceBatchDescriptor)} == {32}
    for name in of:
        assert_exact(engine, of[name], engines.model)
    assert len(warnings) == 1


def test_graphs_that_show_another_stream_are_given_back(
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    stock = TapWriter._note

    def swapped(self: TapWriter, name: str, *streams: torch.Tensor) -> None:
        stock(self, name, *reversed(streams))

    with monkeypatch.context() as patch:
        patch.setattr(TapWriter, "_note", swapped)
        engine = engines.fresh(monkeypatch)
    assert len(warnings) == len(SIZES) and "another stream" in warnings[0]
    of = traces()
    run(engine, of)
    assert not engines.replayed
    for name in of:
        assert_exact(engine, of[name], engines.model)


def test_a_fault_fails_the_trace_alone(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(engines.fresh(monkeypatch), traces())
    engine, of = engines.fresh(monkeypatch), traces()

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "record_update", broken)
        found = run(engine, of)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for name in of:
        with pytest.raises(TraceError, match="injected"):
            engine.report(of[name])
    after = traces()["a"]
    engine.step({"after": 24}, new={"after": after.new})
    engine.step({"after": 24})
    assert_exact(engine, after, engines.model)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(
        trace_graphs.logger, "warning", lambda text, *args: said.append(text % args)
    )
    return said


def test_the_option_is_off_by_default(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    config = engines.loaded.config

    def asked(mode: CUDAGraphMode, **options: Any) -> bool:
        monkeypatch.setattr(config, "additional_config", {"flashtrace": options})
        trace_graphs._say_once.cache_clear()
        return is_asked_for(config, mode)

    modes = CUDAGraphMode
    assert not asked(modes.PIECEWISE)
    assert asked(modes.PIECEWISE, trace_graphs=True)
    assert asked(modes.FULL_AND_PIECEWISE, trace_graphs=True) and not warnings
    for mode in (modes.NONE, modes.FULL, modes.FULL_DECODE_ONLY):
        assert not asked(mode, trace_graphs=True)
        assert "no piecewise graphs" in warnings.pop()
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    assert not asked(modes.PIECEWISE, trace_graphs=True)
    assert "breakable" in warnings.pop()


def v1_dummy_runner(loaded: V2Engine, patch: pytest.MonkeyPatch) -> Any:
    """vLLM's V1 runner with no more than it needs to capture piecewise graphs."""
    runner = v1_runner(loaded, CUDAGraphMode.PIECEWISE, patch)
    ids = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int64)

    def dummy_run(tokens: int, cudagraph_runtime_mode: CUDAGraphMode, **_: Any) -> None:
        with set_forward_context(
            None,
            loaded.config,
            num_tokens=tokens,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
            batch_descriptor=BatchDescriptor(tokens),
        ):
            loaded.model(*(numbers[:tokens] for numbers in ids))

    runner.compilation_config = loaded.config.compilation_config
    runner.load_config, runner.lora_config = loaded.config.load_config, None
    runner.get_model, runner._dummy_run = lambda: loaded.model, dummy_run
    return runner


def test_the_v1_runner_captures_and_dispatches(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engines.loaded
    options = {**loaded.config.additional_config, "flashtrace": {"trace_graphs": True}}
    monkeypatch.setattr(loaded.config, "additional_config", options)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    CUDAGraphWrapper.clear_all_graphs()
    engines.pool.graphs.clear()
    engines.pool.replayed.clear()
    runner = v1_dummy_runner(loaded, monkeypatch)

    def capture_model(self: Any) -> int:
        for mode, descs in self.cudagraph_dispatcher.get_capture_descs():
            self._capture_cudagraphs(batch_descriptors=descs, cudagraph_runtime_mode=mode)
        return 7

    name = "_determine_batch_execution_and_padding"
    for patched in ("execute_model", name, "_model_forward"):
        monkeypatch.setattr(GPUModelRunner, patched, getattr(GPUModelRunner, patched))
    model_runner_v1.apply()
    setattr(runner, _ATTRIBUTE, SimpleNamespace(records_step=True))
    counts = np.full(3, 1, dtype=np.int32)  # Decodes.
    found = runner._determine_batch_execution_and_padding(3, 3, counts, 1)
    assert (found[0], found[1].num_tokens) == (CUDAGraphMode.NONE, 3)  # Nothing is captured yet.
    assert graph_capture.capture_model_wrapper(capture_model)(runner) == 7
    pieces = len(engines.pool.operations(BatchDescriptor(8)))
    for size in (1, 2, 4, 8, 16):
        assert len(engines.pool.operations(TraceBatchDescriptor(size))) == pieces
        assert engines.replayed.count(size) == pieces  # Tried out.
    found = runner._determine_batch_execution_and_padding(3, 3, counts, 1)
    assert (found[0], found[1]) == (CUDAGraphMode.PIECEWISE, BatchDescriptor(4))


@pytest.mark.usefixtures("ranks_exchange")
@pytest.mark.parametrize("peer", [(1, 1, 1), (6, 6, 1), (30, 2, None), (40, 3, None)])
def test_data_parallel_ranks_agree(
    engines: Engines, peer: tuple[int, int, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one is in a batch of decodes, for which it has full graphs."""
    stock = dp_utils_v2.dispatch_cg_and_sync_dp
    manager = graph_manager(
        engines.loaded.config, CUDAGraphMode.FULL_AND_PIECEWISE, SIZES, monkeypatch
    )
    announce(manager)
    step = SimpleNamespace(capture=SimpleNamespace(records_step=True))
    monkeypatch.setattr(model_runner_v2, "_running", step)
    patched = model_runner_v2.dispatch_wrapper(stock)

    def choice(dispatch: Any, rank: int, tokens: int, requests: int, uniform: int | None) -> Any:
        return dispatch(manager, requests, tokens, uniform, 2, rank, max_query_len=uniform)

    for own in ((5, 5, 1), (13, 2, None)):
        mine, theirs = in_step(
            lambda own=own: choice(patched, 0, *own), lambda: choice(stock, 1, *peer)
        )
        assert mine[0].cg_mode == theirs[0].cg_mode
        padded = mine[1].num_tokens_across_dp
        assert torch.equal(padded, theirs[1].num_tokens_across_dp)
        assert [mine[0].num_tokens, theirs[0].num_tokens] == padded.tolist()
        if max(own[0], peer[0]) <= max(SIZES):
            assert mine[0].cg_mode == CUDAGraphMode.PIECEWISE and len(set(padded.tolist())) == 1
        else:
            assert mine[0].cg_mode == CUDAGraphMode.NONE


def failing(mode: CUDAGraphMode) -> None:
    raise RuntimeError("injected")


def test_one_of_several_ranks_may_not_fail_alone() -> None:
    """The others would wait for it in the next collective."""
    with pytest.raises(FlashTraceError, match="start without this option"):
        GraphSets(alone=False).capture(failing, CUDAGraphMode.NONE)


def test_attention_inside_a_piece_is_refused() -> None:
    writer = TapWriter()
    writer.on_attention("layer", torch.ones(1), torch.ones(1))
    writer._calls = []
    with pytest.raises(RuntimeError, match="inside of a captured piece"):
        writer.on_attention("layer", torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("engines", ["glm4"], indirect=True)
def test_norms_behind_blocks(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries wait for what the piece behind attention shows of the block's output."""
    engine, of = engines.fresh(monkeypatch), traces()
    assert proof(engine)["refusal"] is None
    run(engine, of)
    assert set(engines.replayed) >= {4, 8, 24, 32}
    for name in of:
        assert_exact(engine, of[name], engines.model)


def test_pieces_without_a_forward_context_are_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vision encoder runs behind the beginning of an observed forward pass, without a context."""

    def stock(self: Any, *args: Any) -> Any:
        return ("stock", *args)

    monkeypatch.setattr(CUDAGraphWrapper, "__call__", stock)
    graph_capture.use_second_set()
    wrapper: Any = object.__new__(CUDAGraphWrapper)
    wrapper.runtime_mode = CUDAGraphMode.PIECEWISE
    observer: Any = object()
    with observing(observer):
        assert wrapper(1) == ("stock", 1)
