"""One answer with its citations, in the forms of OpenAI's, Anthropic's and Cohere's clients.

What one sees: the answer, and for each client the sources of its sentences as that client reads
them. The model is not asked to cite anything. Needs the packages ``openai``, ``anthropic`` and
``cohere``; the last of the four forms needs a server that was started with
``VLLM_ENABLE_COHERE_API=1``.

    python examples/citations.py [--base-url URL]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from connection import arguments, connect, run

DOCUMENTS = {
    "Lighthouse": "The Eierland lighthouse on Texel was built in 1864. Its tower has 153 steps.",
    "Ferry": "The ferry to Texel leaves Den Helder every hour. Bicycles travel free of charge.",
    "Museum": "The maritime museum in Oudeschild shows a submarine. On Mondays it is closed.",
}
QUESTION = (
    "Answer in exactly four short sentences, one for each question. When was the lighthouse built? "
    "How many steps does its tower have? How often does the ferry leave? On which day is the "
    "museum closed?"
)
PROMPT = "\n\n".join(f"[{title}]\n{text}" for title, text in DOCUMENTS.items()) + f"\n\n{QUESTION}"
SOURCES = [{"id": title, "title": title, "text": text} for title, text in DOCUMENTS.items()]
FIELD = {"citations": True, "sources": SOURCES}


def show(form: str, cited: Iterable[tuple[str, str]]) -> None:
    """Prints what is cited, and with what."""
    print(f"\n{form}")
    for text, source in cited:
        print(f"  {text!r} <- {source}")


def chat_completion(options: argparse.Namespace) -> None:
    """OpenAI's chat completions: ``annotations`` of the message."""
    client, model = connect(options)
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=200,
        temperature=0,
        extra_body={"flashtrace": FIELD},
    )
    message = answer.choices[0].message
    print(message.content)
    cited = [each.url_citation for each in message.annotations]
    show(
        "POST /v1/chat/completions, message.annotations",
        [(message.content[each.start_index : each.end_index], each.url) for each in cited],
    )


def response(options: argparse.Namespace) -> None:
    """OpenAI's responses: ``annotations`` of the text, a file where a source has no URL."""
    client, model = connect(options)
    answer = client.responses.create(
        model=model,
        input=PROMPT,
        max_output_tokens=200,
        temperature=0,
        extra_body={"flashtrace": FIELD},
    )
    annotations = [
        each for item in answer.output for part in item.content for each in part.annotations
    ]
    show(
        "POST /v1/responses, annotations of the output_text",
        [(f"…{answer.output_text[: each.index][-24:]}", each.filename) for each in annotations],
    )


def anthropic_message(options: argparse.Namespace) -> None:
    """Anthropic's messages: the documents are blocks, and text blocks cite places in them."""
    import anthropic

    blocks = [
        {
            "type": "document",
            "title": title,
            "source": {"type": "text", "media_type": "text/plain", "data": text},
        }
        for title, text in DOCUMENTS.items()
    ]
    content = [*blocks, {"type": "text", "text": QUESTION}]
    client = anthropic.Anthropic(base_url=options.base_url, api_key="none")
    _, model = connect(options)
    message = client.messages.create(
        model=model,
        max_tokens=200,
        messages=[{"role": "user", "content": content}],
        extra_body={"flashtrace": {"citations": True}, "temperature": 0},
    )
    show(
        "POST /v1/messages, citations of the text blocks",
        [
            (block.text, f"{each.document_title}: {each.cited_text!r}")
            for block in message.content
            for each in block.citations or ()
        ],
    )


def cohere_chat(options: argparse.Namespace) -> None:
    """Cohere's chat: ``citations`` of the message."""
    import cohere

    client = cohere.ClientV2("none", base_url=f"{options.base_url}/cohere")
    _, model = connect(options)
    answer = client.chat(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=200,
        temperature=0,
        request_options={"additional_body_parameters": {"flashtrace": FIELD}},
    )
    show(
        "POST /cohere/v2/chat, message.citations",
        [
            (each.text, f"{source.id}: {source.document['snippet']!r}")
            for each in answer.message.citations
            for source in each.sources
        ],
    )


def main() -> None:
    """Asks in all four forms."""
    options = arguments(__doc__).parse_args()
    chat_completion(options)
    response(options)
    anthropic_message(options)
    cohere_chat(options)


if __name__ == "__main__":
    run(main)
