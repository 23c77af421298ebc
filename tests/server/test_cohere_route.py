"""``/cohere/v2/chat`` through vLLM's own application and Cohere's own client."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import cohere
import pytest
import pytest_asyncio

from tests.server.scripted_app import App, build
from tests.server.sdk import cohere_client
from tests.server.test_citations import ANSWER, FIELD, PARTS, QUESTION, scored
from vllm_flashtrace import Attribution

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": QUESTION}]
ALL = {"top_k": None, "hops": 0}
AUTO = {"sources": "auto", "hops": 0}
# Writes documents as this route hands them on.
TEMPLATE = (
    "{% for document in documents or [] %}{{ document.data.text }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_app(
    plugins: None, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[App]:
    """vLLM has the route where it is asked for."""
    template = tmp_path_factory.mktemp("template") / "documents.jinja"
    template.write_text(TEMPLATE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_COHERE_API", "1")
        app = await build(model_path, f"--chat-template={template}")
    yield app
    await app.client.aclose()


async def ask(app: App, **body: Any) -> Any:
    return await app.post("/cohere/v2/chat", **{"messages": MESSAGES, **body})


def masked(text: str) -> str:
    return re.sub(r"chatcmpl-[0-9a-f]+", "ID", text)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which ends as Cohere's do."""
    *data, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(each) for each in data]


async def test_scores_are_those_of_the_same_chat(app):
    field = {"hops": 1, "target": {"text": "4821"}}
    answer = (await ask(app, flashtrace=field)).json()
    chat = (await app.chat(messages=MESSAGES, flashtrace=field)).json()
    assert answer["flashtrace"]["status"] == "completed"
    assert answer["flashtrace"]["scores"] == chat["choices"][0]["flashtrace"]["scores"]


async def test_nothing_else_changes(app):
    plain = json.loads(masked((await ask(app)).text))
    traced = json.loads(masked((await ask(app, flashtrace=True)).text))
    assert traced.pop("flashtrace")["status"] == "completed"
    assert traced == plain


@pytest.mark.parametrize("value", [None, False])
async def test_null_and_false_mean_no_trace(app, value):
    assert "flashtrace" not in (await ask(app, flashtrace=value)).text
    assert not app.engine.traces


async def test_a_stream_has_it_in_its_last_event(app):
    plain = masked((await ask(app, stream=True)).text)
    traced = events(masked((await ask(app, stream=True, flashtrace=True)).text))
    assert traced[-1]["type"] == "message-end"
    assert traced[-1].pop("flashtrace")["status"] == "completed"
    assert traced == events(plain)


async def test_a_large_attribution_arrives_whole(app):
    body = {"messages": [{"role": "user", "content": "word " * 1800}], "flashtrace": ALL}
    whole = (await ask(app, **body)).json()["flashtrace"]
    assert len(json.dumps(whole)) > 128 << 10 and len(whole["scores"]) == whole["prompt_tokens"]
    streamed = events((await ask(app, **body, stream=True)).text)[-1]["flashtrace"]
    assert streamed["scores"] == whole["scores"]


async def test_a_bad_field_is_refused_in_the_form_of_the_route(app):
    response = await ask(app, flashtrace={"hops": -1})
    assert response.status_code == 400
    assert "flashtrace.hops" in response.json()["message"]


async def test_cohere_client_reads_the_attribution_and_the_citations(app):
    await scored(app, paris=1.0)
    client = cohere_client(app)
    answer = await client.chat(
        model="m",
        messages=MESSAGES,
        request_options={"additional_body_parameters": {"flashtrace": FIELD}},
    )
    assert answer.message.content[0].text == ANSWER
    assert [each.text for each in answer.message.citations] == PARTS
    for citation in answer.message.citations:
        assert isinstance(citation, cohere.Citation)
        assert citation.type == "TEXT_CONTENT" and citation.content_index == 0
        assert ANSWER[citation.start : citation.end] == citation.text
        [source] = citation.sources
        assert source.type == "document" and source.id == source.document["id"] == "p"
    assert Attribution.from_response(answer).text == ANSWER


async def test_cohere_client_gets_the_same_citations_from_a_stream(app):
    await scored(app, paris=1.0)
    whole = (await ask(app, flashtrace=FIELD)).json()["message"]["citations"]
    client = cohere_client(app)
    stream = client.chat_stream(
        model="m",
        messages=MESSAGES,
        request_options={"additional_body_parameters": {"flashtrace": FIELD}},
    )
    seen = [event async for event in stream]
    cited = [event for event in seen if event.type == "citation-start"]
    assert [event.index for event in cited] == list(range(len(PARTS)))
    found = [event.delta.message.citations.dict(exclude_none=True) for event in cited]
    assert json.loads(json.dumps(found)) == whole
    assert [event.index for event in seen if event.type == "citation-end"] == [0, 1]
    assert seen[-1].type == "message-end"
    assert seen[-1].flashtrace["status"] == "completed"


async def test_documents_are_sources(app):
    train = {"id": "t", "data": {"title": "Train", "text": "It is red."}}
    answer = await ask(app, documents=["The ferry is blue.", train], flashtrace=AUTO)
    sources = answer.json()["flashtrace"]["sources"]
    assert [(each["id"], each.get("title")) for each in sources] == [
        ("doc_0", None),
        ("t", "Train"),
    ]
    assert all(each["tokens"] for each in sources)


async def test_a_document_that_the_template_drops_is_refused(app):
    dropped = {"data": {"snippet": "The ferry is blue."}}
    answer = await ask(app, documents=[dropped], flashtrace=AUTO)
    assert answer.status_code == 400
    assert 'does not write the text of "doc_0"' in answer.json()["message"]
    assert (await ask(app, documents=[dropped])).status_code == 200


async def test_a_tools_result_is_a_source(app):
    call = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "The code is 4821."},
    ]
    answer = (await ask(app, messages=turns, flashtrace=AUTO)).json()
    [source] = answer["flashtrace"]["sources"]
    assert (source["id"], source["kind"]) == ("call-1", "tool")
