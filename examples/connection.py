"""What the examples share: how they find their server, and what they say when it is not there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import openai

DEFAULT_URL = "http://127.0.0.1:8000"
SERVER = 'vllm-flashtrace serve "$(vllm-flashtrace demo --model-path)" --max-model-len 2048'
# Reads tool calls, with a chat template that writes them.
TOOL_SERVER = (
    f"{SERVER} \\\n    --chat-template examples/tool_calls.jinja --enable-auto-tool-choice "
    "--tool-call-parser hermes"
)


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


def run(main: Callable[[], None], *, tools: bool = False) -> None:
    """Runs an example; says which server it needs where there is none, or one that refuses.

    Args:
        main: The example.
        tools: Whether the server has to read tool calls.
    """
    needed = f"Start one with\n\n    {TOOL_SERVER if tools else SERVER}"
    try:
        main()
    except openai.APIConnectionError as error:
        url = error.request.url.copy_with(path="/")
        raise SystemExit(f"No server answers at {url}. {needed}") from None
    except openai.AuthenticationError:
        raise SystemExit("The server asks for a key: set OPENAI_API_KEY.") from None
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        reason = body.get("message", error.message)
        raise SystemExit(f"The server refuses the request: {reason}\n\n{needed}") from None
