"""Taking parts of the client's texts out of a prompt, and what the scores behind it say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion, ScoreReport
from vllm_flashtrace.text.plan import plan_targets
from vllm_flashtrace.text.verification import Verification, verdict_of

CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "The cat sat. The code is 4821. It is cold.\nWhich code?"},
]
CODE = "The code is 4821."


def verify(tokenizer, completion, scored, render=None, limit=128, **field):
    """The verification of a completion whose prompt tokens have the scores of `scored` texts."""
    request = parse_flashtrace_field({"verify": 2, "hops": 0, **field}, RequestLimits())
    plans = plan_targets(request, completion, tokenizer, render=render)
    for plan in plans:
        scores = torch.full((len(plan.token_ids),), 1e-6)
        for weight, text in enumerate(reversed(scored), 1):
            start = plan.prompt.text.find(text)
            scores[plan.prompt.overlapping(start, start + len(text))] = float(weight)
        assert plan.recursion.next_weights() is not None
        plan.recursion.add(scores)
    return Verification(plans, tokenizer, render=render, max_requests=limit)


def reports(verification, *log_probs):
    """Each token of text number ``i`` has ``log_probs[i]``."""
    return [
        ScoreReport(torch.full((len(text.positions),), value))
        if isinstance(value, float)
        else value
        for text, value in zip(verification.texts, log_probs, strict=True)
    ]


def test_prompts_are_those_of_chats_without_the_sentences(byte_level, chat, render):
    completion = chat(CHAT, "4821")
    found = verify(byte_level, completion, [CODE, "Answer in one word."], render)
    contents = [
        ("Answer in one word.", CHAT[1]["content"]),
        ("", "The cat sat. It is cold.\nWhich code?"),
        ("Answer in one word.", "The cat sat. It is cold.\nWhich code?"),
        ("", CHAT[1]["content"]),
    ]
    for text, (system, user) in zip(found.texts, contents, strict=True):
        messages = [{**CHAT[0], "content": system}, {**CHAT[1], "content": user}]
        alone = chat(messages, "4821", eos=False)
        assert list(text.token_ids) == alone.token_ids
        first = len(alone.prompt_token_ids)
        assert list(text.positions) == list(range(first, len(alone.token_ids)))
    tokens = len(completion.generated_token_ids) - 1
    [data] = found.results(reports(found, -0.1, -3.0, -2.0, -0.1))
    assert data["log_prob"] == pytest.approx(-0.1 * tokens)
    assert [one["text"] for one in data["removed"]] == [CODE, "Answer in one word."]
    drops = [one["log_prob_drop"] for one in data["removed"]]
    assert drops == pytest.approx([1.9 * tokens, 0.0])
    assert [one["verdict"] for one in data["removed"]] == ["supported", "unsupported"]
    assert data["together"]["log_prob_drop"] == pytest.approx(2.9 * tokens)
    assert data["verdict"] == data["together"]["verdict"] == "supported"


@pytest.mark.parametrize(
    ("content", "removed", "left"),
    [
        ("One. Two. Three.", "Two.", "One. Three."),
        ("One. Two. Three.", "One.", "Two. Three."),
        ("One. Two. Three.", "Three.", "One. Two."),
        ("One.\nTwo. Three.\n", "Two.", "One.\nThree.\n"),
        ("One. Two.\n\nThree.", "Two.", "One.\n\nThree."),
    ],
)
def test_one_separator_is_left(byte_level, content, removed, left):
    ids = byte_level.encode(content)
    answer = byte_level.encode(" The cat", add_special_tokens=False)
    completion = Completion(ids, answer, " The cat", prompt_text=content)
    found = verify(byte_level, completion, [removed], verify=1)
    assert list(found.texts[1].token_ids) == [*byte_level.encode(left), *answer]


def test_a_prompt_of_which_nothing_is_left_is_not_scored(byte_level):
    ids = byte_level.encode(CODE, add_special_tokens=False)
    answer = byte_level.encode(" 4821", add_special_tokens=False)
    found = verify(byte_level, Completion(ids, answer, " 4821", prompt_text=CODE), [CODE])
    assert found.texts == []
    [result] = found.results([])
    assert result["removed"][0]["reason"] == "nothing is left of the prompt without it"


def test_templates_that_break_are_named(byte_level, chat, render):
    completion = chat(CHAT, "4821")

    def refusing(messages):
        if any(CODE not in message["content"] for message in messages[1:]):
            raise ValueError("no code")
        return render(messages)

    def dropping(messages):
        return render([message for message in messages if message["content"]])

    def reasons(template):
        found = verify(byte_level, completion, [CODE, "Answer in one word."], template)
        [data] = found.results(reports(found, *[-1.0] * len(found.texts)))
        parts = [*data["removed"], data["together"]]
        return [one.get("reason", one.get("verdict")) for one in parts]

    raised = "the chat template does not render the messages without it"
    assert reasons(refusing) == [raised, "unsupported", raised]
    other = "the chat template writes more than this in another way without it"
    assert reasons(dropping) == ["unsupported", other, other]
    changed = "the prompt's text does not give its tokens again"
    assert reasons(lambda messages: render(messages) + "\n") == [changed] * 3
    assert reasons(None) == ["the prompt cannot be rendered again"] * 3
    nothing = replace(completion, messages=None)
    found = verify(byte_level, nothing, [CODE])
    assert not found.texts and list(found.results([])[0]) == ["reason"]


def test_json_in_a_template_is_a_form_of_the_text(byte_level):
    """A removed sentence counts as it is written, with escapes."""
    content = 'He said "4821". The cat.'

    def render(messages):
        escaped = messages[0]["content"].replace('"', '\\"')
        return f'{{"content": "{escaped}"}}'

    messages = [{"role": "user", "content": content}]
    prompt = byte_level.encode(render(messages), add_special_tokens=False)
    answer = byte_level.encode(" The cat", add_special_tokens=False)
    completion = Completion(prompt, answer, " The cat", messages=messages)
    found = verify(byte_level, completion, ['He said \\"4821\\".'], render, verify=1)
    shorter = render([{"content": "The cat."}])
    expected = byte_level.encode(shorter, add_special_tokens=False)
    assert list(found.texts[1].token_ids) == [*expected, *answer]


def test_sources_are_taken_out_where_the_request_has_any(byte_level, chat, render):
    completion = chat(CHAT, "4821")
    marks = [{"id": "cat", "text": "The cat sat."}, {"id": "code", "text": f"{CODE} It is cold."}]
    found = verify(byte_level, completion, [f"{CODE} It is cold."], render, sources=marks)
    contents = [
        CHAT[1]["content"],
        "Which code?",
        "The cat sat.\nWhich code?",
        f"{CODE} It is cold.\nWhich code?",
    ]
    for text, content in zip(found.texts, contents, strict=True):
        alone = chat([CHAT[0], {**CHAT[1], "content": content}], "4821", eos=False)
        assert list(text.token_ids) == alone.token_ids
    [data] = found.results(reports(found, -1.0, -2.0, -2.0, -1.0))
    assert [(one["id"], one["index"]) for one in data["removed"]] == [("code", 1), ("cat", 0)]
    assert [one["log_prob_drop"] > 0 for one in data["removed"]] == [True, False]


def test_reasoning_that_stays_may_hold_what_was_taken_out(byte_level, chat, render):
    completion = chat(CHAT, "<think>It is 4821.</think>4821")
    found = verify(byte_level, completion, [CODE, "The cat sat."], render, target={"text": "4821"})
    [data] = found.results(reports(found, -1.0, -1.1, -9.0, -1.0))
    code, cat = data["removed"]
    assert code["verdict"] == "supported" and "log_prob_drop" in cat and "verdict" not in cat
    assert cat["reason"] == data["together"]["reason"] and "the reasoning" in cat["reason"]
    assert "verdict" not in data


def test_targets_share_texts_up_to_the_limit(byte_level, chat, render):
    answer = "4821 it is. The cat."
    completion = chat(CHAT, answer)
    field = {"targets": "sentences"}
    found = verify(byte_level, completion, [CODE, "The cat sat."], render, **field)
    assert len(found.texts) == 4  # Both targets have the same two sentences.
    ours, other = found.results(reports(found, -0.5, -1.0, -1.0, -1.0))
    assert ours["target_tokens"] + other["target_tokens"] == len(found.texts[0].positions)
    drops = ours["log_prob_drop"] if "log_prob_drop" in ours else ours["together"]["log_prob_drop"]
    assert drops == pytest.approx(0.5 * ours["target_tokens"])
    few = verify(byte_level, completion, [CODE, "The cat sat."], render, limit=3, **field)
    assert len(few.texts) == 3
    for data in few.results(reports(few, -0.5, -1.0, -1.0)):
        first, second = data["removed"]
        assert "log_prob_drop" in first and "max_verify_requests" in second["reason"]


def test_a_request_that_failed_leaves_the_others(byte_level, chat, render):
    found = verify(byte_level, chat(CHAT, "4821"), [CODE, "The cat sat."], render)
    failed = TraceError("aborted", "it was stopped")
    [data] = found.results(reports(found, -1.0, failed, -2.0, -3.0))
    assert data["together"] == {"reason": "aborted: it was stopped"} and "verdict" not in data
    assert all("log_prob_drop" in one for one in data["removed"])
    [data] = found.results(reports(found, failed, -1.0, -2.0, -3.0))
    parts = [*data["removed"], data["together"]]
    assert "log_prob" not in data
    assert {one["reason"] for one in parts} == {
        "the target could not be scored: aborted: it was stopped"
    }
    [data] = found.results(reports(found, -1.0, -1.0, -2.0, -3.0), weights="other")
    assert "weights" in data["together"]["reason"]


def test_verdicts_are_of_the_total_and_of_each_token():
    assert verdict_of(math.log(10), 2) == "supported"
    assert verdict_of(math.log(10), 30) == verdict_of(math.log(2), 2) == "weak"
    assert verdict_of(math.log(2), 30) == verdict_of(-5.0, 1) == "unsupported"
