"""An engine that compiles its model gives the scores of an eager one."""

from __future__ import annotations

from pathlib import Path

from tests.engine.harness import Engine, TraceJob, relative_l1, run_hops
from vllm_flashtrace.core.weights import TargetWeights


def test_compiled_equals_eager(
    smollm2: Engine, smollm2_folder: Path, trace_tokens: list[int]
) -> None:
    compiled = Engine(smollm2_folder, enforce_eager=False)
    try:
        # The first pass leaves KV of the compiled forward in the prefix cache.
        assert len(compiled.generate(trace_tokens[:560], 4)) == 4
        job = TraceJob(trace_tokens, TargetWeights.from_spans([(560, 600)]))
        theirs = compiled.trace(job)
        assert theirs.cached_tokens == 512
        error = relative_l1(theirs.scores, smollm2.trace(job).scores)
        hops = run_hops(compiled, trace_tokens, 420, (560, 600), (420, 560), 1)
    finally:
        compiled.close()
    print(f"compiled against eager, relative L1: {error:.2e}")
    assert error <= 1e-3
    eager_hops = run_hops(smollm2, trace_tokens, 420, (560, 600), (420, 560), 1)
    assert relative_l1(hops.scores[:420], eager_hops.scores[:420]) <= 1e-3
