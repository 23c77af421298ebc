"""A compiled engine scores like an eager one, and without traces it is a stock one to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import engine_starts
from tests.engine.harness import Engine, TraceJob, relative_l1, run_hops
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.core.weights import TargetWeights

TOKENS = torch.randint(5, 500, (600,), generator=torch.Generator().manual_seed(1)).tolist()
OPTIONS: dict[str, Any] = {"enforce_eager": False, "max_model_len": 1024}

STOCK = """
import json, sys
from tests.engine.test_compiled import OPTIONS, answers
from tests.engine.harness import Engine
from pathlib import Path

if __name__ == "__main__":
    folder, token_ids, out = sys.argv[1:]
    engine = Engine(Path(folder), "stock", **OPTIONS)
    Path(out).write_text(json.dumps(answers(engine, json.loads(token_ids))))
    engine.close()
"""


def answers(engine: Engine, token_ids: list[int]) -> list[Any]:
    """Tokens and log-probabilities, to the last digit, of prompts of several lengths."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=5, ignore_eos=True)
    prompts = [{"prompt_token_ids": token_ids[i : 7 * i + 30]} for i in range(8)]
    outputs = [out.outputs[0] for out in engine.llm.generate(prompts, params, use_tqdm=False)]
    return [
        [
            list(output.token_ids),
            [sorted([k, repr(v.logprob)] for k, v in step.items()) for step in output.logprobs],
        ]
        for output in outputs
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model: what a compiler does to a layer it does to each of them."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("compiled") / "llama")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Iterator[Engine]:
    engine = Engine(folder, "compiled", **OPTIONS)
    yield engine
    engine.close()


def test_compiled_equals_eager(compiled: Engine, folder: Path) -> None:
    # The first pass leaves KV of the compiled forward in the prefix cache.
    assert len(compiled.generate(TOKENS[:560], 4)) == 4
    job = TraceJob(TOKENS, TargetWeights.from_spans([(560, 600)]))
    theirs = compiled.trace(job)
    assert theirs.cached_tokens == 512
    hops = run_hops(compiled, TOKENS, 420, (560, 600), (420, 560), 1)
    eager = Engine(folder, "eager beside compiled", in_process=True, max_model_len=1024)
    try:
        error = relative_l1(theirs.scores, eager.trace(job).scores)
        eager_hops = run_hops(eager, TOKENS, 420, (560, 600), (420, 560), 1)
    finally:
        eager.close()
    print(f"compiled against eager, relative L1: {error:.2e}")
    assert error <= 1e-4
    assert relative_l1(hops.scores[:420], eager_hops.scores[:420]) <= 1e-4


def test_a_trace_step_runs_compiled_code(compiled: Engine) -> None:
    def forbid_eager_forward(worker: Any) -> bool:
        model = worker.model_runner.get_model().model

        def refused(*_: Any, **__: Any) -> None:
            raise AssertionError("the eager forward ran")

        model.stock_forward = model.forward
        model.forward = refused
        return not model.do_not_compile

    def allow_eager_forward(worker: Any) -> None:
        model = worker.model_runner.get_model().model
        model.forward = model.stock_forward

    assert compiled.on_worker(forbid_eager_forward)
    try:
        report = compiled.trace(TraceJob(TOKENS, TargetWeights.from_spans([(560, 600)])))
    finally:
        compiled.on_worker(allow_eager_forward)
    assert report.scores.sum() > 0


def test_compiled_code_is_cached_apart_from_stock_code(compiled: Engine) -> None:
    def hashes(worker: Any) -> tuple[str, str]:
        config = worker.vllm_config
        with_taps, additional = config.compute_hash(), config.additional_config
        config.additional_config = {k: v for k, v in additional.items() if k != "flashtrace_taps"}
        try:
            return with_taps, config.compute_hash()
        finally:
            config.additional_config = additional

    with_taps, without = compiled.on_worker(hashes)
    assert with_taps != without


@pytest.mark.timeout(480)
def test_untraced_requests_get_the_bytes_of_a_stock_engine(
    compiled: Engine, folder: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "stock.py", tmp_path / "stock.json"
    script.write_text(STOCK)
    engine_starts.note("compiled, without the plugin: its bytes are the reference")
    subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(TOKENS), str(out)],
        env={**os.environ, "VLLM_FLASHTRACE_DISABLE": "1", "PYTHONPATH": os.getcwd()},
        check=True,
        timeout=450,
    )
    assert answers(compiled, TOKENS) == json.loads(out.read_text())
