"""KV connectors: traces take from them what lies in front of their rows, and compute the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig

from benchmarks.same_bits import answers
from tests import engine_starts
from tests.engine.harness import Engine, TraceJob, attention_error, relative_l1
from tests.engine.test_images import MESSAGES, Seen, last
from tests.engine.test_pipeline_parallel import make_buffers
from tests.engine.test_scores import log_probs
from tests.engine.test_start_proof import start_reports
from tests.engine.worker_faults import core_each
from tests.forked import run_forked
from tests.kv_connectors import (
    Behaviour,
    MemoryConnector,
    MemoryOffloadingWorker,
    memory_connector,
    memory_offloading,
)
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import LLAMA4_ENGINE, make_tiny_model, make_windowed_llama
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.base.records import ScoredText, TraceReport
from vllm_flashtrace.core.hops import FurtherHops
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.patches import kept_blocks
from vllm_flashtrace.worker import config_checks, start_proof

BLOCK = 32
TOKENS = torch.randint(5, 500, (700,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT = TOKENS[:300]
BUSY = [TOKENS[place : place + 100] for place in (310, 420, 550)]


def start(folder: Path, reason: str, transfer: dict[str, Any], **overrides: Any) -> Engine:
    """In chunks of up to 64 tokens, with 22 blocks of 32."""
    return Engine(
        folder,
        reason,
        max_model_len=640,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        block_size=BLOCK,
        kv_transfer_config=transfer,
        **{"in_process": True, "num_gpu_blocks_override": 22, **overrides},
    )


def forget(engine: Engine) -> None:
    """Empties the prefix cache, and not what the connector has."""
    assert engine.llm.reset_prefix_cache()


def scheduler(engine: Engine) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


class Checked:
    """Runs traces beside requests that decode, and compares them with the oracle."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.engine = engine
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        self.errors: list[float] = []
        self.restarts = 0

    def trace(
        self,
        tokens: list[int],
        first: int,
        rows: FurtherHops | None = None,
        beside: Sequence[list[int]] = BUSY,
    ) -> int:
        """Traces the tokens from ``first`` on.

        Returns:
            Tokens that were not computed.
        """
        job = self.job(tokens, first, rows)
        [report] = self.engine.trace_many([job], beside, 40)
        self.compare(job, report)
        return report.cached_tokens

    def job(self, tokens: list[int], first: int, rows: FurtherHops | None = None) -> TraceJob:
        weights = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(first, len(tokens))})
        return TraceJob(tokens, weights, attention=rows is None, further=rows)

    def compare(self, job: TraceJob, report: TraceReport) -> None:
        weights = job.weights
        expected = oracle_scores(self.model, job.token_ids, weights.positions, weights.weights)
        self.errors.append(relative_l1(report.scores, expected))
        if job.attention:
            assert attention_error(report, self.model, job) <= 1e-3
        assert report.cached_tokens + report.recomputed_tokens == len(job.token_ids)
        self.restarts += report.restarts


def stock(folder: str, out: str) -> None:
    """Writes what an engine answers without the plugin, and what it loads; in its own process."""
    engine = start(Path(folder), "offloading, without the plugin", memory_offloading())
    Path(out).write_text(json.dumps(untraced(engine)))
    engine.close()


def untraced(engine: Engine) -> list[Any]:
    """Answers that are computed, those that are loaded, and the blocks of all transfers."""
    computed = answers(engine)
    forget(engine)
    return [computed, answers(engine), MemoryOffloadingWorker.loaded, MemoryOffloadingWorker.stored]


def test_offloading(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    engine_starts.note("offloading, without the plugin: its bytes are the reference")
    out = tmp_path / "stock.json"
    code = "import sys; from tests.engine.test_kv_connectors import stock; stock(*sys.argv[1:])"
    status, output = run_forked(
        ["-c", code, str(tiny_folder), str(out)],
        tmp_path / "stock.log",
        250,
        VLLM_FLASHTRACE_DISABLE="1",
        VLLM_PLUGINS="none",
    )
    assert status == 0, output
    engine = start(tiny_folder, "offloading", memory_offloading())
    try:
        [proof] = start_reports(engine)
        assert proof["refusal"] is None and proof["largest_error"] < 1e-5
        assert untraced(engine) == json.loads(out.read_text())
        loaded = MemoryOffloadingWorker.loaded
        assert loaded
        forget(engine)
        checked = Checked(engine, tiny_folder)

        answer = engine.generate(PROMPT, 40)
        text = PROMPT + answer
        forget(engine)
        nowhere = TOKENS[::-1][:340]
        for _ in range(2):  # Nothing is there, nor is it then.
            assert checked.trace(nowhere, 301) == 0
            forget(engine)
        # All is there, and taken up to the block of the first row.
        assert checked.trace(text, 301) == 288
        assert 9 in loaded
        assert checked.trace(text, 301) == 288  # Of the prefix cache.
        forget(engine)
        assert checked.trace(text, 288) == 288
        forget(engine)
        assert checked.trace(text, 320, FurtherHops(torch.arange(200, 310), 2)) == 192
        forget(engine)
        # Only the first six blocks are there.
        assert checked.trace(PROMPT[:200] + TOKENS[400:540], 301) == 192
        assert 6 in loaded
        forget(engine)
        # It is preempted for requests that grow, and loads again.
        growing = [TOKENS[start : start + 40] for start in range(500, 505)]
        growing = [prompt + TOKENS[: 5 * place] for place, prompt in enumerate(growing)]
        assert checked.trace(text, 100, beside=growing) == 96 and checked.restarts
        measured("ways", "KV offloading", against="oracle", scores=max(checked.errors))
        assert max(checked.errors) <= 1e-4

        forget(engine)
        scored = ScoredText(text, [*range(250, 340, 3)])
        [report] = engine.score_many([scored])
        assert report.cached_tokens == 224
        assert (report.log_probs - log_probs(checked.model, scored)).abs().max() <= 1e-4
        forget(engine)
        assert engine.generate(PROMPT, 40) == answer

        # What the patches are there for.
        forget(engine)
        connector = scheduler(engine).connector
        behind, limited = connector.connector_scheduler, connector.get_num_new_matched_tokens
        patched = type(behind).get_num_new_matched_tokens
        monkeypatch.setattr(type(behind), "get_num_new_matched_tokens", patched.__wrapped__)
        assert checked.trace(text, 301) == 0
        forget(engine)
        monkeypatch.setattr(connector, "get_num_new_matched_tokens", limited.__wrapped__)
        with pytest.raises(TraceError, match="positions 0 to 320 were computed without recording"):
            checked.trace(text, 301)
    finally:
        engine.close()


def windows(folder: Path, first: str) -> tuple[Path, Path]:
    return make_windowed_llama(folder, (first, "sliding_attention"))


def latents(folder: Path) -> tuple[Path, Path]:
    model = make_tiny_model("deepseek_v3", folder)
    return model, model


def chunks(folder: Path) -> tuple[Path, Path]:
    model = make_tiny_model("llama4", folder)
    return model, model


@pytest.mark.parametrize(
    ("make", "chunk", "overrides"),
    [
        (partial(windows, first="full_attention"), 1, {"num_gpu_blocks_override": 44}),
        (partial(windows, first="sliding_attention"), 2, {}),
        (latents, 1, {"num_gpu_blocks_override": 44, "attention_backend": "CPU_MLA"}),
        (chunks, 1, {"num_gpu_blocks_override": 88, **LLAMA4_ENGINE}),
    ],
    ids=["mixed", "windows", "latents", "chunks"],
)
def test_offloading_of_other_caches(
    make: Any,
    chunk: int,
    overrides: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    measured: Measured,
) -> None:
    """Caches that forget and such that keep latents, also in chunks of several blocks."""
    folder, reference = make(tmp_path)
    transfer = memory_offloading(blocks_per_chunk=chunk)
    engine = start(folder, "offloading of other caches", transfer, **overrides)
    try:
        assert start_reports(engine)[0]["refusal"] is None
        checked = Checked(engine, reference)
        text = PROMPT + engine.generate(PROMPT, 40)
        cached = []
        for first, rows in (
            (301, None),
            (288, None),
            (325, FurtherHops(torch.arange(300, 310), 2)),
        ):
            forget(engine)
            cached.append(checked.trace(text, first, rows))
        names = {"mixed": "windows in some layers", "windows": "windows in all layers"}
        kind = request.node.callspec.id
        row = f"KV offloading, {names.get(kind, kind)}"
        measured("ways", row, against="oracle", scores=max(checked.errors))
        assert max(checked.errors) <= 1e-4 and min(cached) >= 255
    finally:
        engine.close()


def test_offloading_of_images(tmp_path: Path, measured: Measured) -> None:
    seen = Seen(tmp_path, "qwen2_5_vl", kv_transfer_config=memory_offloading())
    try:
        tokens, images = seen.answer(MESSAGES)
        target = last(tokens, 20)
        forget(seen.engine)
        report = seen.engine.trace(TraceJob(tokens, target, images=images))
        assert report.cached_tokens == (len(tokens) - 20) // BLOCK * BLOCK > 0
        assert MemoryOffloadingWorker.loaded == [report.cached_tokens // BLOCK]
        error = relative_l1(report.scores, seen.expected(tokens, target, MESSAGES))
        measured("images", "KV offloading", **{seen.family: error})
        assert error <= 1e-4
    finally:
        seen.engine.close()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_offloading_by_two_workers(
    kind: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    core_each(monkeypatch, 2)
    overrides = {kind: 2, "in_process": False}
    engine = start(tiny_folder, f"offloading, {kind} 2", memory_offloading(), **overrides)
    try:
        engine.llm.collective_rpc(make_buffers)
        assert [each["refusal"] for each in start_reports(engine)] == [None, None]
        checked = Checked(engine, tiny_folder)
        text = PROMPT + engine.generate(PROMPT, 40)
        for first, cached in ((301, 288), (100, 96)):
            forget(engine)
            assert checked.trace(text, first) == cached
        workers = {"t": "two tensor-parallel ranks", "p": "two pipeline stages"}[kind[0]]
        measured("ways", f"KV offloading, {workers}", against="oracle", scores=max(checked.errors))
        assert max(checked.errors) <= 1e-4
    finally:
        engine.close()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the connector of the tests pass."""
    name = f"{MemoryConnector.__module__}.{MemoryConnector.__name__}"
    monkeypatch.setattr(
        config_checks, "TRACED_CONNECTORS", config_checks.TRACED_CONNECTORS | {name}
    )
    yield


@pytest.mark.usefixtures("known")
def test_an_unforgiving_connector(tiny_folder: Path, measured: Measured) -> None:
    """It loads all that it has offered or nothing, in three steps, and loads fail."""
    engine = start(tiny_folder, "an unforgiving connector", memory_connector())
    try:
        assert start_reports(engine)[0]["refusal"] is None
        checked = Checked(engine, tiny_folder)
        text = PROMPT + engine.generate(PROMPT, 40)
        forget(engine)
        assert checked.trace(text, 301) == 0  # It would load rows of the target.
        forget(engine)
        assert checked.trace(text, 325) == 320
        assert 320 in Behaviour.loaded
        for place, valid in ((3, 96), (0, 320)):
            forget(engine)
            Behaviour.failing = frozenset({place, 7})
            before = Behaviour.failed
            # Where nothing is left of it, the next load is waited for.
            beside = [prompt[place + 1 :] for prompt in BUSY]  # Those load nothing.
            assert checked.trace(text, 325, beside=beside) == valid
            assert Behaviour.failed == before + 1
        forget(engine)
        Behaviour.steps, asked = 6, len(Behaviour.offered)
        aborted, _ = engine.submit(checked.job(text, 325))
        while len(Behaviour.offered) == asked:
            engine.step()
        engine.llm.llm_engine.abort_request([aborted])  # While it loads.
        assert len(engine.generate(TOKENS[600:], 8)) == 8 and not kept_blocks._traces
        Behaviour.loads_async = False
        forget(engine)
        assert checked.trace(text, 325) == 0  # Rows would be recorded before it fails.
        forget(engine)
        # What another request loads in the step is in the prefix cache, and there.
        assert checked.trace(text, 325, beside=[text]) == 320
        assert Behaviour.loaded[-1] == 320
        row = "a KV connector in memory, whose loads fail"
        measured("ways", row, against="oracle", scores=max(checked.errors))
        assert max(checked.errors) <= 1e-4
        # What the patch is there for.
        Behaviour.loads_async = True
        forget(engine)
        connector = scheduler(engine).connector
        del connector.get_num_new_matched_tokens
        with pytest.raises(TraceError, match="positions 0 to 320 were computed without recording"):
            checked.trace(text, 301)
    finally:
        engine.close()


@pytest.mark.usefixtures("known")
def test_several_connectors(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = [memory_offloading(), memory_connector()]
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": children},
    }
    engine = start(tiny_folder, "several connectors", transfer)
    try:
        assert start_reports(engine)[0]["refusal"] is None
        checked = Checked(engine, tiny_folder)
        text = PROMPT + engine.generate(PROMPT, 40)
        for first, cached in ((301, 288), (20, 0)):
            forget(engine)
            assert checked.trace(text, first) == cached
        assert max(checked.errors) <= 1e-4
        assert Behaviour.offered and not [tokens for tokens in Behaviour.loaded if tokens >= 288]
        # A probe that a connector sees is none that it knows.
        monkeypatch.setattr(start_proof, "_without_connector", nullcontext)
        engine.on_worker(start_proof.prove)
        assert "could not be run" in start_reports(engine)[0]["refusal"]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("transfer", "reason"),
    [
        ({"kv_connector": "LMCacheConnectorV1"}, "KV transfer by LMCacheConnectorV1"),
        ({"kv_connector": "ExampleConnector"}, "KV transfer by ExampleConnector"),
        ({"kv_connector": "NixlConnector", "kv_connector_module_path": "other"}, "NixlConnector"),
        (memory_connector(), "KV transfer by MemoryConnector"),
        ({**memory_offloading(), "kv_connector_module_path": "other"}, "OffloadingConnector"),
        (
            {"kv_connector": "OffloadingConnector", "kv_role": "kv_producer"},
            "disaggregated prefill",
        ),
        (
            {"kv_connector": "OffloadingConnector", "kv_role": "kv_consumer"},
            "disaggregated prefill",
        ),
        (
            {
                "kv_connector": "MultiConnector",
                "kv_connector_extra_config": {
                    "connectors": [
                        memory_offloading(),
                        {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
                    ]
                },
            },
            "KV transfer by NixlConnector",
        ),
    ],
)
def test_refused(transfer: dict[str, Any], reason: str) -> None:
    """By name, whatever a connector may be; P/D hands requests over."""
    config = KVTransferConfig(**{"kv_role": "kv_both", **transfer})
    with pytest.raises(UnsupportedModelError, match=reason):
        config_checks._check_connector(config)


@pytest.mark.parametrize("role", ["kv_both", "kv_producer", "kv_consumer"])
def test_what_hands_requests_over_passes(role: Any) -> None:
    config_checks._check_connector(KVTransferConfig(kv_connector="NixlConnector", kv_role=role))
