"""Citations of an answer in the forms that clients read.

The attribution's own ``citations`` (:class:`vllm_flashtrace.api.response.Citation`) are written as
OpenAI's annotations, Anthropic's citations of text blocks, or Cohere's citations. Each form names
a source by what it has for that: a URL, an index or an id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from openai.types.responses.response_output_text import (
    AnnotationFileCitation,
    AnnotationURLCitation,
)
from vllm.entrypoints.anthropic import protocol
from vllm.entrypoints.openai.chat_completion.protocol import ChatMessage

Citations = Sequence[Mapping[str, Any]]
"""The ``citations`` of an attribution object."""


class CitedMessage(ChatMessage):
    """vLLM's message of a chat completion with citations."""

    annotations: list[dict[str, Any]] | None = None


class CitedBlock(protocol.AnthropicContentBlock):
    """vLLM's content block of Anthropic's form with citations."""

    citations: list[dict[str, Any]] | None = None


CitedBlock.model_rebuild(_types_namespace=vars(protocol))


def cited_message(message: ChatMessage, citations: Citations, form: str) -> CitedMessage:
    """A chat completion's message with its citations.

    Args:
        message: vLLM's message.
        citations: The citations.
        form: ``"auto"`` for OpenAI's annotations, ``"cohere"`` for Cohere's citations.
    """
    cited = CitedMessage.model_construct(**dict(message))
    for name, value in message_fields(citations, form).items():
        setattr(cited, name, value)
    return cited


def message_fields(citations: Citations, form: str) -> dict[str, Any]:
    """What a chat message, or the delta of a streamed one, has for its citations."""
    if form == "cohere":
        return {"citations": list(cohere_citations(citations))}
    return {"annotations": list(_url_citations(citations))}


def _url_citations(citations: Citations) -> Iterator[dict[str, Any]]:
    """OpenAI's annotations of a chat message, which name a source by a URL alone."""
    for citation, source in _each(citations):
        # A source without a URL is named by its id, as a URI of no known scheme.
        url = source.get("url") or f"source:{quote(source['id'], safe='')}"
        title = source.get("title") or source["id"]
        place = {"start_index": citation["start"], "end_index": citation["end"]}
        yield {"type": "url_citation", "url_citation": {**place, "title": title, "url": url}}


def response_annotations(citations: Citations) -> list[Any]:
    """OpenAI's annotations of a text in a response: by URL, or as a file where there is none."""
    return [
        AnnotationURLCitation(
            type="url_citation",
            start_index=citation["start"],
            end_index=citation["end"],
            title=source.get("title") or source["id"],
            url=source["url"],
        )
        if source.get("url")
        else AnnotationFileCitation(
            type="file_citation",
            file_id=source["id"],
            filename=source.get("title") or source["id"],
            index=citation["end"],
        )
        for citation, source in _each(citations)
    ]


def cited_blocks(text: str, citations: Citations) -> list[CitedBlock]:
    """The text of a message in Anthropic's form: a block of its own for each cited part."""
    blocks: list[CitedBlock] = []
    at = 0
    for citation in sorted(citations, key=lambda each: (each["start"], each["end"])):
        cited = list(anthropic_citations([citation]))
        start, end = max(at, citation["start"]), citation["end"]
        if start >= end and blocks:  # Within the part before.
            blocks[-1].citations = [*(blocks[-1].citations or ()), *cited]
            continue
        if at < start:
            blocks.append(CitedBlock(type="text", text=text[at:start]))
        blocks.append(CitedBlock(type="text", text=text[start:end], citations=cited))
        at = end
    if at < len(text) or not blocks:
        blocks.append(CitedBlock(type="text", text=text[at:]))
    return blocks


def anthropic_citations(citations: Citations) -> Iterator[dict[str, Any]]:
    """Anthropic's citations: places in a document, or blocks of a search result."""
    for _, source in _each(citations):
        named = {"cited_text": source["text"], "title": source.get("title")}
        if source["kind"] == "search_result":
            yield {
                "type": "search_result_location",
                **named,
                "search_result_index": source["number"],
                "source": source.get("url") or source["id"],
                "start_block_index": source["blocks"][0],
                "end_block_index": source["blocks"][1],
            }
            continue
        named["document_title"] = named.pop("title") or source["id"]
        yield {
            "type": "char_location",
            **named,
            "document_index": source["number"],
            "start_char_index": source["start"],
            "end_char_index": source["end"],
            "file_id": None,
        }


def cohere_citations(citations: Citations, content_index: int = 0) -> Iterator[dict[str, Any]]:
    """Citations of Cohere's chat, version 2.

    Args:
        citations: The citations.
        content_index: Number of the content block that holds the text.
    """
    for citation in citations:
        yield {
            "start": citation["start"],
            "end": citation["end"],
            "text": citation["text"],
            "type": "TEXT_CONTENT",
            "content_index": content_index,
            "sources": [_cohere_source(source) for source in citation["sources"]],
        }


def _cohere_source(source: Mapping[str, Any]) -> dict[str, Any]:
    if source["kind"] == "tool":
        return {"type": "tool", "id": source["id"], "tool_output": {"content": source["text"]}}
    document = {key: source[key] for key in ("id", "title", "url") if source.get(key)}
    return {
        "type": "document",
        "id": source["id"],
        "document": {**document, "snippet": source["text"]},
    }


def _each(citations: Citations) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for citation in citations:
        for source in citation["sources"]:
            yield citation, source
