"""Where the examples find their server: ``--base-url``, ``FLASHTRACE_BASE_URL`` or port 8000."""

from __future__ import annotations

import argparse
import os
from typing import Any

import openai

DEFAULT_URL = "http://127.0.0.1:8000"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows ``--base-url`` and ``--model``."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    url = os.environ.get("FLASHTRACE_BASE_URL", DEFAULT_URL)
    parser.add_argument("--base-url", default=url, help="without /v1 (default: %(default)s)")
    parser.add_argument("--model", help="default: the first one served")
    return parser


def connect(options: argparse.Namespace) -> tuple[openai.OpenAI, str]:
    """A client (its key is ``OPENAI_API_KEY``, if the server asks for one) and the model's name."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=f"{options.base_url}/v1", api_key=key)
    return client, options.model or client.models.list().data[0].id


def attribute(client: openai.OpenAI, body: dict[str, Any]) -> dict[str, Any]:
    """The ``flashtrace`` object of ``POST /v1/attributions``.

    Raises:
        openai.APIStatusError: The server refuses the body.
    """
    answer: dict[str, Any] = client.post("/attributions", body=body, cast_to=dict[str, Any])
    return answer
