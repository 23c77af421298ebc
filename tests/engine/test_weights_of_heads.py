"""Scores by learned weights of heads, against the oracle's dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import (
    TARGET,
    TOKENS,
    Engine,
    TraceJob,
    attention_error,
    oracle_head_scores,
    random_heads,
    relative_l1,
    run_hops,
    tiny_folder,
)
from tests.oracle import capture_hf, oracle_hops, oracle_scores
from vllm_flashtrace import FlashTrace, InvalidRequestError
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 1e-5
# Norms behind blocks and windows; gates for each coordinate, behind which blocks are normed.
FAMILIES = ("llama", "gemma2", "afmoe")


folder = tiny_folder(*FAMILIES)


@pytest.fixture(scope="module")
def weights(folder: Path) -> torch.Tensor:
    return random_heads(folder)[0]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """Prefills in chunks."""
    engine = Engine(
        folder,
        f"weights of heads, {folder.name}",
        in_process=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        block_size=32,
        **random_heads(folder)[1],
    )
    yield engine
    engine.close()


def test_chunks_beside_other_traces(engine: Engine, reference: Any, weights: torch.Tensor) -> None:
    job = TraceJob(TOKENS, TARGET, layers=True, attention=True, heads=True)
    decoding = [TOKENS[place : place + 100] for place in (0, 150, 300)]
    jobs = [job, TraceJob(TOKENS, TARGET, attention=True), TraceJob(TOKENS, TARGET, heads=True)]
    reports = engine.trace_many(jobs, decoding, new_tokens=40)
    expected = oracle_head_scores(reference, TOKENS, TARGET, weights)
    for report in (reports[0], reports[2]):
        error = relative_l1(report.scores, expected.sum(0))
        print(f"relative L1 {error:.1e}")
        assert error <= LIMIT
        assert report.changes is None
    layer_scores = reports[0].layer_scores
    assert layer_scores is not None
    assert relative_l1(layer_scores.flatten(), expected.flatten()) <= LIMIT
    beside = oracle_scores(reference, TOKENS, TARGET.positions, TARGET.weights)
    assert relative_l1(reports[1].scores, beside) <= LIMIT
    for report in reports[:2]:
        assert attention_error(report, reference, job) <= 1e-3
    assert engine.status()["accumulator_bytes"] == 0


def one_hop_of(reference: Any, token_ids: list[int], weights: torch.Tensor) -> Any:
    """A hop of the oracle: dense weights of rows to scores."""
    alphas = torch.stack([layer.alpha for layer in capture_hf(reference, token_ids)])
    mixed = torch.einsum("lh,lhij->ij", weights.double(), alphas)
    return lambda dense: dense @ mixed


@pytest.mark.parametrize("hops", [0, 1, 2])
def test_hops(engine: Engine, reference: Any, weights: torch.Tensor, hops: int) -> None:
    prompt, output, reasoning = 100, (380, 397), (110, 379)
    found = run_hops(engine, TOKENS, prompt, output, reasoning, hops, heads=True)
    at_once = run_hops(engine, TOKENS, prompt, output, reasoning, hops, at_once=True, heads=True)
    positions = torch.arange(len(TOKENS))
    target, followed = (
        (positions >= first) & (positions < end) for first, end in (output, reasoning)
    )
    expected, left = oracle_hops(
        one_hop_of(reference, TOKENS, weights), target.double(), positions < prompt, followed, hops
    )
    for ours in (found, at_once):
        assert len(ours.per_hop_scores) == hops + 1
        error = float((ours.scores - expected).abs().sum() / expected.sum())
        print(f"{hops} hops: relative L1 {error:.1e}")
        assert error <= LIMIT
        assert ours.remaining_mass == pytest.approx(float(left), abs=1e-6)


def test_targets_from_one_prefill(engine: Engine) -> None:
    first, second = (TargetWeights.from_spans([span]) for span in ((380, 390), (390, 400)))
    further = FurtherHops(torch.arange(110, 380), 1, 0.0)
    others = [TracedTarget(second, further)]
    together = engine.trace(TraceJob(TOKENS, first, further=further, others=others, heads=True))
    for target, hops in zip((first, second), together.targets, strict=True):
        alone = engine.trace(TraceJob(TOKENS, target, further=further, heads=True))
        for ours, theirs in zip(hops, (alone.scores, *alone.later_scores), strict=True):
            assert relative_l1(ours, theirs) <= LIMIT


def test_offline(engine: Engine, reference: Any, weights: torch.Tensor) -> None:
    """Rows that chose the answer, hops to the end, no punctuation; and the response says so."""
    ft = FlashTrace(llm=engine.llm)
    encode = ft.llm.get_tokenizer().encode
    prompt = encode("The cat sat, on a mat: it was 4821! ... Which cat, and (where)?\n")
    reasoning, answer = encode("Let me see, the cat - on a mat. "), encode("It sat; there!")
    ids, start = [*prompt, *reasoning, *answer], len(prompt) + len(reasoning)
    field = {"target": {"text": "It sat; there!"}, "top_k": None, "heads": True}
    found = ft.attribute(prompt, ids[len(prompt) :], field)
    assert found.status == "completed", found.error
    assert found.to_dict()["heads"] is True
    assert len(found.hops) >= 2
    texts = ft.llm.get_tokenizer().batch_decode([[i] for i in ids])
    words = torch.tensor([any(c.isalnum() for c in text) for text in texts])[:-1]
    positions = torch.arange(len(ids) - 1)
    target = torch.zeros(len(ids) - 1, dtype=torch.float64)
    target[start - 1 :] = torch.tensor([any(c.isalnum() for c in text) for text in texts[start:]])
    one_hop = one_hop_of(reference, ids[:-1], weights)
    is_input = (positions < len(prompt)) & words
    followed = (positions >= len(prompt)) & (positions < start) & words
    expected, left = oracle_hops(one_hop, target, is_input, followed, len(found.hops) - 1)
    scores = torch.tensor([token.score for token in found.scores], dtype=torch.float64)
    error = float((scores - expected[: len(prompt)]).abs().sum() / expected.sum())
    print(f"relative L1 {error:.1e}")
    assert error <= LIMIT
    assert found.remaining_mass == pytest.approx(float(left), abs=1e-6)
    with_layers = ft.attribute(prompt, ids[len(prompt) :], {**field, "include": ["layers"]})
    layers = torch.tensor(with_layers.to_dict()["layers"], dtype=torch.float64)
    assert float((layers.sum(0) - scores).abs().sum()) <= LIMIT
    plain = ft.attribute(prompt, ids[len(prompt) :], {**field, "heads": False})
    assert "heads" not in plain.to_dict()
    assert [s.score for s in plain.scores] != [s.score for s in found.scores]


def test_without_the_file_the_field_is_refused(tiny: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="option heads") as error:
        FlashTrace(llm=tiny.llm).attribute([5, 6, 7], [8, 9], {"heads": True})
    assert error.value.param == "flashtrace.heads"
    report = tiny.trace(TraceJob(TOKENS, TARGET))
    assert report.scores.any()
