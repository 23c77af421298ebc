"""A compiled engine scores like an eager one, and without traces it is a stock one to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.same_bits import ENGINE_OPTIONS, answers
from tests import engine_starts
from tests.engine.harness import Engine, TraceJob, relative_l1, run_hops
from tests.forked import run_forked
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import FAMILY_NAMES, make_tiny_model
from vllm_flashtrace.core.weights import TargetWeights

# Each layer has one tap more.
GATED = ("afmoe", "laguna")
TOKENS = torch.randint(5, 500, (600,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(f, marks=pytest.mark.long) for f in GATED)]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model: what a compiler does to a layer it does to each of them."""
    return make_tiny_model(request.param, tmp_path_factory.mktemp("compiled") / request.param)


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Iterator[Engine]:
    engine = Engine(folder, "compiled", **ENGINE_OPTIONS)
    yield engine
    engine.close()


def test_compiled_equals_eager(compiled: Engine, folder: Path, measured: Measured) -> None:
    from transformers import AutoModelForCausalLM

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
    name = FAMILY_NAMES[folder.name]  # type: ignore[index]
    measured("ways", f"{name}, compiled", against="eager", scores=error)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = oracle_scores(model, TOKENS, job.weights.positions, job.weights.weights)
    if folder.name not in GATED:  # Of those it is measured with their gates.
        measured("families", name, compiled=relative_l1(theirs.scores, expected))
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
    engine_starts.note("compiled, without the plugin: its bytes are the reference")
    out = tmp_path / "stock.json"
    command = ["-m", "benchmarks.same_bits", "--dtype=float32", "--engine", str(folder), str(out)]
    status, output = run_forked(
        command, tmp_path / "stock.log", 450, VLLM_FLASHTRACE_DISABLE="1", VLLM_PLUGINS="none"
    )
    assert status == 0, output
    assert answers(compiled) == json.loads(out.read_text())
