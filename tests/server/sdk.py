"""The vendors' own clients, talking to an application in this process."""

from __future__ import annotations

import anthropic
import cohere
import httpx
import httpx2
import openai

from tests.server.scripted_app import App


def openai_client(app: App) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=_transport(app)
    )


def anthropic_client(app: App) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url="http://test", api_key="none", max_retries=0, http_client=_transport(app)
    )


def cohere_client(app: App) -> cohere.AsyncClientV2:
    transport = httpx.ASGITransport(app=app.app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport)
    return cohere.AsyncClientV2("none", base_url="http://test/cohere", httpx_client=client)


def _transport(app: App) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=app.app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://test")
