"""Log-probabilities of tokens, scored by the worker, against Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.engine.harness import Engine
from vllm_flashtrace import FlashTrace
from vllm_flashtrace.base.records import ScoredText
from vllm_flashtrace.commands.demo import FILLER

PROMPT = f"{FILLER} " * 8 + (
    "Tom has a red bike. The access code of the lab is 7306. The canteen closes at two. "
    "What is the access code of the lab?"
)


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


def test_drops_are_those_of_recomputation(smollm2: Engine, hf_smollm2: Any) -> None:
    """With real weights: from the text without the sentences, in one pass of Hugging Face."""
    ft = FlashTrace(llm=smollm2.llm)
    tokenizer: Any = smollm2.llm.get_tokenizer()
    answer = "The access code of the lab is 7306. The canteen closes at two."
    messages = [{"role": "user", "content": PROMPT}]
    found = ft.attribute(messages, answer, {"verify": 2, "targets": "sentences"}).to_dict()
    generated = tokenizer.encode(answer, add_special_tokens=False)

    def log_prob(content: str, spans: list[list[int]]) -> float:
        chat = [{"role": "user", "content": content}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(rendered, add_special_tokens=False)
        positions = [len(prompt) + i for span in spans for i in range(*span)]
        ids = [*prompt, *generated][: positions[-1] + 1]
        return float(log_probs(hf_smollm2, ScoredText(ids, positions)).sum())

    def without(*texts: str) -> str:
        content = PROMPT
        for text in texts:
            content = content.replace(f"{text} ", "") if text[-1] != "?" else content
            content = content.removesuffix(f" {text}")
        return content

    for target in found["targets"]:
        verification, spans = target["verification"], target["target"]["tokens"]
        whole = log_prob(PROMPT, spans)
        assert abs(verification["log_prob"] - whole) <= 1e-3
        texts = [one["text"] for one in verification["removed"]]
        for one in verification["removed"]:
            expected = whole - log_prob(without(one["text"]), spans)
            print(f"{one['text']!r}: {one['log_prob_drop']:.4f} nats, {one['verdict']}")
            assert abs(one["log_prob_drop"] - expected) <= 1e-3
        expected = whole - log_prob(without(*texts), spans)
        print(f"together: {verification['together']['log_prob_drop']:.4f} nats")
        assert abs(verification["together"]["log_prob_drop"] - expected) <= 1e-3
        assert verification["verdict"] == "supported"
    usage = found["usage"]
    assert usage["scored_requests"] >= 4 and usage["scored_tokens"] > 0
    assert usage["scored_cached_tokens"] > 0 and usage["seconds"]["verify"] > 0
