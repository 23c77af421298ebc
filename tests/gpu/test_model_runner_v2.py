"""Whole traces through vLLM's V2 runner, its batches and its caches, against the oracle."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu import model_runner

from tests.engine.harness import oracle_head_scores, relative_l1
from tests.engine.test_scores import log_probs
from tests.gpu.test_start_proof import proof
from tests.gpu.v2_engine import (
    LIMIT,
    V2Engine,
    apply_patches,
    assert_exact,
    exact_error,
    token_ids,
    traced,
    untraced,
    v2_engine,
)
from tests.measured import Measured
from tests.oracle import as_float64
from tests.tiny_models import FAMILY_NAMES, make_tiny_model
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.base.records import ScoredText
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.pickup import pick_up_score_now
from vllm_flashtrace.trace.wire import ScoreSpec, TraceSpec, decode_wire, seal
from vllm_flashtrace.worker import gpu_model, taps
from vllm_flashtrace.worker import runner as adapter
from vllm_flashtrace.worker.cache_groups import CacheGroups
from vllm_flashtrace.worker.gpu_cache import KeyValueViews
from vllm_flashtrace.worker.gpu_model import GPUTracedModel
from vllm_flashtrace.worker.observer import current


@pytest.mark.parametrize("chunks", [(100,), (70, 30), (99, 1), (60, 1, 1, 38), (32, 32, 36)])
def test_chunks(engine: V2Engine, float64_llama: Any, chunks: tuple[int, ...]) -> None:
    trace = traced(100, (58, 64), (90, 100))
    new: dict[str, Any] = {"trace": trace.new}
    for count in chunks:
        engine.step({"trace": count}, new=new)
        new = {}
    report = assert_exact(engine, trace, float64_llama)
    assert report.recomputed_tokens == 100 and report.cached_tokens == report.restarts == 0


def test_tokens_are_scored_in_chunks_beside_a_trace(engine: V2Engine, float64_llama: Any) -> None:
    text, trace = ScoredText(token_ids(90, 3), [1, *range(30, 66), 89]), traced(60, (50, 60))
    spec = ScoreSpec.create(text.positions, 90)
    new = {"trace": trace.new, "score": (list(text.token_ids), seal(spec))}
    engine.step({"trace": 40, "score": 32}, new=new)
    engine.step({"score": 33, "trace": 20})
    assert_exact(engine, trace, float64_llama)
    with pytest.raises(TraceError, match="holds no result"):
        decode_wire(engine.capture.recorder.collect(spec.nonce))
    engine.step({"score": 25})
    report = pick_up_score_now(spec.nonce, lambda _, args: [engine.capture.recorder.collect(*args)])
    assert (report.log_probs - log_probs(float64_llama, text)).abs().max() < 1e-4
    assert (report.recomputed_tokens, report.cached_tokens) == (90, 0)


@pytest.mark.parametrize("spans", [((20, 61),), ((20, 40), (45, 61))], ids=["near", "apart"])
def test_further_hops(engine: V2Engine, float64_llama: Any, spans: Any) -> None:
    """Rows that lie side by side are summed for all layers at once, others layer by layer."""
    followed = TargetWeights.from_spans(spans).positions
    further = FurtherHops(followed, hops=2)
    target = traced(100, (70, 80), (90, 100))
    spec = TraceSpec.create([TracedTarget(target.weights, further)], 100, exact_fraction=1.0)
    trace = dataclasses.replace(target, spec=spec)
    engine.step({"trace": 50}, new={"trace": trace.new})
    engine.step({"trace": 25, "other": 30}, new={"other": untraced(30, 1)})
    engine.step({"trace": 25})
    report = assert_exact(engine, trace, float64_llama)
    assert len(report.later_scores) == 2
    scores, mass = report.scores, 1.0
    for later in report.later_scores:
        weights, mass = further.after(scores, mass)
        assert weights is not None
        exact = dataclasses.replace(target, weights=weights).oracle(float64_llama)
        assert relative_l1(later, exact) < LIMIT
        scores = later
    assert engine.capture.recorder.accumulator_bytes == 0


def test_weights_of_heads(engine: V2Engine, float64_llama: Any) -> None:
    """One hop beside another trace, and all hops from one prefill."""
    engine.step({"first": 20}, new={"first": traced(20, (10, 20)).new})  # Makes the capture.
    model = engine.capture.recorder._model
    assert model is not None
    sizes = model.shape.num_layers, model.shape.num_heads
    weights = torch.rand(sizes, generator=torch.Generator().manual_seed(3))
    model.take_head_weights(weights)

    def expected(token_ids: list[int], target: TargetWeights) -> torch.Tensor:
        return oracle_head_scores(float64_llama, token_ids, target, weights).sum(0)

    beside, one, hops = traced(100, (58, 100)), traced(90, (50, 90), seed=1), traced(80, (70, 80))
    further = FurtherHops(TargetWeights.from_spans([(20, 40), (45, 61)]).positions, hops=1)
    targets = {"one": TracedTarget(one.weights), "hops": TracedTarget(hops.weights, further)}
    asked = {
        name: dataclasses.replace(
            trace,
            spec=TraceSpec.create(
                [targets[name]], len(trace.token_ids), exact_fraction=1.0, heads=True
            ),
        )
        for name, trace in (("one", one), ("hops", hops))
    }
    new = {name: trace.new for name, trace in {"beside": beside, **asked}.items()}
    engine.step({"beside": 70, "one": 60, "hops": 50}, new=new)
    engine.step({"beside": 30, "one": 30, "hops": 30})
    assert_exact(engine, beside, float64_llama)
    report = engine.report(asked["one"])
    assert relative_l1(report.scores, expected(one.token_ids, one.weights)) < LIMIT
    report = engine.report(asked["hops"])
    assert relative_l1(report.scores, expected(hops.token_ids, hops.weights)) < LIMIT
    following, _ = further.after(report.scores, 1.0)
    [later] = report.later_scores
    assert following is not None
    assert relative_l1(later, expected(hops.token_ids, following)) < LIMIT


@pytest.mark.parametrize("together", [True, False])
def test_layers_in_two_groups_of_the_cache(
    engine: V2Engine, float64_llama: Any, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second layer is read through another block table, over blocks in another order."""
    stock_groups, stock_tables = adapter.cache_groups, adapter._kernel_block_tables
    stock_views = GPUTracedModel._views
    blocks = len(engine.model.model.layers[0].self_attn.attn.kv_cache)

    def groups(*args: Any) -> CacheGroups:
        return dataclasses.replace(stock_groups(*args), numbers=(0, 0), places=(0, 1, 0, 1))

    def tables(*args: Any) -> list[torch.Tensor]:
        first, second = stock_tables(*args)
        return [first, blocks - 1 - second]

    def views(self: GPUTracedModel, layer: int, *args: Any) -> KeyValueViews:
        found = stock_views(self, layer, *args)
        return KeyValueViews(*(half.flip(0) for half in found)) if layer % 2 else found

    monkeypatch.setattr(adapter, "cache_groups", groups)
    monkeypatch.setattr(adapter, "_kernel_block_tables", tables)
    monkeypatch.setattr(GPUTracedModel, "_views", views)
    if not together:
        monkeypatch.setattr(GPUTracedModel, "keep_queries", lambda *_: None)
    one, hops = traced(100, (58, 64), (90, 100)), traced(80, (70, 80), seed=1)
    further = FurtherHops(TargetWeights.from_spans([(20, 61)]).positions, hops=1)
    spec = TraceSpec.create([TracedTarget(hops.weights, further)], 80, exact_fraction=1.0)
    hops = dataclasses.replace(hops, spec=spec)
    engine.step({"one": 60, "hops": 50}, new={"one": one.new, "hops": hops.new})
    engine.step({"one": 40, "hops": 30})
    assert_exact(engine, one, float64_llama)
    assert_exact(engine, hops, float64_llama)


def test_taps_beside_a_fused_all_reduce(
    tiny_llama: Path, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a block adds is not looked at there, but the stream before and behind it."""
    monkeypatch.setattr(taps, "_fuses_all_reduce", lambda _: True)
    trace = traced(100, (58, 64), (90, 100))
    with v2_engine(tiny_llama, monkeypatch) as loaded:
        apply_patches(monkeypatch)
        engine = V2Engine(loaded.model, loaded.config, loaded.layout)
        engine.step({"trace": 70}, new={"trace": trace.new})
        engine.step({"trace": 30})
        assert_exact(engine, trace, float64_llama)


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model in which a norm lies between each attention block and the stream."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("glm4", tmp_path_factory.mktemp("glm4"))
    return folder, as_float64(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("kept", [1024, 0], ids=["kept", "layer by layer"])
@pytest.mark.parametrize("spans", [((20, 61),), ((20, 40), (45, 61))], ids=["near", "apart"])
def test_normed_blocks(
    normed: tuple[Path, Any],
    kept: int,
    spans: Any,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    """Two traces in chunks, one with further hops, whose rows are kept or not."""
    folder, float64 = normed
    monkeypatch.setattr(gpu_model, "KEPT_ROWS", kept)
    further = FurtherHops(TargetWeights.from_spans(spans).positions, hops=1)
    other, target = traced(100, (58, 64), (90, 100), seed=1), traced(100, (70, 80), (90, 100))
    spec = TraceSpec.create([TracedTarget(target.weights, further)], 100, exact_fraction=1.0)
    trace = dataclasses.replace(target, spec=spec)
    with v2_engine(folder, monkeypatch) as loaded:
        apply_patches(monkeypatch)
        engine = V2Engine(loaded.model, loaded.config, loaded.layout)
        assert proof(engine)["refusal"] is None
        engine.step({"other": 62, "trace": 50}, new={"other": other.new, "trace": trace.new})
        engine.step({"other": 38, "trace": 25})
        engine.step({"trace": 25})
        error = exact_error(engine, other, float64)
        measured("gpu_backends", "FLASH_ATTN", glm4=error)
        measured("families", FAMILY_NAMES["glm4"], gpu="adapter")
        report = assert_exact(engine, trace, float64)
    weights, _ = further.after(report.scores, 1.0)
    assert weights is not None
    exact = dataclasses.replace(target, weights=weights).oracle(float64)
    assert relative_l1(report.later_scores[0], exact) < LIMIT


def test_normed_blocks_beside_a_fused_all_reduce(
    normed: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tap would undo the fusion, so there is none and the model is refused."""
    monkeypatch.setattr(taps, "_fuses_all_reduce", lambda _: True)
    with (
        pytest.raises(UnsupportedModelError, match="fuse_allreduce_rms false"),
        v2_engine(normed[0], monkeypatch),
    ):
        pass


def test_place_in_the_batch_is_not_the_index(engine: V2Engine, float64_llama: Any) -> None:
    """vLLM sorts a batch by its number of tokens; indices come from the request states."""
    trace = traced(80, (60, 80))
    others = {f"other-{i}": untraced(64, i) for i in range(3)}
    engine.step({name: 10 + i for i, name in enumerate(others)}, new=others)
    engine.step({"trace": 65, "other-0": 1, "other-2": 30}, new={"trace": trace.new})
    engine.step({"other-1": 20, "trace": 15, "other-0": 17})
    index = engine.runner.req_states.req_id_to_index
    batch = ["other-0", "trace", "other-1"]
    assert [index[name] for name in batch] != list(range(3))
    assert_exact(engine, trace, float64_llama)


def test_several_traces_in_a_step(engine: V2Engine, float64_llama: Any) -> None:
    traces = {f"t{i}": traced(70 + 9 * i, (40 + 5 * i, 66 + 5 * i), seed=i) for i in range(3)}
    engine.step({"t0": 50, "other": 3}, new={"t0": traces["t0"].new, "other": untraced(40, 9)})
    new = {name: traces[name].new for name in ("t1", "t2")}
    engine.step({"t1": 79, "t0": 10, "t2": 60, "other": 1}, new=new)
    engine.step({"t2": 28, "other": 30, "t0": 10})
    for trace in traces.values():
        assert_exact(engine, trace, float64_llama)
    assert not engine.capture.recorder.active_requests


def test_rows_that_pad_a_step(
    tiny_llama: Path, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded tokens and requests come last and are none of a trace's."""
    stock = model_runner.dispatch_cg_and_sync_dp

    @functools.wraps(stock)
    def padded(*args: Any, **kwargs: Any) -> Any:
        described, sync = stock(*args, **kwargs)
        return dataclasses.replace(described, num_tokens=128, num_reqs=7), sync

    monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", padded)
    trace = traced(90, (50, 90))
    with v2_engine(tiny_llama, monkeypatch) as engine:
        apply_patches(monkeypatch)
        engine.step({"trace": 60, "other": 4}, new={"trace": trace.new, "other": untraced(9, 1)})
        engine.step({"other": 2, "trace": 30})
        assert len(engine.runner.input_buffers.positions) >= 128
        assert_exact(engine, trace, float64_llama)


@pytest.mark.parametrize("hit", [0, 32])
@pytest.mark.parametrize("computed", [40, 70])
def test_preempted_request(engine: V2Engine, float64_llama: Any, computed: int, hit: int) -> None:
    """The V2 scheduler sends a request that comes back as a new one, maybe with cached blocks."""
    trace = traced(100, (60, 100))
    new = {"trace": trace.new, "other": untraced(50, 1)}
    engine.step({"trace": computed, "other": 10}, new=new)
    engine.step({"other": 5}, preempted=["trace"])
    engine.step({"other": 5})
    engine.step({"trace": 40, "other": 1}, new={"trace": trace.new}, hits={"trace": hit})
    engine.step({"trace": 60 - hit})
    report = assert_exact(engine, trace, float64_llama)
    assert report.restarts == 1
    assert (report.cached_tokens, report.recomputed_tokens) == (hit, 100 - hit)


def test_aborted_request(engine: V2Engine, float64_llama: Any) -> None:
    gone, trace = traced(100, (40, 100)), traced(80, (50, 80), seed=3)
    engine.step({"gone": 70}, new={"gone": gone.new})
    assert engine.capture.recorder.accumulator_bytes > 0
    engine.step({"trace": 80}, new={"trace": trace.new}, finished=["gone"])
    with pytest.raises(TraceError) as caught:
        engine.report(gone)
    assert caught.value.code == "result_missing"
    assert_exact(engine, trace, float64_llama)
    assert engine.capture.recorder.accumulator_bytes == 0


def test_a_runner_without_traces_keeps_nothing(engine: V2Engine) -> None:
    engine.step({"other": 20}, new={"other": untraced(30, 1)})
    engine.step({"other": 10})
    assert adapter.existing_capture(engine.runner) is None and current() is None


def test_no_token_is_scheduled(engine: V2Engine, float64_llama: Any) -> None:
    """A step may only tell of finished requests; a trace in progress is not disturbed."""
    trace = traced(60, (40, 60))
    engine.step({"trace": 50, "other": 8}, new={"trace": trace.new, "other": untraced(8, 1)})
    output = engine.steps.step({}, finished=["other"])
    assert engine.runner.execute_model(output, None).req_ids == []
    engine.step({"trace": 10})
    assert_exact(engine, trace, float64_llama)
