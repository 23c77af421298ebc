"""Log-probabilities of tokens, scored by the worker, against Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.engine.harness import Engine
from vllm_flashtrace.base.records import ScoredText


def reference(folder: Path, text: ScoredText) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return log_probs(model, text)


def log_probs(model: Any, text: ScoredText) -> torch.Tensor:
    """Natural logarithms, float64, of one forward pass over the whole text."""
    ids = torch.tensor([text.token_ids])
    with torch.no_grad():
        scores = model(ids).logits[0].double().log_softmax(-1)
    positions = torch.tensor(text.positions)
    return scores[positions - 1, ids[0, positions]]


def text_of(length: int, positions: list[int], seed: int = 0) -> ScoredText:
    ids = torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(seed))
    return ScoredText(ids.tolist(), positions)


def test_scores_are_those_of_hugging_face_and_reuse_the_prefix(
    tiny: Engine, tiny_folder: Path
) -> None:
    texts = [
        text_of(300, [*range(200, 300)], 1),
        text_of(200, [1, 7, 64, 65, 66, 199], 2),
        text_of(40, [39], 3),
    ]
    first = tiny.score_many(texts)
    for text, report in zip(texts, first, strict=True):
        assert (report.log_probs - reference(tiny_folder, text)).abs().max() <= 1e-4
        assert report.recomputed_tokens + report.cached_tokens == len(text.token_ids)
    again = tiny.score_many(texts)
    block = tiny.llm.llm_engine.vllm_config.cache_config.block_size
    for text, report, before in zip(texts, again, first, strict=True):
        # Up to the row before the first token that is scored.
        assert report.cached_tokens == (text.positions[0] - 1) // block * block
        assert (report.log_probs - before.log_probs).abs().max() <= 1e-4
    # A changed middle: what is in front of it is in the cache.
    changed = ScoredText([*texts[0].token_ids[:150], *texts[0].token_ids[170:]], [*range(180, 280)])
    [report] = tiny.score_many([changed])
    assert report.cached_tokens == 150 // block * block
    assert (report.log_probs - reference(tiny_folder, changed)).abs().max() <= 1e-4


def test_scores_in_chunks_beside_traces_and_preemptions(crowded: Engine, tiny_folder: Path) -> None:
    texts = [text_of(700, [*range(1, 700, 3)], seed) for seed in range(4)]
    for text, report in zip(texts, crowded.score_many(texts), strict=True):
        assert (report.log_probs - reference(tiny_folder, text)).abs().max() <= 1e-4
        assert report.cached_tokens == 0
