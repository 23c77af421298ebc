"""Layers with sliding windows or chunks, in KV cache groups that free the blocks behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine, TraceJob, attention_error, relative_l1
from tests.engine.test_start_proof import start_reports
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import LLAMA4_ENGINE, make_tiny_model, make_windowed_llama
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.hops import FurtherHops
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.patches import kept_blocks

MIXED = ("full_attention", "sliding_attention")
# Blocks of a cache that has room for 700 tokens and not for 1,400.
BLOCKS = {"mixed": 70, "windows": 40, "chunks": 96}
TOKENS = torch.randint(5, 500, (700,), generator=torch.Generator().manual_seed(1)).tolist()
LONG = TOKENS * 2


@pytest.mark.parametrize("kind", BLOCKS)
def test_traces(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """In steps of 16, with and without a prefix-cache hit, beside requests that take blocks."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if kind == "chunks":
        folder = reference = make_tiny_model("llama4", tmp_path / "llama4")
        options = LLAMA4_ENGINE
    else:
        kinds = MIXED if kind == "mixed" else ("sliding_attention",) * 2
        folder, reference = make_windowed_llama(tmp_path, kinds)
    model = AutoModelForCausalLM.from_pretrained(
        reference, attn_implementation="eager", dtype=torch.float32
    )
    engine = Engine(
        folder,
        "caches that forget",
        in_process=True,
        max_model_len=1536,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=BLOCKS[kind],
        **options,
    )

    def errors(stop: int, start: int, rows: FurtherHops | None = None) -> float:
        weights = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(start, stop)})
        job = TraceJob(TOKENS[:stop], weights, attention=rows is None, further=rows)
        decoding = [TOKENS[place : place + 150] for place in (100, 300, 500)]
        [report] = engine.trace_many([job], decoding, new_tokens=50)
        if job.attention:
            assert attention_error(report, model, job) <= 1e-3
        expected = oracle_scores(model, job.token_ids, weights.positions, weights.weights)
        return relative_l1(report.scores, expected)

    try:
        [proof] = start_reports(engine)
        assert proof["refusal"] is None and proof["largest_error"] < 1e-5
        found = {
            "chunks": errors(700, 250),
            "again": errors(700, 250),
            "hit": errors(500, 300),
            "hops": errors(700, 650, FurtherHops(torch.arange(300, 420), 2)),
        }
        print(f"{kind}: relative L1 {found}")
        where = {
            "mixed": "windows in some",
            "windows": "windows in all",
            "chunks": "chunks in some",
        }
        row = f"{where[kind]} layers, cache groups that forget"
        measured("ways", row, against="oracle", scores=max(found.values()))
        assert max(found.values()) <= 1e-4
        last = TargetWeights.from_spans([(1350, 1400)])
        with pytest.raises(TraceError, match="too small to keep all blocks of 1400 tokens"):
            engine.trace(TraceJob(LONG, last))
        assert len(engine.generate(LONG, 4)) == 4
        assert not kept_blocks._traces
        with monkeypatch.context() as patch:  # What it is there for.
            patch.setattr(kept_blocks, "_note", lambda *_: None)
            error = errors(700, 250)
            measured("ways", f"{row}, blocks not kept", against="oracle", scores=error)
            assert error > 1e-2
    finally:
        engine.close()
