"""Citations in the forms of OpenAI, Anthropic and Cohere, through vLLM's own application."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from anthropic.types import CitationCharLocation, CitationsSearchResultLocation
from openai.types.chat.chat_completion_message import Annotation
from openai.types.responses.response_output_text import (
    AnnotationFileCitation,
    AnnotationURLCitation,
)

from tests.api.samples import check_described
from tests.server.scripted_app import App
from tests.server.sdk import anthropic_client, openai_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

PARIS = "Paris is the capital of France. The Louvre is there."
ROME = "Rome is the capital of Italy."
ASK = "Which capitals?"
QUESTION = f"{PARIS}\n\n{ROME}\n\n{ASK}"
SOURCES = [
    {"id": "p", "text": PARIS, "title": "Paris", "url": "https://example.com/paris"},
    {"id": "r r", "text": ROME},
]
PARTS = ["Paris is one.", "Rome is another."]
ANSWER = " ".join(PARTS)
FIELD = {"sources": SOURCES, "citations": True, "hops": 0, "top_k": None}


async def scored(app: App, **weights: float) -> None:
    """Makes every trace give the tokens of PARIS and ROME these scores, and others 0.001."""
    app.engine.answers = [ANSWER]
    response = await app.post(
        "/v1/attributions",
        messages=[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
        flashtrace={"hops": 0, "top_k": None},
    )
    rows = response.json()["scores"]

    def scores(length: int) -> torch.Tensor:
        made = torch.full((length,), 0.001)
        for row in rows:
            text = QUESTION[row["start"] : row["end"]].strip() if "start" in row else ""
            for source, weight in weights.items():
                start = QUESTION.find({"paris": PARIS, "rome": ROME}[source])
                length_of = len({"paris": PARIS, "rome": ROME}[source])
                if text and start <= row["start"] < start + length_of:
                    made[row["index"]] = weight
        return made

    app.engine.trace_scores = scores


async def chat(app: App, **field: Any) -> dict[str, Any]:
    response = await app.chat(
        messages=[{"role": "user", "content": QUESTION}], flashtrace={**FIELD, **field}
    )
    choice: dict[str, Any] = response.json()["choices"][0]
    check_described(choice["flashtrace"])
    return choice


async def test_sources_have_scores_and_parts_their_sources(app):
    await scored(app, paris=1.0, rome=0.1)
    data = (await chat(app))["flashtrace"]
    assert [found["target"]["text"] for found in data["targets"]] == PARTS
    for found in data["targets"]:
        assert ANSWER[found["target"]["start"] : found["target"]["end"]] == found["target"]["text"]
        paris, rome = found["sources"]
        assert (paris["id"], rome["id"]) == ("p", "r r")
        assert paris["mean"] > 5 * rome["mean"] > 0
        assert QUESTION[paris["start"] : paris["end"]] == PARIS
        for sentence in paris["sentences"]:
            assert QUESTION[sentence["start"] : sentence["end"]] == sentence["text"]
    assert [each["text"] for each in data["citations"]] == PARTS
    for citation in data["citations"]:
        [source] = citation["sources"]
        assert source["id"] == "p" and source["index"] == source["number"] == 0
        assert PARIS[source["start"] : source["end"]] == source["text"]


async def test_parts_that_came_from_no_source_have_no_citation(app):
    await scored(app)
    rows = (await chat(app))["flashtrace"]["targets"][0]["scores"]
    outside = [row["index"] for row in rows if "message" not in row]

    def elsewhere(length: int) -> torch.Tensor:
        made = torch.full((length,), 1e-6)
        made[outside] = 1.0
        return made

    app.engine.trace_scores = elsewhere
    choice = await chat(app)
    assert choice["flashtrace"]["citations"] == []
    assert choice["message"]["annotations"] == []
    assert choice["flashtrace"]["targets"][0]["sources"][0]["score"] > 0


async def test_a_chat_has_annotations(app):
    await scored(app, paris=1.0, rome=0.9)
    async with openai_client(app) as client:
        answer = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": QUESTION}],
            extra_body={"flashtrace": FIELD},
        )
    message = answer.choices[0].message
    assert message.content == ANSWER and message.annotations
    for annotation in message.annotations:
        Annotation.model_validate(annotation.model_dump())
    cited = [annotation.url_citation for annotation in message.annotations]
    assert [ANSWER[each.start_index : each.end_index] for each in cited] == [
        part for part in PARTS for _ in range(2)
    ]
    assert {(each.title, each.url) for each in cited} == {
        ("Paris", "https://example.com/paris"),
        ("r r", "source:r%20r"),
    }


async def test_a_streamed_chat_has_the_same_annotations(app):
    await scored(app, paris=1.0, rome=0.9)
    whole = (await chat(app))["message"]["annotations"]
    async with openai_client(app) as client:
        stream = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            extra_body={"flashtrace": FIELD},
        )
        deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
    [annotations] = [delta.annotations for delta in deltas if hasattr(delta, "annotations")]
    assert annotations == whole


async def test_the_form_of_cohere(app):
    await scored(app, paris=1.0)
    message = (await chat(app, citations={"format": "cohere"}))["message"]
    assert not message.get("annotations")
    assert [each["text"] for each in message["citations"]] == PARTS
    for citation in message["citations"]:
        assert ANSWER[citation["start"] : citation["end"]] == citation["text"]
        [source] = citation["sources"]
        assert source["type"] == "document" and source["id"] == source["document"]["id"] == "p"


async def test_a_response_has_annotations(app):
    await scored(app, paris=1.0, rome=0.9)
    async with openai_client(app) as client:
        response = await client.responses.create(
            model="m", input=QUESTION, extra_body={"flashtrace": FIELD}
        )
    [text] = [part for item in response.output for part in item.content]
    assert text.text == ANSWER
    url, file = text.annotations[:2]
    AnnotationURLCitation.model_validate(url.model_dump())
    AnnotationFileCitation.model_validate(file.model_dump())
    assert ANSWER[url.start_index : url.end_index] == PARTS[0]
    assert file.file_id == "r r" and file.index == len(PARTS[0])


async def test_a_streamed_response_has_an_event_for_each_annotation(app):
    await scored(app, paris=1.0, rome=0.9)
    async with openai_client(app) as client:
        stream = await client.responses.create(
            model="m", input=QUESTION, stream=True, extra_body={"flashtrace": FIELD}
        )
        events = [event async for event in stream]
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(events)))
    added = [each for each in events if each.type == "response.output_text.annotation.added"]
    done = events[-1].response
    item = done.output[added[0].output_index]
    assert item.id == added[0].item_id
    whole = item.content[added[0].content_index].annotations
    assert [each.annotation.model_dump() for each in added] == [each.model_dump() for each in whole]
    assert [each.annotation_index for each in added] == list(range(4))


DOCUMENT = {
    "type": "document",
    "title": "Paris",
    "source": {"type": "text", "media_type": "text/plain", "data": PARIS},
    "citations": {"enabled": True},
}
RESULT = {
    "type": "search_result",
    "source": "https://example.com/rome",
    "title": "Rome",
    "content": [{"type": "text", "text": "About Italy."}, {"type": "text", "text": ROME}],
}
MESSAGES = [{"role": "user", "content": [DOCUMENT, RESULT, {"type": "text", "text": ASK}]}]


async def test_a_message_cites_its_documents(app):
    app.engine.answers = [ANSWER]
    async with anthropic_client(app) as client:
        message = await client.messages.create(
            model="m",
            max_tokens=64,
            messages=MESSAGES,
            extra_body={"flashtrace": {"citations": True, "hops": 0}},
        )
    assert "".join(block.text for block in message.content) == ANSWER
    cited = [block for block in message.content if block.citations]
    assert [block.text for block in cited] == PARTS
    location, result = cited[0].citations
    CitationCharLocation.model_validate(location.model_dump())
    CitationsSearchResultLocation.model_validate(result.model_dump())
    assert PARIS[location.start_char_index : location.end_char_index] == location.cited_text
    assert (location.document_index, location.document_title) == (0, "Paris")
    assert (result.search_result_index, result.source) == (0, RESULT["source"])
    blocks = RESULT["content"][result.start_block_index : result.end_block_index]
    assert blocks and result.cited_text in "\n\n".join(block["text"] for block in blocks)
    found = message.flashtrace["targets"][0]["sources"]
    assert [(each["id"], each["kind"]) for each in found] == [
        ("document-0", "document"),
        ("search_result-1", "search_result"),
    ]


async def test_a_streamed_message_cites_before_its_block_ends(app):
    app.engine.answers = [ANSWER]
    field = {"flashtrace": {"citations": True, "hops": 0}}
    async with anthropic_client(app) as client:
        whole = await client.messages.create(
            model="m", max_tokens=64, messages=MESSAGES, extra_body=field
        )
        async with client.messages.stream(
            model="m", max_tokens=64, messages=MESSAGES, extra_body=field
        ) as stream:
            types = [event.type async for event in stream]
            message = await stream.get_final_message()
    [block] = message.content
    expected = [each for part in whole.content for each in part.citations or ()]
    assert [each.model_dump() for each in block.citations] == [
        each.model_dump() for each in expected
    ]
    assert types.index("content_block_stop") > max(
        i for i, name in enumerate(types) if name == "content_block_delta"
    )


async def test_a_result_of_a_tool_is_cited_and_so_are_documents_in_it(app):
    app.engine.answers = [ANSWER]
    call = {"type": "tool_use", "id": "c1", "name": "find", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [RESULT]}
    other = {"type": "tool_result", "tool_use_id": "c2", "content": PARIS}
    messages = [
        {"role": "user", "content": ASK},
        {"role": "assistant", "content": [call, {**call, "id": "c2"}]},
        {"role": "user", "content": [result, other]},
    ]
    response = await app.post(
        "/v1/messages",
        max_tokens=64,
        messages=messages,
        flashtrace={"citations": True, "hops": 0},
    )
    found = response.json()["flashtrace"]["targets"][0]["sources"]
    assert [(each["id"], each["kind"]) for each in found] == [
        ("search_result-0", "search_result"),
        ("c2", "tool"),
    ]


@pytest.mark.parametrize("field", [None, False])
async def test_documents_without_the_field_are_left_to_vllm(app, field):
    response = await app.post("/v1/messages", max_tokens=8, messages=MESSAGES, flashtrace=field)
    assert response.status_code == 400 and "document" in response.text


async def test_a_document_without_text_is_left_to_vllm(app):
    pdf = {**DOCUMENT, "source": {"type": "base64", "media_type": "application/pdf", "data": "AA"}}
    messages = [{"role": "user", "content": [pdf, {"type": "text", "text": ASK}]}]
    response = await app.post("/v1/messages", max_tokens=8, messages=messages, flashtrace=True)
    assert response.status_code == 400 and "document" in response.text


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ASK}]},
         "flashtrace.sources[0].text"),
        ("/v1/responses", {"input": ASK}, "flashtrace.sources[0].text"),
        ("/v1/messages", {"messages": [{"role": "user", "content": ASK}], "max_tokens": 8},
         "flashtrace.sources[0].text"),
        ("/v1/completions", {"prompt": QUESTION}, "flashtrace.citations"),
    ],
)  # fmt: skip
async def test_what_cannot_be_cited_is_refused_before_the_generation(app, route, body, param):
    response = await app.post(route, **body, flashtrace=FIELD)
    assert response.status_code == 400 and not app.engine.generations
    assert param in response.text


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
async def test_a_form_of_another_route_is_refused(app, route):
    body = {"input": QUESTION} if "responses" in route else {
        "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8,
    }  # fmt: skip
    field = {**FIELD, "citations": {"format": "cohere"}}
    response = await app.post(route, **body, flashtrace=field)
    assert response.status_code == 400 and "flashtrace.citations.format" in response.text


async def test_a_template_without_documents_is_named(app):
    response = await app.chat(
        messages=[{"role": "user", "content": ASK}],
        documents=[{"title": "Paris", "text": PARIS}],
        flashtrace={"citations": True},
    )
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "documents"
    assert "the chat template does not write" in error["message"]


async def test_documents_that_the_template_writes_are_sources(app):
    template = (
        "{% for d in documents or [] %}<doc>{{ d.title }}: {{ d.text }}</doc>{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    app.engine.answers = [ANSWER]
    stock = app.app.state.openai_serving_chat
    handler = stock._stock
    before = handler.online_renderer.chat_template
    handler.online_renderer.chat_template = template
    try:
        response = await app.chat(
            messages=[{"role": "user", "content": ASK}],
            documents=[{"title": "Paris", "text": PARIS}, {"title": "Rome", "text": ROME}],
            flashtrace={"citations": True, "hops": 0},
        )
    finally:
        handler.online_renderer.chat_template = before
    data = response.json()["choices"][0]["flashtrace"]
    found = data["targets"][0]["sources"]
    assert [(each["id"], each["title"]) for each in found] == [
        ("document-0", "Paris"), ("document-1", "Rome"),
    ]  # fmt: skip
    assert [each["text"] for each in found[0]["sentences"]].count(PARIS.split(". ")[0] + ".") == 1
    assert all(each["score"] > 0 for each in found)


async def test_existing_text_has_its_citations_in_the_object(app):
    await scored(app, paris=1.0)
    response = await app.post(
        "/v1/attributions",
        messages=[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
        flashtrace=FIELD,
    )
    data = response.json()
    check_described(data)
    assert [each["text"] for each in data["citations"]] == PARTS


async def test_a_plain_prompt_has_sources(app):
    response = await app.complete(prompt=QUESTION, flashtrace={"sources": SOURCES, "hops": 0})
    found = response.json()["choices"][0]["flashtrace"]["sources"]
    assert [each["id"] for each in found] == ["p", "r r"]
    assert all(each["message"] == 0 and each["score"] > 0 for each in found)
