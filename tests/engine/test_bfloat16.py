"""bfloat16 weights and KV: close to float32, and the block order of that kernel is learned too."""

from __future__ import annotations

from pathlib import Path

from tests.engine.harness import SMOLLM2_KV_BYTES, Engine, TraceJob, relative_l1, top_overlap
from tests.measured import Measured
from vllm_flashtrace.core.weights import TargetWeights


def test_bfloat16_against_float32(
    smollm2: Engine, smollm2_folder: Path, trace_tokens: list[int], measured: Measured
) -> None:
    job = TraceJob(trace_tokens[:160], TargetWeights.from_spans([(130, 160)]))
    reference = smollm2.trace(job).scores
    engine = Engine(
        smollm2_folder,
        "bfloat16",
        in_process=True,
        dtype="bfloat16",
        kv_cache_memory_bytes=SMOLLM2_KV_BYTES,
    )
    try:
        cold = engine.trace(job).scores  # the whole trace in one step
        scores = engine.trace(job).scores  # what the prefix cache does not hold
        pruned = engine.trace(TraceJob(job.token_ids, job.weights, 0.9)).scores
    finally:
        engine.close()
    error, overlap = relative_l1(scores, reference), top_overlap(scores, reference)
    print(f"top-10 overlap {overlap}/10")
    measured("ways", "SmolLM2-135M in bfloat16", against="float32", scores=error)
    print(f"whole trace against cached prefix: {relative_l1(cold, scores):.2e}")
    print(f"pruned against exact: {relative_l1(pruned, scores):.2e}")
    assert error <= 5e-2
    # Products of other sizes round differently in bfloat16.
    assert relative_l1(cold, scores) <= 1e-2
    assert overlap >= 9
    assert relative_l1(pruned, scores) <= 2e-3
