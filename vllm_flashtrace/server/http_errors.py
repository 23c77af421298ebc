"""How a client's mistake is answered (OpenAI's error body, one sentence) and logged (at INFO)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError

from vllm_flashtrace.api.checks import RefusedError, as_unicode, shortened, shown
from vllm_flashtrace.base.errors import InvalidRequestError


def error_response(error: InvalidRequestError) -> Any:
    """OpenAI's error body with status 400 for a refused request."""
    return create_error_response(error.message, param=error.param)


def not_found_response(message: str, param: str) -> Any:
    """OpenAI's error body with status 404."""
    return create_error_response(
        message, err_type="NotFoundError", status_code=HTTPStatus.NOT_FOUND, param=param
    )


def as_http(error: ErrorResponse) -> JSONResponse:
    """An error body as the answer of a route."""
    return JSONResponse(error.model_dump(), status_code=error.error.code)


class OpenAIErrorRoute(APIRoute):
    """A route that refuses a body it cannot read or validate with HTTP 400 and one sentence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler, with its refusals in our words."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                refusal = _invalid_body(error.errors(), request)
            except HTTPException as error:
                if error.status_code != HTTPStatus.BAD_REQUEST:
                    raise
                refusal = InvalidRequestError("body", f"body: {error.detail}")
            return as_http(error_response(refusal))

        return answer


# What a field must be, by the type of pydantic's error.
_PHRASES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "extra_forbidden": "is not a known field",
    "int_type": "must be an integer",
    "list_type": "must be a list",
    "model_attributes_type": "must be an object",
    "string_type": "must be a string",
}
# Pydantic's names of the branches of a union, where they end a path.
_BRANCHES = {"bool", "bytes", "dict", "float", "int", "list", "none", "str", "tuple"}


def field_path(location: Iterable[int | str]) -> str:
    """The path of a field in the request body, without pydantic's names for branches of a union.

    >>> field_path(("messages", 0, "ChatCompletionToolMessageParam", "role"))
    'messages.0.role'
    """
    parts = [
        shortened(as_unicode(str(part)))
        for part in location
        if isinstance(part, int) or (part == part.lower() and "[" not in part)
    ]
    while parts and parts[-1] in _BRANCHES:
        parts.pop()
    return ".".join(parts) or "body"


def refused_field(error: Mapping[str, Any], param: str) -> InvalidRequestError:
    """One of pydantic's errors as a sentence that names the field and its value.

    Args:
        error: One entry of ``ValidationError.errors()``.
        param: Path of the field in the request body.
    """
    kind, context = error["type"], error.get("ctx", {})
    refused = context.get("error")
    if kind == "missing":
        return InvalidRequestError(param, f"{param} is missing")
    if isinstance(refused, RefusedError):
        phrase = str(refused)
    elif kind == "too_short":
        phrase = f"must have at least {context['min_length']} entries"
    else:
        phrase = _PHRASES.get(kind) or f"is not valid ({error['msg']})"
    return InvalidRequestError(param, f"{param} {phrase}, got {shown(error['input'])}")


def _invalid_body(errors: Any, request: Request) -> InvalidRequestError:
    first = errors[0]
    if not isinstance(first, Mapping):  # vLLM's check of the media type.
        kind = request.headers.get("content-type")
        return InvalidRequestError(
            "body", f"body must be sent as application/json, got {shown(kind)}"
        )
    path = first["loc"][1:]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {path[0]}"
        return InvalidRequestError("body", f"body is not JSON: {reason}")
    # What an unknown field is called is the client's own word.
    unknown = first["type"] == "extra_forbidden"
    name = shortened(as_unicode(str(path[-1]))) if unknown else field_path(path)
    return refused_field(first, name)


class _ClientMistakes(logging.Filter):
    """Turns vLLM's warnings and errors about a client's mistake into lines at level INFO."""

    _MESSAGES = ("Error with model", "Chat template rejected the request")

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record of a client's mistake; False where INFO is not logged."""
        error = record.exc_info[1] if record.exc_info else None
        if not (
            isinstance(error, VLLMClientError)
            or (error is None and str(record.msg).startswith(self._MESSAGES))
        ):
            return True
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        return logging.getLogger(record.name).isEnabledFor(logging.INFO)


_client_mistakes = _ClientMistakes()
# In vLLM 0.32.0 these log a request's own fault as their own: an unknown model, messages that the
# chat template refuses, and on /v1/messages, with a traceback, everything that is answered by 400.
_LOGGERS = (
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.openai.chat_completion.batch_serving",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.renderers.hf",
)


def log_client_mistakes_as_info() -> None:
    """Lets no mistake of a client stand in the log as a warning or an error of the server."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_client_mistakes)
