"""Engines that draft tokens: completions are the same, and traces of them are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import engine_starts
from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.engine.test_start_proof import start_reports
from tests.forked import run_forked
from tests.measured import Measured
from tests.oracle import oracle_scores
from vllm_flashtrace.base.records import TraceReport
from vllm_flashtrace.core.hops import FurtherHops
from vllm_flashtrace.core.weights import TargetWeights

PROMPT = list(range(10, 40)) * 4
PROMPTS = [PROMPT, PROMPT[7:], PROMPT[1:] + PROMPT]
DRAFTS = 3
NEW_TOKENS = 60


def ngram(_: Path, __: Path) -> dict[str, Any]:
    return {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1}


def eagle(model: Path, folder: Path) -> dict[str, Any]:
    """A drafter with one attention layer of its own, made of the model's first layer."""
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    prefix, without = "model.layers.0.", "model.layers.0.input_layernorm.weight"
    weights = {
        name.removeprefix("model."): weight
        for name, weight in load_file(model / "model.safetensors").items()
        if name.startswith(prefix) and name != without
    }
    # What it is given is the token's embedding and the model's stream; it keeps the first.
    weights["fc.weight"] = torch.eye(128, 256)
    save_file(weights, folder / "model.safetensors")
    return {"method": "eagle", "model": str(folder)}


def start(drafter: Any, model: Path, folder: Path, reason: str) -> Engine:
    return Engine(
        model,
        reason,
        # vLLM starts no second engine in a process that has loaded Numba, which this one needs.
        in_process=drafter is not ngram,
        max_model_len=1024,
        speculative_config={**drafter(model, folder), "num_speculative_tokens": DRAFTS},
    )


def stock(drafter: str, model: str, folder: str) -> None:
    """Writes what an engine with the same drafts completes without the plugin."""
    own = Path(folder)
    engine = start({"ngram": ngram, "eagle": eagle}[drafter], Path(model), own, "drafts, stock")
    completions, _, most = run(engine, PROMPTS, [])
    (own / "stock.json").write_text(json.dumps([completions, most]))
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("drafter", [ngram, eagle])
def test_completions_are_those_of_a_stock_engine_that_drafts(
    drafter: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """With traces beside them, token for token."""
    engine_starts.note(f"drafts of {drafter.__name__}, without the plugin")
    code = "import sys; from tests.engine.test_speculative_decoding import stock; "
    status, output = run_forked(
        ["-c", code + "stock(*sys.argv[1:])", drafter.__name__, str(tiny_folder), str(tmp_path)],
        tmp_path / "stock.log",
        250,
        VLLM_FLASHTRACE_DISABLE="1",
        VLLM_PLUGINS="none",
    )
    assert status == 0, output
    expected, most = json.loads((tmp_path / "stock.json").read_text())
    assert most > 1
    engine = start(drafter, tiny_folder, tmp_path, f"drafts of {drafter.__name__}")
    try:
        jobs = [TraceJob(PROMPT, TargetWeights.from_spans([(100, 120)]))] * 3
        completions, reports, most = run(engine, PROMPTS, jobs)
    finally:
        engine.close()
    assert len(reports) == 3 and most > 1
    assert completions == expected


@pytest.mark.parametrize("drafter", [ngram, eagle])
def test_completions_and_traces(
    drafter: Any, tiny: Engine, tiny_folder: Path, tmp_path: Path, measured: Measured
) -> None:
    from transformers import AutoModelForCausalLM

    expected = [tiny.generate(prompt, NEW_TOKENS) for prompt in PROMPTS]
    engine = start(drafter, tiny_folder, tmp_path, f"drafts of {drafter.__name__}")
    try:
        [proof] = start_reports(engine)
        assert proof["refusal"] is None and proof["largest_error"] < 1e-5
        tokens = PROMPT + expected[0]
        spans = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(125, len(tokens))})
        # The last has one row, for its last token, to which vLLM adds places for drafts.
        jobs = [
            TraceJob(tokens, spans),
            TraceJob(tokens, spans, further=FurtherHops(torch.arange(120, 125), 1)),
            TraceJob(tokens[:129], TargetWeights.from_mapping({128: 1.0})),
        ]
        completions, reports, most = run(engine, PROMPTS, jobs)
    finally:
        engine.close()
    assert completions == expected
    assert most > 1  # Drafts were accepted.
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, attn_implementation="eager", dtype=torch.float32
    )
    errors = []
    for job, report in zip(jobs, reports, strict=True):
        scores = oracle_scores(model, job.token_ids, job.weights.positions, job.weights.weights)
        errors.append(relative_l1(report.scores, scores))
        assert errors[-1] <= 1e-4
        assert report.cached_tokens + report.recomputed_tokens == len(job.token_ids)
    row = {ngram: "n-gram drafts", eagle: "drafts of an EAGLE drafter"}[drafter]
    measured("ways", row, against="oracle", scores=max(errors))
    if drafter is ngram:
        assert reports[-1].recomputed_tokens == 1


def run(
    engine: Engine, prompts: list[list[int]], jobs: list[TraceJob]
) -> tuple[list[list[int]], list[TraceReport], int]:
    """Completions with traces beside them, and the most tokens that one got in a step."""
    ids = [engine.submit_completion(prompt, NEW_TOKENS) for prompt in prompts]
    tokens: dict[str, list[int]] = {one: [] for one in ids}
    nonces: list[str] = []
    most = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id in tokens:
                before = len(tokens[output.request_id])
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                most = max(most, len(tokens[output.request_id]) - before)
        if not nonces and all(tokens.values()):
            nonces = [engine.submit(job)[1] for job in jobs]
    return list(tokens.values()), [engine.collect(nonce) for nonce in nonces], most
