"""What is checked of a request before anything is generated, and where."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Document
from vllm_flashtrace.server.session import RequestFacts

MESSAGES = [{"role": "user", "content": "Where does the train go?"}]
DOCUMENT = Document("timetable", "The train goes to Porto.", "document")


def check(written: str) -> list[threading.Thread]:
    """Checks the documents of a chat whose prompt is ``written``; the threads that rendered it."""
    threads = []

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        threads.append(threading.current_thread())
        return written

    field = parse_flashtrace_field({"sources": "auto"}, RequestLimits())
    assert field is not None
    facts = RequestFacts(field, 1, messages=MESSAGES, render=render, documents=[DOCUMENT])
    asyncio.run(facts.check_sources())
    return threads


def test_documents_are_looked_for_off_the_event_loop():
    [thread] = check(f"{DOCUMENT.text}\nWhere does the train go?")
    assert thread is not threading.main_thread()


def test_a_document_that_the_template_drops_is_refused():
    with pytest.raises(InvalidRequestError, match="does not write the text of"):
        check("Where does the train go?")
