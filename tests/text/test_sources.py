"""Where the sources of a request stand, and which prompt tokens they have."""

from __future__ import annotations

import pytest

from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Completion, Document
from vllm_flashtrace.text.offsets import token_offsets
from vllm_flashtrace.text.prompt_map import locate_prompt
from vllm_flashtrace.text.sources import chat_documents, find_sources, locate_sources

PARIS = "Paris is the capital of France. It lies on the Seine."
ROME = "Rome is the capital of Italy."
MESSAGES = [
    {"role": "system", "content": "Answer from the texts."},
    {"role": "user", "content": f"[1] Paris\n{PARIS}\n\n[2] Rome\n{ROME}\n\nWhich capitals?"},
]


def asked(sources, messages=MESSAGES, **known):
    request = parse_flashtrace_field({"sources": sources}, RequestLimits())
    return find_sources(request, Completion((), (), "", messages=messages, **known))


def refusal(sources, messages=MESSAGES, **known):
    with pytest.raises(InvalidRequestError) as caught:
        asked(sources, messages, **known)
    return caught.value


@pytest.mark.parametrize(
    ("marks", "texts"),
    [
        ([{"id": "a", "text": PARIS}, {"id": "b", "text": ROME}], [PARIS, ROME]),
        ([{"id": "a", "message": 0}], [MESSAGES[0]["content"]]),
        ([{"id": "a", "message": 1, "span": [4, 9]}], ["Paris"]),
        ([{"id": "a", "text": "Paris", "message": 1}, {"id": "b", "text": "Paris", "message": 1}],
         ["Paris", "Paris"]),
        ({"separator": r"\n\n"}, [f"[1] Paris\n{PARIS}", f"[2] Rome\n{ROME}", "Which capitals?"]),
        ({"separator": r"\[(?P<id>\d+)\] (?P<title>.*)\n"},
         [PARIS, f"{ROME}\n\nWhich capitals?"]),
    ],
)  # fmt: skip
def test_marked_sources_are_found(marks, texts):
    found = asked(marks)
    assert [source.text for source in found] == texts
    for source in found:
        message, _ = source.key
        assert MESSAGES[message]["content"][slice(*source.span)] == source.text
    assert len({(source.key, source.span) for source in found}) == len(found)


def test_headings_name_their_sources():
    found = asked({"separator": r"\[(?P<id>\d+)\] (?P<title>.*)\n"})
    assert [(source.id, source.title) for source in found] == [("1", "Paris"), ("2", "Rome")]


@pytest.mark.parametrize(
    ("sources", "param", "words"),
    [
        ([{"id": "a", "text": "Paris is the capital of Spain."}], "flashtrace.sources[0].text",
         'nearest text is "Paris is the capital of France. It lies on t" at character 10 of '
         "message 1, the same for 24 characters"),
        ([{"id": "a", "text": "Nothing like it"}], "flashtrace.sources[0].text", "does not occur"),
        ([{"id": "a", "text": "Paris"}], "flashtrace.sources[0].text", "occurs 2 times"),
        ([{"id": "a", "message": 2}], "flashtrace.sources[0].message", "no text in message 2"),
        ([{"id": "a", "message": 1, "part": 0}], "flashtrace.sources[0].part", "message 1, part 0"),
        ([{"id": "a", "message": 0, "span": [0, 99]}], "flashtrace.sources[0].span",
         "goes beyond the 22 characters"),
        ([{"id": "a", "text": PARIS}, {"id": "b", "message": 1}], "flashtrace.sources",
         '"b" and "a" overlap in message 1'),
        ({"separator": "#+"}, "flashtrace.sources.separator", "matches nothing in message 1"),
        ({"separator": r"(?P<id>capital)"}, "flashtrace.sources.separator", "twice"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_found_are_named(sources, param, words):
    error = refusal(sources)
    assert error.param == param
    assert words in error.message
    assert error.code in ("source_not_found", "sources_overlap")


def test_a_prompt_without_text_has_no_sources():
    assert "not given as text" in refusal([{"id": "a", "text": "x"}], messages=None).message
    assert asked("auto", messages=None) == []


def test_results_of_tools_are_sources():
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "Sunny, 20 degrees."},
        {
            "role": "tool",
            "content": [{"type": "text", "text": "Rain"}, {"type": "text", "text": "Wind"}],
        },
    ]
    found = asked("auto", messages)
    assert [(source.id, source.title, source.text) for source in found] == [
        ("c1", "weather", "Sunny, 20 degrees."),
        ("message-2#0", None, "Rain"),
        ("message-2#1", None, "Wind"),
    ]


def test_a_result_with_documents_in_it_is_no_source_of_its_own():
    messages = [{"role": "tool", "tool_call_id": "c1", "content": f"Title\n{PARIS}"}]
    document = Document("d", PARIS, by_template=False)
    [found] = asked("auto", messages, documents=[document])
    assert (found.id, found.key, found.span) == ("d", (0, None), (6, 6 + len(PARIS)))
    assert "does not occur" in refusal("auto", MESSAGES[:1], documents=[document]).message


def test_documents_of_a_chat():
    found = chat_documents(
        [
            {"id": "a", "text": "x"},
            {"id": "a", "contents": "y"},
            {"title": "T", "snippet": "z"},
            {"title": "none"},
        ]
    )
    assert [(each.id, each.text, each.title) for each in found] == [
        ("a", "x", None), ("document-1", "y", None), ("document-2", "z", "T"),
    ]  # fmt: skip


def test_tokens_of_sources(byte_level, chat, render):
    completion = chat(MESSAGES, "Paris and Rome.")
    prompt = token_offsets(byte_level, completion.prompt_token_ids)
    prompt_map = locate_prompt(completion, prompt, render, byte_level)
    sources = asked([{"id": "a", "text": PARIS}, {"id": "b", "text": ROME}])
    for found in locate_sources(sources, prompt_map, prompt):
        text = found.source.text
        assert "".join(text[start:end] for _, start, end in found.tokens) == text
        tokens = [token for token, _, _ in found.tokens]
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        scores = [0.0] * len(prompt)
        scores[tokens[0]] = 0.5
        entry = found.scored(0, scores)
        assert entry["score"] == 0.5 and entry["mean"] == 0.5 / len(tokens)
        best = max(entry["sentences"], key=lambda each: each["score"])
        assert text.startswith(best["text"]) and best["start"] == found.source.span[0]


@pytest.mark.parametrize("written", ["plain", "json"])
def test_tokens_of_documents_that_the_template_writes(byte_level, written):
    import json

    text = 'He said "Paris"\nand left. Then nothing.'
    form = text if written == "plain" else json.dumps(text)
    ids = byte_level.encode(f"Documents: {form} Question?", add_special_tokens=False)
    completion = Completion(ids, (), "", documents=chat_documents([{"id": "d", "text": text}]))
    request = parse_flashtrace_field({"sources": "auto"}, RequestLimits())
    prompt = token_offsets(byte_level, ids)
    prompt_map = locate_prompt(completion, prompt, None, byte_level)
    [found] = locate_sources(find_sources(request, completion), prompt_map, prompt)
    assert {i for _, start, end in found.tokens for i in range(start, end)} == set(range(len(text)))
    entry = found.scored(0, [1.0] * len(ids))
    assert "message" not in entry
    assert [each["text"] for each in entry["sentences"]] == [
        'He said "Paris"', "and left.", "Then nothing.",
    ]  # fmt: skip


def test_a_document_that_stands_nowhere_has_no_score(byte_level):
    ids = byte_level.encode("Question?", add_special_tokens=False)
    completion = Completion(ids, (), "", documents=chat_documents([{"id": "d", "text": "lost"}]))
    request = parse_flashtrace_field({"sources": "auto"}, RequestLimits())
    prompt = token_offsets(byte_level, ids)
    prompt_map = locate_prompt(completion, prompt, None, byte_level)
    [found] = locate_sources(find_sources(request, completion), prompt_map, prompt)
    assert found.scored(0, [1.0] * len(ids))["score"] is None
