"""Llama 4: chunks of tokens, norms of queries and keys, queries that grow with their position."""

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
from tests.engine.test_start_proof import LAYER, LIMIT, proven, reads_form, start_reports
from tests.engine.worker_faults import core_each
from tests.measured import Measured
from tests.tiny_models import FAMILY_NAMES, LLAMA4_ENGINE
from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.worker import start_proof
from vllm_flashtrace.worker.cpu_model import CPUTracedModel
from vllm_flashtrace.worker.layers import TracedLayer, find_layers

# The one that sees every token, and has no positions.
GLOBAL_LAYER = 3

folder = tiny_folder("llama4")


# First, since they start engines in other processes.
@pytest.mark.long
@pytest.mark.timeout(480)
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_run(
    way: str,
    folder: Path,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    if way == "ranks":
        core_each(monkeypatch, 2)
    engine = Engine(folder, f"chunks, {way}", block_size=32, **WAYS[way], **LLAMA4_ENGINE)
    try:
        assert {report["refusal"] for report in start_reports(engine)} == {None}
        error = relative_l1(engine.trace(TraceJob(TOKENS, TARGET)).scores, expected)
    finally:
        engine.close()
    measured("families", FAMILY_NAMES["llama4"], **{way: error})
    assert error <= 1e-5


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """Prefills in steps of 256 tokens, whose chunks vLLM computes as requests of their own."""
    engine = Engine(
        folder,
        "chunks of tokens",
        in_process=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        block_size=32,
        **LLAMA4_ENGINE,
    )
    yield engine
    engine.close()


def test_steps_beside_other_requests(
    engine: Engine, reference: Any, expected: torch.Tensor
) -> None:
    job = TraceJob(TOKENS, TARGET, attention=True)
    decoding = [TOKENS[place : place + 100] for place in (0, 150, 300)]
    [report] = engine.trace_many([job], decoding, new_tokens=40)
    error = relative_l1(report.scores, expected)
    print(f"relative L1 {error:.1e}")
    assert error <= 1e-5
    assert attention_error(report, reference, job) <= 1e-3


def test_hops_from_one_prefill(engine: Engine) -> None:
    assert_hops_agree(engine, TOKENS, 379)


Change = Callable[[pytest.MonkeyPatch, Any], None]


def reads_queries(index: int, read: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A reader that makes something else of a layer's queries, ``[tokens, H, d]``."""

    def change(patch: pytest.MonkeyPatch, _: Any) -> None:
        stock = CPUTracedModel.heads_of

        def heads_of(self: CPUTracedModel, layer: int, query: torch.Tensor) -> torch.Tensor:
            heads = stock(self, layer, query)
            return read(heads) if layer == index else heads

        patch.setattr(CPUTracedModel, "heads_of", heads_of)

    return change


def before_norm(patch: pytest.MonkeyPatch, layers: Any) -> None:
    """Queries as they are in front of their norm, whose calls take queries and keys in turns."""
    seen: list[torch.Tensor] = []
    hooks = layers[LAYER].self_attn.qk_norm._forward_pre_hooks
    patch.setitem(hooks, -1, lambda _, args: seen.append(args[0]))
    reads_queries(LAYER, lambda heads: seen[-2].view_as(heads))(patch, layers)


def without_temperature(patch: pytest.MonkeyPatch, layers: Any) -> None:
    block, seen = layers[GLOBAL_LAYER].self_attn, {}
    stock = block._get_attn_scale

    def scale(positions: torch.Tensor) -> torch.Tensor:
        seen["last"] = stock(positions)
        return seen["last"]

    patch.setattr(block, "_get_attn_scale", scale)
    reads_queries(GLOBAL_LAYER, lambda heads: heads / seen["last"][..., None])(patch, layers)


# Layer 2 has chunks and norms.
BREAKS: dict[str, tuple[Change, int, float]] = {
    "chunks": (reads_form(chunk_size=None), LAYER, 1e-2),
    "chunks one token short": (reads_form(chunk_size=31), LAYER, 1e-2),
    "chunks twice as long": (reads_form(chunk_size=64), LAYER, 1e-2),
    "a window of 32 in the place of chunks": (
        reads_form(chunk_size=None, sliding_window=32),
        LAYER,
        1e-2,
    ),
    "norm of the queries": (before_norm, LAYER, 1e-3),
    "growth of the queries with their position": (without_temperature, GLOBAL_LAYER, 1e-3),
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
    change, layer, wrong = BREAKS[name]
    layers = engine.on_worker(lambda worker: worker.model_runner.get_model().model.layers)
    change(monkeypatch, layers)
    # What the scores would be without a proof.
    error = relative_l1(engine.trace(TraceJob(TOKENS, TARGET)).scores, expected)
    report = proven(engine)
    measured("breaks_chunks", name, error=report["largest_error"], scores=error)
    assert report["largest_error"] > 5 * LIMIT
    assert f"failed in layer {layer} (" in report["refusal"]
    assert start_proof._MEASURES["attention"] in report["refusal"]
    assert error > wrong


def test_chunks_that_are_not_computed_are_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Transformers' code, where vLLM lets every layer see every token."""
    runner = engine.on_worker(lambda worker: worker.model_runner)
    monkeypatch.setattr(TracedLayer, "chunk_size", None)
    with pytest.raises(UnsupportedModelError, match=r"every token \(model\.layers\.0\."):
        find_layers(runner.get_model(), runner.vllm_config)


def test_the_report(engine: Engine) -> None:
    proven(engine)
    [report] = start_reports(engine)
    found = report["found"]
    assert (found["chunks"], found["windows"]) == ([None, 32], [None])
    assert found["query_key_norms"] is True
