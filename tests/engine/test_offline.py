"""The offline API on a real engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine
from tests.oracle import oracle_hops, oracle_scores
from vllm_flashtrace import Attribution, FlashTrace, InvalidRequestError
from vllm_flashtrace.commands.demo import build_scenario

SCENARIO = build_scenario()
MESSAGES = SCENARIO.messages
CONTEXT = MESSAGES[0]["content"]
EVERYTHING = {
    "top_k": None,
    "include": ["hops", "generated", "segments", "sentences", "layers", "attention", "tokens"],
}


@pytest.fixture(scope="module")
def ft(smollm2: Engine) -> FlashTrace:
    return FlashTrace(llm=smollm2.llm)


@pytest.fixture(scope="module")
def answer(ft: FlashTrace) -> Attribution:
    wanted = {**EVERYTHING, "target": {"text": SCENARIO.answer}}
    [answer] = ft.generate([MESSAGES], _greedy(), flashtrace=wanted)
    return answer


def _greedy(**changes: object) -> object:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **changes})


def test_answer_comes_from_the_fact(answer: Attribution) -> None:
    assert "7306" in answer.text
    data = answer.to_dict()
    fact = [
        token
        for token in data["scores"]
        if token.get("message") == 0
        and token["start"] < SCENARIO.fact_end
        and token["end"] > SCENARIO.fact_start
    ]
    assert len(fact) < 0.06 * data["prompt_tokens"]
    share = sum(token["score"] for token in fact) / data["input_mass"]
    print(f"fact share of input mass: {share:.1%}")
    assert share >= 0.30


def test_sentences_of_an_answer_are_what_each_is_alone(ft: FlashTrace) -> None:
    """The hop goes through what was said before, so it differs from sentence to sentence."""
    sentences = ["The access code is 7306.", "It was asked for.", "Nothing else is known."]
    field = {"hops": 1, "top_k": None}
    text = " ".join(sentences)
    together = ft.attribute(MESSAGES, text, flashtrace={**field, "targets": "sentences"})
    assert [part.target["text"] for part in together.targets] == sentences
    assert len({tuple(part.target["tokens"][0]) for part in together.targets}) == 3
    for part in together.targets:
        [span] = part.target["tokens"]
        alone = ft.attribute(MESSAGES, text, flashtrace={**field, "target": {"tokens": [span]}})
        assert alone.targets == [alone]
        ours, expected = ([score.score for score in one.scores] for one in (part, alone))
        assert math.fsum(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 1e-5
        assert part.remaining_mass == pytest.approx(alone.remaining_mass, abs=1e-5)
    page, shown = together.to_html(), str(together)
    assert all(sentence in page for sentence in sentences) and "3 targets" in shown
    with pytest.raises(ValueError, match=r"has 3 targets; read each of \.targets"):
        together.scores  # noqa: B018


def test_locations_point_at_the_users_own_text(answer: Attribution) -> None:
    content = MESSAGES[0]["content"]
    located = [token for token in answer.to_dict()["scores"] if "message" in token]
    assert len(located) > 300
    for token in located:
        assert content[token["start"] : token["end"]] == token["token"]


def test_masses_balance(answer: Attribution) -> None:
    data = answer.to_dict()
    parts = ("input_mass", "remaining_mass", "target_mass", "skipped_mass")
    assert sum(data[part] for part in parts) == pytest.approx(1, abs=1e-4)
    assert sum(token["score"] for token in data["scores"]) == pytest.approx(data["input_mass"])
    assert sum(s["score"] for s in data["segments"]) == pytest.approx(data["input_mass"])
    layers = [sum(column) for column in zip(*data["layers"], strict=True)]
    assert layers == pytest.approx([t["score"] for t in data["scores"]], rel=1e-4, abs=1e-7)
    assert len(data["layers"]) == 30
    assert answer.attention.shape == tuple(data["attention"]["shape"])
    assert answer.attention.shape[:2] == (30, 9)
    sums = answer.attention.float().sum(-1)
    assert (sums > 0.9).all() and (sums < 1.001).all()
    # Nothing attends to what is behind the target.
    [(_, end)] = data["target"]["tokens"]
    assert not answer.attention[..., data["prompt_tokens"] + end :].any()
    json.loads(json.dumps(data, allow_nan=False))


def test_existing_text_gives_the_same_attribution(ft: FlashTrace, answer: Attribution) -> None:
    wanted = {**EVERYTHING, "target": {"text": SCENARIO.answer}}
    again = ft.attribute(MESSAGES, answer.text, flashtrace=wanted)
    ours = [token["score"] for token in again.to_dict()["scores"]]
    theirs = [token["score"] for token in answer.to_dict()["scores"]]
    assert ours == pytest.approx(theirs, abs=2e-4)


def test_batch_of_prompts_chats_and_token_ids(tiny: Engine) -> None:
    ft = FlashTrace(llm=tiny.llm)
    tokenizer = ft.llm.get_tokenizer()
    prompts = [
        [{"role": "user", "content": "What is the capital of France?"}],
        "The capital of France is",
        tokenizer.encode("One, two, three,"),
        [{"role": "user", "content": "Say hello."}],
    ]
    several = ft.generate(
        prompts, _greedy(max_tokens=12, n=2, temperature=0.7, seed=1), flashtrace={"hops": "auto"}
    )
    assert len(several) == 8
    assert [a.status for a in several] == ["completed"] * 8
    counts = [a.to_dict()["prompt_tokens"] for a in several]
    assert counts[::2] == counts[1::2]
    assert counts[4] == len(prompts[2])
    text = [t for t in several[2].to_dict()["scores"] if "start" in t]
    assert all("The capital of France is"[t["start"] : t["end"]] == t["token"] for t in text)


@pytest.mark.parametrize("hops", [0, 2])
def test_rows_that_predict_the_target_agree_with_the_oracle(
    tiny: Engine, tiny_folder: Path, hops: int
) -> None:
    """The first generated token's is the prompt's last; hops explain tokens at their own rows."""
    from transformers import AutoModelForCausalLM

    ft = FlashTrace(llm=tiny.llm)
    ids = torch.randint(5, 500, (120,), generator=torch.Generator().manual_seed(4)).tolist()
    prompt, end = 90, 96
    weights = {0: 2.0, 1: 1.0, 4: 0.5, 5: 1.0} if not hops else {3: 2.0, 5: 1.0}
    field = {
        "target": {"weights": {str(i): w for i, w in weights.items()}},
        "rows": "predicting",
        "skip_tokens": "none",
        "hops": hops,
        "top_k": None,
        "include": ["generated"],
    }
    found = ft.attribute(ids[:prompt], ids[prompt:], field)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, attn_implementation="eager", dtype=torch.float32
    )
    target = torch.zeros(end)
    for i, weight in weights.items():
        target[prompt + i - 1] = weight
    positions = torch.arange(end)
    followed = (positions >= prompt) & (positions < prompt + min(weights))

    def one_hop(dense: torch.Tensor) -> torch.Tensor:
        rows = dense.nonzero().squeeze(1)
        return oracle_scores(model, ids[:end], rows, dense[rows])

    expected, left = oracle_hops(
        one_hop, target.double(), positions < prompt, followed, len(found.hops) - 1
    )
    scores = torch.tensor([token.score for token in found.scores], dtype=torch.float64)
    assert float((scores - expected[:prompt]).abs().sum() / expected.sum()) <= 1e-5
    assert found.remaining_mass == pytest.approx(float(left), abs=1e-6)
    assert found.target["tokens"][0] == [min(weights), 2 if not hops else min(weights) + 1]


def test_defaults_agree_with_the_oracle(tiny: Engine, tiny_folder: Path) -> None:
    """All of them at once: rows that chose the answer, hops to the end, no punctuation."""
    from transformers import AutoModelForCausalLM

    ft = FlashTrace(llm=tiny.llm)
    encode = ft.llm.get_tokenizer().encode
    prompt = encode("The cat sat, on a mat: it was 4821! ... Which cat, and (where)?\n")
    reasoning, answer = encode("Let me see, the cat - on a mat. "), encode("It sat; there!")
    ids, start = [*prompt, *reasoning, *answer], len(prompt) + len(reasoning)
    found = ft.attribute(prompt, ids[len(prompt) :], {"target": {"text": "It sat; there!"}})
    assert found.status == "completed", found.error
    listed = {score.index: score.score for score in found.scores}
    whole = ft.attribute(
        prompt, ids[len(prompt) :], {"target": {"text": "It sat; there!"}, "top_k": None}
    )
    scores = torch.tensor([token.score for token in whole.scores], dtype=torch.float64)
    assert len(whole.hops) == len(found.hops) >= 2
    assert listed == {i: float(scores[i]) for i in listed}

    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, attn_implementation="eager", dtype=torch.float32
    )
    texts = ft.llm.get_tokenizer().batch_decode([[i] for i in ids])
    words = torch.tensor([any(c.isalnum() for c in text) for text in texts])
    assert 0 < int((~words[: len(prompt)]).sum()) < len(prompt) // 2
    positions = torch.arange(len(ids) - 1)  # Of the last token no row is explained.
    target = torch.zeros(len(ids) - 1)
    target[start - 1 : len(ids) - 1] = words[start:].float()

    def one_hop(dense: torch.Tensor) -> torch.Tensor:
        rows = dense.nonzero().squeeze(1)
        return oracle_scores(model, ids[: len(ids) - 1], rows, dense[rows])

    is_input = (positions < len(prompt)) & words[:-1]
    followed = (positions >= len(prompt)) & (positions < start) & words[:-1]
    expected, left = oracle_hops(one_hop, target.double(), is_input, followed, len(whole.hops) - 1)
    expected = expected[: len(prompt)]
    assert float((scores - expected).abs().sum() / expected.sum()) <= 1e-5
    assert whole.remaining_mass == pytest.approx(float(left), abs=1e-6)


@pytest.mark.parametrize("rows", ["target", "predicting"])
def test_surprising_tokens_count_more(tiny: Engine, tiny_folder: Path, rows: str) -> None:
    """As with the weights ``-log p`` that Hugging Face gives, of one target and of several."""
    from transformers import AutoModelForCausalLM

    ft = FlashTrace(llm=tiny.llm)
    ids = torch.randint(5, 500, (100,), generator=torch.Generator().manual_seed(6)).tolist()
    prompt = 80
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    surprise = [-float(logs[prompt + i - 1, ids[prompt + i]]) for i in range(20)]
    spans = [[0, 6], [10, 16]]
    field = {"rows": rows, "hops": 1, "top_k": None}

    def scores(**more: Any) -> Any:
        found = ft.attribute(ids[:prompt], ids[prompt:], {**field, **more})
        assert found.status == "completed", found.error
        return found, [[token.score for token in part.scores] for part in found.targets]

    given = [{"weights": {str(i): surprise[i] for i in range(*span)}} for span in spans]
    _, expected = scores(targets=given)
    both, found = scores(targets=[{"tokens": [span]} for span in spans], weighting="surprise")
    _, [alone] = scores(target={"tokens": [spans[1]]}, weighting="surprise")
    _, equal = scores(targets=[{"tokens": [span]} for span in spans])
    for own, wanted, plain in zip(found, expected, equal, strict=True):
        assert own == pytest.approx(wanted, abs=1e-6)
        assert max(abs(a - b) for a, b in zip(own, plain, strict=True)) > 1e-4
    assert alone == pytest.approx(expected[1], abs=1e-6)
    usage = both.to_dict()["usage"]
    assert usage["scored_requests"] == 1
    assert usage["seconds"]["weighting"] > 0


def test_a_failed_trace_keeps_its_completion(ft: FlashTrace) -> None:
    found, lost = ft.generate(
        [MESSAGES, [{"role": "user", "content": "Say hello."}]],
        _greedy(),
        flashtrace={"target": {"text": "7306"}},
    )
    assert found.status == "completed"
    assert found.to_dict()["target"]["text"] == "7306"
    assert lost.status == "failed"
    assert lost.error is not None
    assert lost.error["code"] == "target_not_found"
    assert lost.text


@pytest.mark.parametrize(("rows", "dropped"), [("target", 1), ("predicting", 0)])
def test_trace_of_exactly_the_model_length(tiny: Engine, rows: str, dropped: int) -> None:
    ft = FlashTrace(llm=tiny.llm)
    limit = ft.llm.llm_engine.vllm_config.model_config.max_model_len
    prompt = (ft.llm.get_tokenizer().encode(CONTEXT) * 10)[: limit - 20]
    [full] = ft.generate(
        [prompt],
        _greedy(max_tokens=20, ignore_eos=True),
        flashtrace={"target": {"tokens": [[0, 20]]}, "rows": rows},
    )
    assert full.status == "completed"
    data = full.to_dict()
    # The engine cannot prefill the very last token, and has no need to for the row before it.
    assert data["usage"].get("dropped_target_tokens", 0) == dropped
    assert data["target"]["tokens"][-1][1] == 20 - dropped


def test_bad_field_is_refused_before_generation(ft: FlashTrace) -> None:
    with pytest.raises(InvalidRequestError, match=r"hops.*-1"):
        ft.generate([MESSAGES], _greedy(), flashtrace={"hops": -1})


def test_weights_and_skipping(ft: FlashTrace) -> None:
    [weighted] = ft.generate(
        ["The capital of France is"],
        _greedy(max_tokens=12),
        flashtrace={
            "target": {"weights": {"3": 2.0, "5": 1.0}},
            "skip_tokens": "punctuation",
            "recurse_over": "generated",
            "hops": 2,
        },
    )
    data = weighted.to_dict()
    assert data["status"] == "completed"
    assert data["target"]["tokens"] == [[3, 4], [5, 6]]
    assert data["skipped_mass"] >= 0
    assert len(data["hops"]) == 3


def test_results_come_with_the_outputs_of_their_requests(smollm2: Engine, ft: FlashTrace) -> None:
    """So a hop costs no call to the workers, which would hold up the engine between its steps."""
    calls: list[str] = []
    rpc = smollm2.llm.collective_rpc

    def counted(method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return rpc(method, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2.llm, "collective_rpc", counted)
        [answer] = ft.generate(["The code is 4821. The code is"], _greedy(max_tokens=8))
    assert answer.to_dict()["status"] == "completed"
    assert set(calls) == {"flashtrace_status"}
    assert smollm2.status()["waiting_results"] == 0
