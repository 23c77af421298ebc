"""Gates between attention and its output projection: chunks, hops, and what the proof sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import (
    TARGET,
    TOKENS,
    WAYS,
    Engine,
    TraceJob,
    assert_hops_agree,
    attention_error,
    relative_l1,
    tiny_folder,
)
from tests.engine.test_start_proof import LAYER, LIMIT, decoder, proven, start_reports
from tests.engine.worker_faults import core_each
from tests.measured import Measured
from tests.oracle import capture_hf
from tests.tiny_models import FAMILY_NAMES
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.worker.layers import find_layers
from vllm_flashtrace.worker.output_gates import OutputGate

# One gate for each coordinate, behind which the block's output is normed; one for each head.
FAMILIES = ("afmoe", "laguna")

folder = tiny_folder(*FAMILIES)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """Prefills in chunks."""
    engine = Engine(
        folder,
        f"output gates, {folder.name}",
        in_process=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        block_size=32,
    )
    yield engine
    engine.close()


def test_the_oracle_has_the_gates_of_the_formula(reference: Any) -> None:
    """It takes them from what is projected, and knows nothing of how they are made."""
    seen = []
    block = reference.model.layers[LAYER].self_attn
    sigmoid = hasattr(block, "gate_proj")
    projection = block.gate_proj if sigmoid else block.g_proj

    def note(_: Any, __: Any, output: torch.Tensor) -> None:
        seen.append(output[0].detach())

    with projection.register_forward_hook(note):
        reference.model(torch.tensor([TOKENS]))
    read = capture_hf(reference, TOKENS)[LAYER].gate
    made = torch.sigmoid(seen[0]) if sigmoid else torch.log1p(seen[0].exp())
    width = made.shape[-1] // read.shape[1]
    assert torch.allclose(read.float(), made.view(len(TOKENS), -1, width), rtol=1e-3, atol=1e-5)


def test_chunks_beside_other_requests(
    engine: Engine, reference: Any, expected: torch.Tensor
) -> None:
    job = TraceJob(TOKENS, TARGET, layers=True, attention=True)
    decoding = [TOKENS[place : place + 100] for place in (0, 150, 300)]
    reports = engine.trace_many([job, TraceJob(TOKENS, TARGET)], decoding, new_tokens=40)
    for report in reports:
        error = relative_l1(report.scores, expected)
        print(f"relative L1 {error:.1e}")
        assert error <= 1e-5
    assert attention_error(reports[0], reference, job) <= 1e-3
    layer_scores = reports[0].layer_scores
    assert layer_scores is not None
    assert relative_l1(layer_scores.sum(0), reports[0].scores) <= 1e-6


def test_hops_from_one_prefill(engine: Engine) -> None:
    assert_hops_agree(engine, TOKENS, 379)


def test_targets_from_one_prefill(engine: Engine) -> None:
    spans = [(380, 390), (390, 400)]
    first, second = (TargetWeights.from_spans([span]) for span in spans)
    further = FurtherHops(torch.arange(110, 380), 1, 0.0)
    others = [TracedTarget(second, further)]
    together = engine.trace(TraceJob(TOKENS, first, further=further, others=others))
    for target, hops in zip((first, second), together.targets, strict=True):
        alone = engine.trace(TraceJob(TOKENS, target, further=further))
        for ours, theirs in zip(hops, (alone.scores, *alone.later_scores), strict=True):
            assert relative_l1(ours, theirs) <= 1e-5


Values = Callable[[OutputGate, torch.Tensor], torch.Tensor]
STOCK: Values = OutputGate.values


def reads(read: Callable[[torch.Tensor], torch.Tensor]) -> Values:
    return lambda gate, hidden_states: read(STOCK(gate, hidden_states))


def without_function(gate: OutputGate, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the gate is before its sigmoid or softplus, without the sign: column sums have none."""
    gates = STOCK(gate, hidden_states).double()
    raw = torch.logit(gates) if hasattr(gate.block, "gate_proj") else torch.expm1(gates).log()
    return raw.abs().float()


BREAKS: dict[str, Values] = {
    "gate": reads(torch.ones_like),
    "gate of another head": reads(lambda gates: gates.roll(1, 0)),
    "gate 1 % too large": reads(lambda gates: gates * 1.01),
    "its sigmoid or softplus": without_function,
    "gate of another input": lambda gate, hidden_states: STOCK(gate, hidden_states.flip(-1)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_left_out_is_seen(
    engine: Engine,
    folder: Path,
    expected: torch.Tensor,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    good = proven(engine)
    assert good["refusal"] is None and good["largest_error"] < LIMIT / 10, good
    block = decoder(engine).self_attn

    def values(self: OutputGate, hidden_states: torch.Tensor) -> torch.Tensor:
        return (BREAKS[name] if self.block is block else STOCK)(self, hidden_states)

    monkeypatch.setattr(OutputGate, "values", values)
    # What the scores would be without a proof.
    scores = engine.trace(TraceJob(TOKENS, TARGET)).scores
    error = relative_l1(scores, expected)
    report = proven(engine)
    family, found = folder.name, report["largest_error"]
    measured("breaks_gates", name, **{family: found, f"{family}_scores": error})
    assert report["largest_error"] > 5 * LIMIT
    assert f"failed in layer {LAYER} (" in report["refusal"]
    assert "contributions do not add up" in report["refusal"]


def test_inputs_of_blocks_that_were_not_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder(engine).self_attn, "_forward_pre_hooks", {})
    with pytest.raises(TraceError, match="3 inputs of blocks were seen"):
        engine.trace(TraceJob(TOKENS, TARGET))


def test_the_report(engine: Engine) -> None:
    proven(engine)
    [report] = start_reports(engine)
    assert report["found"]["output_gates"]
    assert bool(report["found"]["block_norms"]) == (report["found"]["windows"] == [None, 64])


def test_gates_that_are_not_known(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    block = decoder(engine).self_attn
    name = "gate_proj" if hasattr(block, "gate_proj") else "g_proj"

    def found(worker: Any) -> Any:
        return find_layers(worker.model_runner.get_model(), worker.vllm_config)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(block, name), "output_size_per_partition", 3)
        with pytest.raises(UnsupportedModelError, match="an output gate that is not one"):
            engine.on_worker(found)
    with monkeypatch.context() as patch:
        patch.delitem(block._modules, name)
        with pytest.raises(UnsupportedModelError, match="in some attention layers only"):
            engine.on_worker(found)
    monkeypatch.setattr(engine.llm.llm_engine.vllm_config, "lora_config", object())
    with pytest.raises(UnsupportedModelError, match="an output gate and LoRA adapters"):
        engine.on_worker(found)


# What no other test proves of them is the tap in compiled code, and the gates of a rank's heads.
@pytest.mark.long
@pytest.mark.timeout(480)
@pytest.mark.parametrize("way", WAYS)
def test_ways(
    way: str,
    folder: Path,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    if way == "ranks":
        core_each(monkeypatch, 2)
    engine = Engine(folder, f"output gates, {way}", **WAYS[way])
    try:
        for report in start_reports(engine):
            assert report["refusal"] is None and report["largest_error"] < 1e-5, report
        trace = engine.trace(TraceJob(TOKENS, TARGET))
    finally:
        engine.close()
    error = relative_l1(trace.scores, expected)
    measured("families", FAMILY_NAMES[folder.name], **{way: error})  # type: ignore[index]
    assert error <= 1e-5
