"""gpt-oss: sinks, windows in every other layer, an output bias; what the proof sees left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import (
    TARGET,
    TOKENS,
    Engine,
    TraceJob,
    assert_hops_agree,
    attention_error,
    relative_l1,
    tiny_folder,
)
from tests.engine.test_start_proof import (
    LAYER,
    LIMIT,
    decoder,
    proven,
    reads_form,
    start_reports,
)
from tests.measured import Measured
from vllm_flashtrace.worker import start_proof

folder = tiny_folder("gpt_oss")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """Prefills in chunks, and frees the blocks behind windows of 32."""
    engine = Engine(
        folder,
        "attention sinks",
        in_process=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        block_size=32,
    )
    yield engine
    engine.close()


def test_chunks_beside_other_requests(
    engine: Engine, reference: Any, expected: torch.Tensor, measured: Measured
) -> None:
    job = TraceJob(TOKENS, TARGET, attention=True)
    decoding = [TOKENS[place : place + 100] for place in (0, 150, 300)]
    [report] = engine.trace_many([job], decoding, new_tokens=40)
    error = relative_l1(report.scores, expected)
    proof = start_reports(engine)[0]["largest_error"]
    measured("breaks_gpt_oss", "nothing", error=proof, scores=error)
    assert error <= 1e-5
    assert attention_error(report, reference, job) <= 1e-3


def test_hops_from_one_prefill(engine: Engine) -> None:
    assert_hops_agree(engine, TOKENS, 379)


Change = Callable[[pytest.MonkeyPatch, Any], None]


def reads_sinks(read: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(patch: pytest.MonkeyPatch, layer: Any) -> None:
        reads_form(sinks=read(layer.attn.sinks.detach()))(patch, layer)

    return change


def no_bias(patch: pytest.MonkeyPatch, layer: Any) -> None:
    stock = start_proof._bias

    def bias(traced: Any) -> torch.Tensor:
        read = stock(traced)
        return read * 0 if traced.block is layer.attn else read

    patch.setattr(start_proof, "_bias", bias)


# Layer 2 has a window. A bias is in no score: the proof alone has to know of it.
BREAKS: dict[str, tuple[Change, str, float]] = {
    "sinks": (reads_form(sinks=None), "attention", 1e-3),
    "sinks of other heads": (reads_sinks(lambda sinks: sinks.roll(1)), "attention", 1e-3),
    "sinks 1 % too large": (reads_sinks(lambda sinks: sinks * 1.01), "attention", 5e-5),
    "window (32)": (reads_form(sliding_window=None), "attention", 1e-1),
    "window one token short": (reads_form(sliding_window=31), "attention", 1e-3),
    "output bias": (no_bias, "identity", 0.0),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_left_out_is_seen(
    engine: Engine,
    expected: torch.Tensor,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    good = proven(engine)
    assert good["refusal"] is None and good["largest_error"] < LIMIT / 10, good
    change, measure, wrong = BREAKS[name]
    change(monkeypatch, decoder(engine))
    # What the scores would be without a proof.
    scores = engine.trace(TraceJob(TOKENS, TARGET)).scores
    error = relative_l1(scores, expected)
    report = proven(engine)
    found = report["largest_error"]
    measured("breaks_gpt_oss", name, measure=measure, error=found, scores=error)
    assert report["largest_error"] > 5 * LIMIT
    assert f"failed in layer {LAYER} (" in report["refusal"]
    assert start_proof._MEASURES[measure] in report["refusal"]
    assert error > wrong


def test_the_report(engine: Engine) -> None:
    proven(engine)
    [report] = start_reports(engine)
    found = report["found"]
    assert (found["sinks"], found["output_bias"]) == (True, True)
    assert (found["windows"], found["query_key_norms"]) == ([None, 32], False)
