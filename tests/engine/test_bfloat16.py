"""bfloat16 weights and KV: close to float32, and the block order of that kernel is learned too."""

from __future__ import annotations

from pathlib import Path

from tests.engine.harness import Engine, TraceJob, relative_l1, top_overlap
from vllm_flashtrace.core.weights import TargetWeights


def test_bfloat16_against_float32(
    smollm2: Engine, smollm2_folder: Path, trace_tokens: list[int]
) -> None:
    job = TraceJob(trace_tokens, TargetWeights.from_spans([(560, 600)]))
    reference = smollm2.trace(job).scores
    engine = Engine(smollm2_folder, dtype="bfloat16")
    try:
        scores = engine.trace(job).scores
        pruned = engine.trace(TraceJob(job.token_ids, job.weights, 0.9)).scores
    finally:
        engine.close()
    error, overlap = relative_l1(scores, reference), top_overlap(scores, reference)
    print(f"bfloat16 against float32: relative L1 {error:.2e}, top-10 overlap {overlap}/10")
    assert error <= 5e-2
    assert overlap >= 9
    assert relative_l1(pruned, scores) <= 2e-3
