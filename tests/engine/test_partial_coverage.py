"""Models some of whose layers cannot be traced: through the others alone, and only if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.same_bits import ENGINE_OPTIONS
from tests.engine.harness import (
    Engine,
    TraceJob,
    assert_hops_agree,
    oracle_head_scores,
    random_heads,
    relative_l1,
    structure,
    tiny_folder,
)
from tests.engine.test_start_proof import proven, start_reports
from tests.engine.worker_faults import core_each
from tests.measured import Measured
from tests.oracle import as_float64, oracle_changes, oracle_layer_scores
from tests.tiny_models import FAMILY_NAMES, HYBRIDS
from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.base.records import Coverage
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.worker import layers
from vllm_flashtrace.worker.output_gates import OutputGate

TOKENS = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
TARGET = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in [*range(150, 170), *range(250, 300)]})
PARTIAL = {"flashtrace": {"partial_coverage": True}}
# vLLM's linear attention takes nothing but bfloat16 on a CPU. That changes the stream of this model
# by 1 to 2 %, in Transformers' code as in vLLM's.
TYPES = {"granite_hybrid": torch.float32, "qwen3_next": torch.bfloat16}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

folder = tiny_folder(*HYBRIDS)


@pytest.fixture(scope="module")
def dtype(folder: Path) -> torch.dtype:
    return TYPES[folder.name]


@pytest.fixture(scope="module")
def reference(folder: Path, dtype: torch.dtype) -> Any:
    """Its weights are rounded as the engine's are, and nothing else."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    return as_float64(model)


@pytest.fixture(scope="module")
def engine(folder: Path, dtype: torch.dtype) -> Iterator[Engine]:
    """Prefills in chunks, beside others."""
    heads = random_heads(folder)[1]["additional_config"]["flashtrace"]
    engine = Engine(
        folder,
        f"layers without attention, {folder.name}",
        in_process=True,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=1024,
        max_num_batched_tokens=200,
        max_num_seqs=8,
        # vLLM's state-space layers cannot keep states for a prefix cache on a CPU.
        enable_prefix_caching=False,
        additional_config={"flashtrace": {**PARTIAL["flashtrace"], **heads}},
    )
    yield engine
    engine.close()


def test_scores_of_the_traced_layers(
    engine: Engine, folder: Path, reference: Any, dtype: torch.dtype, measured: Measured
) -> None:
    """The oracle's sum over the layers that have attention."""
    job = TraceJob(TOKENS, TARGET, layers=True, attention=True)
    report, *_ = engine.trace_many([job], [TOKENS[:50]], new_tokens=8)
    expected = oracle_layer_scores(reference, TOKENS, TARGET.positions, TARGET.weights)
    assert len(expected) == 2
    error = relative_l1(report.scores, expected.sum(0))
    cells = {str(dtype).removeprefix("torch."): error, **structure(start_reports(engine)[0])}
    measured("families", FAMILY_NAMES[folder.name], **cells)  # type: ignore[index]
    assert error <= LIMITS[dtype]
    assert report.coverage == Coverage((1, 3), 4)
    assert report.layer_scores is not None and report.attention is not None
    for index, scores in enumerate(report.layer_scores):
        if index in report.coverage.layers:
            assert relative_l1(scores, expected[index // 2]) <= 2 * LIMITS[dtype]
            assert report.attention[index].any()
        else:
            assert not scores.any() and not report.attention[index].any()


def test_how_much_of_the_change_is_theirs(
    engine: Engine, reference: Any, dtype: torch.dtype
) -> None:
    other = TargetWeights.from_spans([(200, 220)])
    further = FurtherHops(torch.arange(110, 200), 1, 0.0)
    jobs = [
        TraceJob(TOKENS, TARGET),
        TraceJob(TOKENS, TARGET, further=further, others=[TracedTarget(other, further)]),
    ]
    alone, together = (engine.trace(job).changes for job in jobs)
    assert alone is not None and together is not None
    assert alone.shape == (1, 2) and together.shape == (2, 2)
    for target, measured in ((TARGET, alone[0]), (TARGET, together[0]), (other, together[1])):
        expected = oracle_changes(reference, TOKENS, target.positions, target.weights)
        assert measured.tolist() == pytest.approx(expected, rel=LIMITS[dtype])
        assert 0.1 < expected[0] / expected[1] < 0.9


def test_weights_of_heads(engine: Engine, folder: Path, reference: Any, dtype: torch.dtype) -> None:
    """Those of layers without attention count for nothing, and no stream is measured."""
    report = engine.trace(TraceJob(TOKENS, TARGET, layers=True, heads=True))
    weights = random_heads(folder)[0][[1, 3]]
    expected = oracle_head_scores(reference, TOKENS, TARGET, weights)
    assert relative_l1(report.scores, expected.sum(0)) <= LIMITS[dtype]
    assert report.coverage == Coverage((1, 3), 4) and report.changes is None
    assert report.layer_scores is not None and len(report.layer_scores) == 4
    further = FurtherHops(torch.arange(110, 250), 1, 0.0)
    assert engine.trace(TraceJob(TOKENS, TARGET, further=further, heads=True)).changes is None


def test_hops_from_one_prefill(engine: Engine, dtype: torch.dtype) -> None:
    assert_hops_agree(engine, TOKENS, 250, LIMITS[dtype])


def test_a_gate_that_is_left_out(
    engine: Engine, folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-Next makes it by the projection of queries; bfloat16 hides nothing of that size."""
    if folder.name != "qwen3_next":
        assert not start_reports(engine)[0]["found"]["output_gates"]
        return
    expected = oracle_layer_scores(reference, TOKENS, TARGET.positions, TARGET.weights).sum(0)
    stock = OutputGate.values
    for wrong in (torch.ones_like, lambda gates: gates.roll(1, 0), lambda gates: gates * 1.1):
        monkeypatch.setattr(OutputGate, "values", lambda *args, f=wrong: f(stock(*args)))
        report = proven(engine)
        error = relative_l1(engine.trace(TraceJob(TOKENS, TARGET)).scores, expected)
        print(f"proof {report['largest_error']:.2g}, relative L1 {error:.1e}")
        assert "contributions do not add up" in report["refusal"]


def test_the_report(engine: Engine) -> None:
    proven(engine)
    [report] = start_reports(engine)
    assert report["refusal"] is None and report["largest_error"] < report["limit"] / 5
    assert report["found"]["layers"] == [1, 3]
    assert report["found"]["untraced_layers"] == [0, 2]


def test_without_the_option(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine.llm.llm_engine.vllm_config

    def found(worker: Any) -> list[int]:
        model = worker.model_runner.get_model()
        return [layer.index for layer in layers.find_layers(model, config)]

    assert engine.on_worker(found) == [1, 3]
    monkeypatch.setattr(config, "additional_config", {})
    with pytest.raises(UnsupportedModelError) as caught:
        engine.on_worker(found)
    assert caught.value.message == (
        "2 of 4 decoder layers have no attention layer; the option 'partial_coverage' traces the "
        "other 2 alone"
    )


def test_attention_of_another_kind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out like a layer without attention, and its reason is said where that is not."""
    config = engine.llm.llm_engine.vllm_config

    def found(worker: Any) -> list[int]:
        model = worker.model_runner.get_model()
        return [layer.index for layer in layers.find_layers(model, config)]

    name = "model.layers.1.self_attn.attn"
    attention = config.compilation_config.static_forward_context[name]
    monkeypatch.setattr(attention, "kv_sharing_target_layer_name", "another")
    assert engine.on_worker(found) == [3]
    monkeypatch.setattr(config, "additional_config", {})
    reason = f"traces are not supported with KV sharing between layers ({name})"
    with pytest.raises(UnsupportedModelError) as caught:
        engine.on_worker(found)
    assert (
        caught.value.message == f"{reason}; the option 'partial_coverage' traces the other 1 alone"
    )
    other = config.compilation_config.static_forward_context["model.layers.3.self_attn.attn"]
    monkeypatch.setattr(other, "kv_sharing_target_layer_name", "another")
    with pytest.raises(UnsupportedModelError) as caught:
        engine.on_worker(found)
    assert caught.value.message == reason


WAYS: dict[str, dict[str, Any]] = {
    "compiled": {**ENGINE_OPTIONS, "enable_prefix_caching": False},
    "ranks": {
        "tensor_parallel_size": 2,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
    },
}


# What no other test proves of them is the taps in compiled code, and that ranks agree on layers of
# which some are left out.
@pytest.mark.long
@pytest.mark.timeout(480)
@pytest.mark.parametrize("way", WAYS)
def test_ways(
    way: str,
    folder: Path,
    reference: Any,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    if way == "ranks":
        core_each(monkeypatch, 2)
    engine = Engine(
        folder,
        f"layers without attention, {way}, {folder.name}",
        **{**WAYS[way], "dtype": str(dtype).removeprefix("torch."), "additional_config": PARTIAL},
    )
    try:
        report = engine.trace(TraceJob(TOKENS, TARGET, attention=True))
    finally:
        engine.close()
    expected = oracle_layer_scores(reference, TOKENS, TARGET.positions, TARGET.weights)
    error = relative_l1(report.scores, expected.sum(0))
    measured("families", FAMILY_NAMES[folder.name], **{way: error})  # type: ignore[index]
    changes = oracle_changes(reference, TOKENS, TARGET.positions, TARGET.weights)
    assert report.changes is not None
    assert report.changes[0].tolist() == pytest.approx(changes, rel=LIMITS[dtype])
    assert error <= LIMITS[dtype]
    assert report.coverage == Coverage((1, 3), 4)
    assert report.attention is not None and report.attention.shape[:2] == (4, 4)
