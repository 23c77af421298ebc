"""How our routes answer a body that the web framework cannot read.

Invariant: every refusal of our routes has OpenAI's error body, also those made before the route.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.server.openai import error_response


class OpenAIErrorRoute(APIRoute):
    """A route whose unreadable bodies are refused with HTTP 400 and OpenAI's error body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler, with its bare HTTP 400 in our words."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                if error.status_code != 400:
                    raise
                refusal = error_response(InvalidRequestError("body", f"body: {error.detail}"))
                return JSONResponse(refusal.model_dump(), status_code=400)

        return answer
