"""The ``flashtrace`` field on routes whose request model drops keys it does not know.

Invariant: on a route that cannot serve the field it is an HTTP 400, never ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.server.openai import error_response
from vllm_flashtrace.server.service import FIELD, refuse_reserved_xargs


async def field_as_sent(request: Any, raw_request: Any) -> Any:
    """The value of the field in an HTTP request's body; None where it has none.

    Args:
        request: vLLM's request model.
        raw_request: The HTTP request, whose body has been parsed already; None outside HTTP.
    """
    if request.model_extra is not None:
        return request.model_extra.get(FIELD)
    if raw_request is None:
        return None
    body = await raw_request.json()
    return body.get(FIELD) if isinstance(body, dict) else None


def refusing(handler: Any, method: str, route: str) -> Any:
    """A copy of ``handler`` whose ``method`` refuses the ``flashtrace`` field.

    Args:
        handler: Handler of a route that cannot be traced.
        method: Its method ``(request, raw_request)``.
        route: The route, as the message names it.
    """
    stock: Callable[..., Awaitable[Any]] = getattr(handler, method)

    async def guarded(request: Any, raw_request: Any = None) -> Any:
        try:
            refuse_reserved_xargs(request)
            value = await field_as_sent(request, raw_request)
            if value is not None and value is not False:
                raise InvalidRequestError(FIELD, f"flashtrace is not available on {route}")
        except InvalidRequestError as error:
            return error_response(error)
        return await stock(request, raw_request)

    guarded_handler = copy.copy(handler)
    setattr(guarded_handler, method, guarded)
    return guarded_handler
