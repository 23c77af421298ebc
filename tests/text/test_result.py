"""The public object: complete, plain JSON, described, and balanced; and the sentences in it."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.samples import check_described
from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.api.response import SegmentScore
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion, TraceUsage
from vllm_flashtrace.text.plan import plan_trace
from vllm_flashtrace.text.prompt_map import LocatedToken, PromptMap
from vllm_flashtrace.text.result import build_result, failed_result, segments
from vllm_flashtrace.text.sentences import containing, sentence_spans, sentences

CHAT = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "The secret code is 4821. 😀 Which code?", "name": "Ada"},
]
ANSWER = "<think>step by step</think>The code is 4821. 😀 The cat"
EVERYTHING = ["hops", "generated", "segments", "sentences", "layers", "tokens"]
LAYERS = 3
ID = "ft-" + "0123456789abcdef" * 2


@pytest.fixture
def trace(byte_level, render, chat):
    """Plans and runs a trace on made-up scores; gives plan, hop result and object.

    Options not given are the paper's: every token of the prompt is scored and listed.
    """

    def run(
        completion=None, *, seed=0, layers=True, keep=None, scores=None, settings=None, **options
    ):
        completion = completion or chat(CHAT, ANSWER)
        request = parse_flashtrace_field({"preset": "paper", **options}, RequestLimits())
        settings = {"render": render, "max_trace_tokens": keep, **(settings or {})}
        plan = plan_trace(request, completion, byte_level, **settings)
        generator = torch.Generator().manual_seed(seed)
        while plan.recursion.next_weights() is not None:
            by_layer = torch.rand(LAYERS, len(plan.token_ids), generator=generator)
            if scores is not None:
                by_layer = scores(plan).expand(LAYERS, -1)
            plan.recursion.add(by_layer.sum(dim=0), by_layer if layers else None)
        result = plan.recursion.result()
        usage = TraceUsage(812, 3072, {"queue": 0.0, "prefill": 0.4, "attribution": 0.1})
        data = build_result([plan], usage, ID)
        check_described(data)
        return plan, result, data

    return run


def test_form_of_the_object(trace):
    plan, result, data = trace(target={"text": "4821"}, top_k=3)
    assert list(data) == [
        "id", "object", "status", "target", "scores", "prompt_tokens", "input_mass",
        "remaining_mass", "target_mass", "skipped_mass", "hops", "usage",
    ]  # fmt: skip
    assert (data["id"], data["object"]) == (ID, "flashtrace.attribution")
    assert data["status"] == "completed"
    assert data["target"] == {
        "text": "4821",
        "tokens": [list(s) for s in plan.target_spans],
        "start": ANSWER.rindex("4821"),
        "end": ANSWER.rindex("4821") + 4,
    }
    assert data["prompt_tokens"] == plan.prompt_length
    assert data["usage"] == {
        "recomputed_tokens": 812,
        "cached_tokens": 3072,
        "seconds": {"queue": 0.0, "prefill": 0.4, "attribution": 0.1},
    }
    assert data["remaining_mass"] == result.remaining_mass
    assert [set(hop) for hop in data["hops"]] == [
        {"hop", "input_mass", "reasoning_mass", "target_mass", "skipped_mass"}
    ] * 2
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_top_k_is_highest_first(trace):
    _, result, data = trace(top_k=4)
    values = [entry["score"] for entry in data["scores"]]
    assert values == sorted(result.scores.tolist(), reverse=True)[:4]
    assert [result.scores[entry["index"]] for entry in data["scores"]] == values


def test_the_scope_leaves_out_template_and_blanks(trace, chat):
    """The same scores and masses; what is not listed is said."""
    messages = [{"role": "user", "content": "One\n\n 😀 two"}]
    completion = chat(messages, ANSWER)
    plan, _, everything = trace(completion, top_k=None)
    _, _, content = trace(completion, top_k=None, scope="content")
    assert "unlisted_mass" not in everything
    kept = [
        e for e in everything["scores"] if "start" in e and plan.prompt.token(e["index"]).strip()
    ]
    assert content["scores"] == kept
    assert {e["message"] for e in kept} == {0}
    # Every piece of a character of several tokens stays.
    assert sum(e["start"] == messages[0]["content"].index("😀") for e in kept) > 1
    rest = math.fsum(e["score"] for e in everything["scores"] if e not in kept)
    assert 0 < content["unlisted_mass"] == pytest.approx(rest)
    assert {k: v for k, v in content.items() if k not in ("scores", "unlisted_mass")} == {
        k: v for k, v in everything.items() if k != "scores"
    }
    whole, part = Attribution(everything), Attribution(content)
    assert whole.is_complete
    assert not part.is_complete
    with pytest.raises(ValueError, match="'scope': 'prompt'"):
        part.share(0, 3)
    _, _, best = trace(completion, top_k=2, scope="content")
    assert best["scores"] == sorted(kept, key=lambda e: -e["score"])[:2]


def test_the_scope_keeps_what_may_be_content(trace, chat):
    """A plain prompt has no template, and a message that is not located may be anywhere."""
    plain = Completion(
        chat(CHAT, ANSWER).prompt_token_ids, chat(CHAT, ANSWER).generated_token_ids, ANSWER
    )
    plan, _, data = trace(plain, top_k=None, scope="content")
    blank = [i for i in range(plan.prompt_length) if not plan.prompt.token(i).strip()]
    assert blank
    assert [e["index"] for e in data["scores"]] == [
        i for i in range(plan.prompt_length) if i not in blank
    ]
    lost = [*CHAT, {"role": "user", "content": "This stands nowhere."}]
    elsewhere = dataclasses.replace(chat(CHAT, ANSWER), messages=lost)
    plan, _, data = trace(elsewhere, top_k=None, scope="content")
    assert plan.prompt_map.unlocated
    assert len(data["scores"]) + len(blank) == plan.prompt_length


def test_ties_are_in_prompt_order(trace):
    _, _, data = trace(top_k=6, scores=lambda plan: torch.ones(len(plan.token_ids)))
    assert [entry["index"] for entry in data["scores"]] == list(range(6))


def test_top_k_leaves_out_tokens_without_score(trace):
    def scores(plan):
        only = torch.zeros(len(plan.token_ids))
        only[[4, 7]] = torch.tensor([1.0, 2.0])
        return only

    _, _, data = trace(top_k=20, scores=scores)
    assert [entry["index"] for entry in data["scores"]] == [7, 4]
    _, _, data = trace(top_k=None, scores=scores)
    assert [entry["score"] > 0 for entry in data["scores"]].count(True) == 2


def test_null_top_k_gives_every_prompt_token_in_order(trace):
    plan, result, data = trace(top_k=None)
    assert [entry["index"] for entry in data["scores"]] == list(range(plan.prompt_length))
    assert [entry["token_id"] for entry in data["scores"]] == plan.token_ids[: plan.prompt_length]
    assert math.fsum(e["score"] for e in data["scores"]) == pytest.approx(data["input_mass"])
    assert data["input_mass"] == result.input_mass


def test_scores_name_the_place_in_the_clients_message(trace):
    _, _, data = trace(top_k=None)
    located = [entry for entry in data["scores"] if "message" in entry]
    first_of: dict[tuple[int, int, int], str] = {}
    for entry in located:
        said = CHAT[entry["message"]]["content"][entry["start"] : entry["end"]]
        # Of the tokens that share a character, the first has it as its text.
        place = entry["message"], entry["start"], entry["end"]
        token = first_of.setdefault(place, entry["token"])
        assert said and said in token
        assert entry["token"] in (token, "")
    assert {entry["message"] for entry in located} == {0, 1}
    template = [entry for entry in data["scores"] if "message" not in entry]
    assert all("start" not in entry and "end" not in entry for entry in template)
    assert "<|im_start|>" in [entry["token"] for entry in template]


def test_nothing_optional_is_there_unasked(trace):
    assert set(EVERYTHING).isdisjoint(set(trace(include=[])[2]) - {"hops"})


def test_hop_scores_add_up_to_the_scores(trace):
    _, result, data = trace(include=["hops"], top_k=None, hops=3, skip_tokens="punctuation")
    assert len(data["hops"]) == 4
    total = torch.zeros(data["prompt_tokens"], dtype=torch.float64)
    weight = 1.0
    for hop in data["hops"]:
        assert math.fsum(hop["scores"]) == pytest.approx(hop["input_mass"])
        total += weight * torch.tensor(hop["scores"], dtype=torch.float64)
        weight *= hop["reasoning_mass"]
    torch.testing.assert_close(total, result.scores[: data["prompt_tokens"]])
    assert weight == pytest.approx(data["remaining_mass"])


def test_hop_scores_leave_out_followed_turns_of_the_prompt(trace, chat):
    turns = [*CHAT, {"role": "assistant", "content": "The code"}, CHAT[1]]
    _, _, data = trace(chat(turns, ANSWER), include=["hops"], recurse_over="assistant")
    for hop in data["hops"]:
        assert math.fsum(hop["scores"]) == pytest.approx(hop["input_mass"])


def test_generated_tokens_are_all_there(trace, chat):
    completion = chat(CHAT, ANSWER)
    plan, result, data = trace(completion, include=["generated"], target={"text": "4821"})
    rows = data["generated"]
    assert [row["index"] for row in rows] == list(range(len(completion.generated_token_ids)))
    assert [row["token_id"] for row in rows] == completion.generated_token_ids
    assert "".join(row["token"] for row in rows) == ANSWER + "<|im_end|>"
    traced = len(plan.token_ids) - plan.prompt_length
    assert traced < len(rows)
    scores = [row["score"] for row in rows]
    assert scores[:traced] == result.generated_scores[plan.prompt_length :].tolist()
    assert scores[traced:] == [0.0] * (len(rows) - traced)


def test_segments_add_up_to_the_input_mass(trace):
    _, _, data = trace(include=["segments"], top_k=None)
    assert [s.get("message") for s in data["segments"]] == [0, 1, None]
    assert [s["role"] for s in data["segments"]] == ["system", "user", "template"]
    assert [s.get("name") for s in data["segments"]] == [None, "Ada", None]
    assert math.fsum(s["score"] for s in data["segments"]) == pytest.approx(data["input_mass"])
    for i, segment in enumerate(data["segments"][:2]):
        own = [entry["score"] for entry in data["scores"] if entry.get("message") == i]
        assert segment["score"] == pytest.approx(math.fsum(own))


def test_a_call_that_the_template_leaves_out_has_no_score():
    calls = [{"id": f"c{i}", "function": {"name": "find"}} for i in range(2)]
    message = {"role": "assistant", "content": "Hm", "tool_calls": calls}
    tokens = [LocatedToken(0, None, 0, 2), LocatedToken(0, None, None, None, 1), None]
    [segment, rest] = segments(PromptMap(tokens, ["assistant"]), [message], [0.25, 0.0, 0.5])
    assert segment["score"] == 0.25 and rest["score"] == 0.5
    # The second one is there, and nothing flowed from it.
    assert [call["score"] for call in segment["tool_calls"]] == [None, 0.0]
    SegmentScore.model_validate(segment)


def test_sentences_hold_the_scores_of_their_tokens_best_mean_first(trace):
    _, _, whole = trace(include=["sentences"], top_k=None)
    located = [entry for entry in whole["scores"] if "message" in entry]
    for sentence in whole["sentences"]:
        assert (
            sentence["text"]
            == CHAT[sentence["message"]]["content"][sentence["start"] : sentence["end"]]
        )
        assert sentence["mean"] == pytest.approx(sentence["score"] / sentence["tokens"])
    total = math.fsum(sentence["score"] for sentence in whole["sentences"])
    assert total == pytest.approx(math.fsum(entry["score"] for entry in located))
    assert [s["text"] for s in whole["sentences"]] == [
        "You are helpful.", "The secret code is 4821.", "😀 Which code?",
    ]  # fmt: skip
    _, _, data = trace(include=["sentences"], top_k=2)
    means = [sentence["mean"] for sentence in data["sentences"]]
    assert means == sorted((s["mean"] for s in whole["sentences"]), reverse=True)[:2]


def test_message_that_cannot_be_located_has_no_score_of_its_own(trace, byte_level, chat):
    messages = [CHAT[0], {"role": "user", "content": "user"}]
    completion = chat(messages, "The code")
    # Not the prompt that the messages render to: they are searched for, and "user" is ambiguous.
    front = byte_level.encode("The cat sat. ")
    completion = dataclasses.replace(
        completion, prompt_token_ids=[*front, *completion.prompt_token_ids]
    )
    _, _, data = trace(completion, include=["segments"])
    assert [s.get("message") for s in data["segments"]] == [0, None]
    assert data["segments"][1]["role"] == "unlocated"
    assert data["segments"][1]["unlocated_messages"] == [1]
    assert math.fsum(s["score"] for s in data["segments"]) == pytest.approx(data["input_mass"])


def test_message_located_in_part_has_no_score_of_its_own(trace, byte_level, chat):
    messages = [
        {"role": "user", "content": "Which code?"},
        {"role": "assistant", "content": "The cat", "reasoning_content": "step"},
    ]
    completion = chat(messages, "The code")
    front = byte_level.encode("No rendering. ")
    completion = dataclasses.replace(
        completion, prompt_token_ids=[*front, *completion.prompt_token_ids]
    )
    plan, _, data = trace(completion, include=["segments"])
    assert plan.prompt_map.of_role("assistant")
    assert [s.get("message") for s in data["segments"]] == [0, None]
    assert data["segments"][-1]["unlocated_messages"] == [1]
    assert math.fsum(s["score"] for s in data["segments"]) == pytest.approx(data["input_mass"])


@pytest.mark.parametrize("text", ["The cat sat", None])
def test_plain_prompt(trace, byte_level, text):
    ids = byte_level.encode("<|endoftext|>The cat sat")
    completion = Completion(ids, byte_level.encode(" on"), " on", prompt_text=text)
    _, _, data = trace(completion, include=["segments"], top_k=None)
    if text is None:
        assert [s["role"] for s in data["segments"]] == ["prompt"]
        assert all("message" not in entry for entry in data["scores"])
    else:
        assert [s["role"] for s in data["segments"]] == ["prompt", "template"]
        assert [entry.get("message") for entry in data["scores"]] == [None, *[0] * (len(ids) - 1)]
    assert math.fsum(s["score"] for s in data["segments"]) == pytest.approx(data["input_mass"])


def test_tokens_join_to_the_prompt(trace, chat):
    plan, _, data = trace(include=["tokens"])
    assert len(data["tokens"]) == plan.prompt_length
    assert "".join(data["tokens"]) == plan.prompt.text
    assert "😀" in plan.prompt.text


def test_texts_of_tokens_are_the_same_wherever_they_stand(trace, chat):
    question = [{"role": "user", "content": "😀 é 漢字 The 😀"}]
    completion = chat(question, "漢 The code 😀.")
    plan, _, data = trace(completion, include=["tokens", "generated"], top_k=None)
    texts = [entry["token"] for entry in data["scores"]]
    assert texts == data["tokens"]
    assert "".join(texts) == plan.prompt.text
    # Each of the four bytes of the character is a token: the first one has it.
    at = texts.index("😀")
    assert texts[at : at + 4] == ["😀", "", "", ""]
    generated = [row["token"] for row in data["generated"]]
    assert "".join(generated) == "漢 The code 😀.<|im_end|>"
    at = generated.index("漢")
    assert generated[at : at + 3] == ["漢", "", ""]
    some = trace(completion, top_k=5)[2]["scores"]
    assert [entry["token"] for entry in some] == [texts[entry["index"]] for entry in some]


@pytest.mark.parametrize(
    ("threshold", "hops", "stopped"),
    [(0.05, "auto", "threshold"), (0.0, "auto", "max_hops"), (0.9, "auto", "threshold")],
)
def test_hops_auto_say_why_they_ended(trace, threshold, hops, stopped):
    _, _, data = trace(hops=hops, settings={"auto_threshold": threshold, "max_hops": 4})
    assert data["auto_stopped"] == stopped
    assert list(data).index("auto_stopped") == list(data).index("hops") + 1
    if stopped == "threshold":
        assert data["remaining_mass"] < threshold and len(data["hops"]) <= 5
    else:
        assert data["remaining_mass"] > threshold and len(data["hops"]) == 5


def test_hops_auto_with_nothing_to_follow_ended_by_themselves(trace, chat):
    completion = chat(CHAT, "The code")
    _, _, data = trace(completion, hops="auto", reasoning="none", settings={"auto_threshold": 0.0})
    assert (data["remaining_mass"], data["auto_stopped"]) == (0.0, "threshold")
    assert "auto_stopped" not in trace(completion, hops=2)[2]


def test_layers_add_up_to_the_scores(trace):
    _, _, data = trace(include=["layers"], top_k=None)
    assert len(data["layers"]) == LAYERS
    sums = [math.fsum(column) for column in zip(*data["layers"], strict=True)]
    assert sums == pytest.approx([entry["score"] for entry in data["scores"]])


def test_layers_that_were_not_measured_are_an_error(trace):
    with pytest.raises(TraceError) as error:
        trace(include=["layers"], layers=False)
    assert error.value.code == "no_layer_scores"
    with pytest.raises(TraceError) as error:
        trace(include=["attention"])
    assert error.value.code == "result_missing"


def test_dropped_target_tokens_are_counted(trace, chat):
    completion = chat(CHAT, "The code is 4821.")
    plan, _, data = trace(completion, keep=len(completion.prompt_token_ids) + 1)
    assert data["usage"]["dropped_target_tokens"] == plan.dropped_target_tokens > 0
    assert data["target"]["tokens"] == [[0, 1]]


def ended(plan: Any, result: Any, **changed: Any) -> Any:
    """The plan with another outcome."""
    other = dataclasses.replace(result, **changed)
    return dataclasses.replace(plan, recursion=types.SimpleNamespace(result=lambda: other))


@pytest.mark.parametrize(
    "change",
    [
        lambda result: {"target_mass": result.target_mass + 0.001},
        lambda result: {"skipped_mass": float("nan")},
        lambda result: {"scores": result.scores * 1.01},
        lambda result: {"scores": result.scores * float("nan")},
    ],
)
def test_mass_that_does_not_balance_is_an_error(trace, change):
    plan, result, _ = trace()
    with pytest.raises(TraceError) as error:
        build_result([ended(plan, result, **change(result))], TraceUsage(), ID)
    assert error.value.code == "mass_imbalance"


def test_number_that_json_cannot_hold_is_an_error(trace):
    plan, result, _ = trace(include=["generated"])
    bad = result.generated_scores.clone()
    bad[-1] = float("inf")
    with pytest.raises(TraceError) as error:
        build_result([ended(plan, result, generated_scores=bad)], TraceUsage(), ID)
    assert error.value.code == "bad_scores"


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_failed_result(status):
    found = failed_result(ID, TraceError("overloaded", "too much"), status=status)
    check_described(found)
    assert found == {
        "id": ID,
        "object": "flashtrace.attribution",
        "status": status,
        "error": {"code": "overloaded", "message": "too much"},
    }
    assert failed_result("ft-1", TraceError("a", "b"))["status"] == "failed"


WORDS = ["The", " cat", " code", ".", ",", "\n", "😀", "<think>", "</think>", " 4821"]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    recurse_over=st.sampled_from(["reasoning", "generated", "assistant"]),
    skip_tokens=st.sampled_from(["none", "punctuation", ["code"]]),
    hops=st.sampled_from([0, 1, 3, "auto"]),
    target=st.sampled_from(["output", "generated"]),
)
def test_every_completed_object_balances(trace, chat, words, seed, target, **options):
    turns = [*CHAT, {"role": "assistant", "content": "The code"}, CHAT[1]]
    completion = chat(turns, "".join(words))
    try:
        plan, _, data = trace(
            completion, seed=seed, target=target, top_k=None, include=EVERYTHING, **options
        )
    except TraceError as error:
        assert error.code == "empty_target"
        return
    masses = [data[f"{part}_mass"] for part in ("input", "remaining", "target", "skipped")]
    assert math.fsum(masses) == pytest.approx(1)
    assert math.fsum(entry["score"] for entry in data["scores"]) <= 1 + 1e-9
    assert math.fsum(s["score"] for s in data["segments"]) == pytest.approx(data["input_mass"])
    for hop in data["hops"]:
        parts = [hop[f"{part}_mass"] for part in ("input", "reasoning", "target", "skipped")]
        assert math.fsum(parts) == pytest.approx(1)
        assert math.fsum(hop["scores"]) == pytest.approx(hop["input_mass"])
    assert "".join(row["token"] for row in data["generated"]) == plan.generated.full.text
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one", ["one"]),
        ("One. Two! Three?  ", ["One. ", "Two! ", "Three?  "]),
        ("Pi is 3.14. v1.2.3 is out...", ["Pi is 3.14. ", "v1.2.3 is out..."]),
        ('He said "go." Then (he left.) So', ['He said "go." ', "Then (he left.) ", "So"]),
        ("a\nb\n\n\nc", ["a\n", "b\n\n\n", "c"]),
        (" \n One.", [" \n One."]),
        ("一。二\uff01三", ["一。", "二\uff01", "三"]),
        ("x = f(a.b)\n\ty", ["x = f(a.b)\n\t", "y"]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentence_spans(text)] == expected


@given(st.text(st.sampled_from('ab.!? \n")。😀'), max_size=60))
def test_sentences_partition_the_text(text: str) -> None:
    spans = sentence_spans(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(text[start:end].strip() for start, end in spans) or not text.strip()
    starts = [start for start, _ in spans]
    for at in range(len(text)):
        start, end = spans[containing(starts, text, at, at + 1)]
        assert start <= at < end


@pytest.mark.timeout(30)  # Where time is squared, it takes minutes.
@pytest.mark.parametrize("unit", [".", ".)", ". ", "?x", "\n", '."'])
def test_hostile_text_takes_linear_time(unit: str) -> None:
    text = unit * 200_000 + "x"
    assert sentence_spans(text)[-1][1] == len(text)


def test_tokens_belong_where_their_first_letter_is() -> None:
    text = "One two. Three."
    pieces = ["One", " two", ".", " Three", "."]
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    tokens = [LocatedToken(0, None, end - len(p), end) for p, end in zip(pieces, ends, strict=True)]
    template = [None, LocatedToken(0, None, None, None)]
    completion = Completion([1] * 7, [2], "x", prompt_text=text)
    scores = [9.0, 9.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    found = sentences(PromptMap([*template, *tokens], ["prompt"]), completion, scores)
    assert found == [
        {"message": 0, "start": 0, "end": 8, "text": "One two.", "tokens": 3, "score": 7.0}
        | {"mean": 7 / 3},
        {"message": 0, "start": 9, "end": 15, "text": "Three.", "tokens": 2, "score": 24.0}
        | {"mean": 12.0},
    ]
    assert math.fsum(s["score"] for s in found) == 31.0


def test_parts_have_sentences_of_their_own_and_unlocated_messages_none() -> None:
    content = [{"type": "text", "text": "A. B."}, {"type": "text", "text": "C."}]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "lost"}]
    completion = Completion([1] * 4, [2], "x", messages=messages)
    tokens = [
        LocatedToken(0, 0, 0, 2),
        LocatedToken(0, 0, 2, 5),
        LocatedToken(0, 1, 0, 2),
        LocatedToken(1, None, 0, 4),
    ]
    prompt_map = PromptMap(tokens, ["user", "user"], frozenset({1}))
    found = sentences(prompt_map, completion, [1.0, 2.0, 3.0, 4.0])
    assert [(s["part"], s["text"], s["score"]) for s in found] == [
        (0, "A.", 1.0),
        (0, "B.", 2.0),
        (1, "C.", 3.0),
    ]
