"""``/v1/attributions``: attributes text that already exists, and gives out deferred attributions.

Everything about existing text is known here, so a mistake in the request is an HTTP 400 and never a
``failed`` object, unless the trace is deferred. A deferred attribution is reached by its id alone;
there is no list of them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from vllm_flashtrace.api.checks import RefusedError, check_messages, check_text, shown
from vllm_flashtrace.api.request import (
    FIELD,
    FlashTraceRequest,
    check_against_limit,
    refuse_citations,
)
from vllm_flashtrace.api.response import AttributionObject, DeletedAttribution
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.server.existing_text import (
    ExistingText,
    engine_options,
    existing_chat,
    existing_plain,
)
from vllm_flashtrace.server.http_errors import (
    OpenAIErrorRoute,
    as_http,
    error_response,
    not_found_response,
)
from vllm_flashtrace.server.large_objects import BYTES, JSON, as_response, carried
from vllm_flashtrace.server.session import Attribution, TraceService, check_sources, new_trace_id
from vllm_flashtrace.server.traced_handler import check_beside_images
from vllm_flashtrace.text.guard import require_messages

router = APIRouter(route_class=OpenAIErrorRoute)

TokenIds = Annotated[list[StrictInt], Field(min_length=1)]

_CLIENT_CLOSED_REQUEST = 499
_PROMPT_OPTIONS = ("add_special_tokens", "cache_salt", "priority")
_CHAT_OPTIONS = (
    "cache_salt",
    "chat_template_kwargs",
    "documents",
    "priority",
    "reasoning_effort",
    "tool_choice",
    "tools",
)


class AttributionBody(BaseModel):
    """Body of the route: a conversation, or a prompt and its completion.

    The options mean what they mean in vLLM's chat and completion requests.
    """

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=2)] | None = None
    prompt: Annotated[StrictStr, Field(min_length=1)] | TokenIds | None = None
    completion: Annotated[StrictStr, Field(min_length=1)] | TokenIds | None = None
    flashtrace: Any = True
    add_special_tokens: bool | None = None
    cache_salt: StrictStr | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    priority: StrictInt = 0
    reasoning_effort: StrictStr | None = None
    tool_choice: Any = None
    tools: list[dict[str, Any]] | None = None

    @field_validator("prompt", "completion", mode="before")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and value):
            return value
        if value and isinstance(value, list) and all(type(token) is int for token in value):
            return value
        raise RefusedError("must be a non-empty text or a non-empty list of token ids")

    def options(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The model and those options that were given.

        Raises:
            InvalidRequestError: An option was given that the other form of the body has.
        """
        given = {name: getattr(self, name) for name in sorted(self.model_fields_set)}
        other = {*_CHAT_OPTIONS, *_PROMPT_OPTIONS} - set(names)
        for name in sorted(other & given.keys()):
            if given[name] is not None:
                form = "messages" if name in _CHAT_OPTIONS else "prompt and completion"
                raise InvalidRequestError(name, f"{name} goes with {form} only")
        return {
            "model": self.model,
            **{name: given[name] for name in names if given.get(name) is not None},
        }


@router.post(
    "/v1/attributions",
    dependencies=[Depends(validate_json_request)],
    response_model=AttributionObject,
    responses={400: {"model": ErrorResponse}, 404: {"model": ErrorResponse}},
)
async def create_attribution(body: AttributionBody, raw_request: Request) -> Response:
    """Attributes ``body``'s completion to its prompt."""
    answer = await _answer(body, raw_request)
    # None: the client left while the answer was made, so nobody reads this one.
    return Response(status_code=_CLIENT_CLOSED_REQUEST) if answer is None else answer


@with_cancellation
async def _answer(body: AttributionBody, raw_request: Request) -> JSONResponse:
    state = raw_request.app.state
    try:
        outcome = await _attribute(state, body, raw_request)
    except InvalidRequestError as error:
        outcome = error_response(error)
    if isinstance(outcome, ErrorResponse):
        return as_http(outcome)
    return JSONResponse(carried(outcome))


@router.get(
    "/v1/attributions/{attribution_id}",
    response_model=AttributionObject,
    responses={404: {"model": ErrorResponse}},
)
async def get_attribution(attribution_id: str, raw_request: Request) -> Response:
    """The deferred attribution with this id, finished or not."""
    service: TraceService = raw_request.app.state.flashtrace
    attribution = await service.deferred.get(attribution_id)
    if attribution is None:
        return _unknown(attribution_id)
    return as_response(attribution, JSON)


@router.get(
    "/v1/attributions/{attribution_id}/attention",
    response_class=Response,
    responses={
        200: {
            "description": "A safetensors file, see AttentionSums.",
            "content": {BYTES: {"schema": {"type": "string", "format": "binary"}}},
        },
        404: {"model": ErrorResponse},
    },
)
async def get_attention(attribution_id: str, raw_request: Request) -> Response:
    """The sums of attention of the deferred attribution with this id, once it is completed."""
    service: TraceService = raw_request.app.state.flashtrace
    stored = await service.deferred.get_with_file(attribution_id)
    if stored is None:
        return _unknown(attribution_id)
    attribution, file = stored
    if file is None:
        status = json.loads(attribution)["status"]
        message = f"attribution {attribution_id} has no sums of attention: it is {status}"
        if status == "completed":
            message += ", and its request has no include 'attention'"
        return as_http(not_found_response(message, "attribution_id"))
    return as_response(file, BYTES)


@router.delete(
    "/v1/attributions/{attribution_id}",
    response_model=DeletedAttribution,
    responses={404: {"model": ErrorResponse}},
)
async def delete_attribution(attribution_id: str, raw_request: Request) -> Response:
    """Drops the deferred attribution with this id, and stops its trace."""
    service: TraceService = raw_request.app.state.flashtrace
    if not await service.deferred.delete(attribution_id):
        return _unknown(attribution_id)
    deleted = {
        "id": attribution_id,
        "object": "flashtrace.attribution.deleted",
        "deleted": True,
    }
    return JSONResponse(deleted)


def _unknown(attribution_id: str) -> JSONResponse:
    message = f"no attribution {shown(attribution_id)}: it is unknown, deleted or expired"
    return as_http(not_found_response(message, "attribution_id"))


# Failures that the text itself explains, with the field at fault: after a generation they could
# not be foreseen, here they are the client's mistake.
_FIELD_AT_FAULT = {
    "argument_not_found": "flashtrace.target.argument",
    "assistant_not_located": "flashtrace.recurse_over",
    "empty_target": "flashtrace.target",
    "reasoning_not_found": "flashtrace.reasoning",
    "regex_timeout": "flashtrace.target.regex",
    "source_not_found": "flashtrace.sources",
    "sources_overlap": "flashtrace.sources",
    "span_out_of_range": FIELD,
    "target_beyond_context": "flashtrace.target",
    "target_not_found": "flashtrace.target",
    "too_many_attention_sums": "flashtrace.include",
    "too_many_layer_scores": "flashtrace.include",
    "too_many_targets": "flashtrace.targets",
    "unsupported_input": "messages",
    "tool_call_not_found": "flashtrace.target.tool_call",
}


async def _attribute(
    state: Any, body: AttributionBody, raw_request: Request
) -> Attribution | ErrorResponse:
    service: TraceService = state.flashtrace
    for name in sorted(body.model_fields_set - {FIELD}):
        value = getattr(body, name)
        # Token ids are whole numbers by now, and 128k of them would take a third of a second.
        if name not in ("prompt", "completion") or isinstance(value, str):
            check_text(value, name)
    check_messages(body.messages or (), "messages")
    flashtrace = service.parse_field(True if body.flashtrace is None else body.flashtrace)
    if flashtrace is None:
        raise InvalidRequestError(FIELD, f"{FIELD} must be true or an object, got false")
    refuse_citations(flashtrace, "/v1/attributions", forms=True)
    text = await _existing_text(state, body, raw_request)
    if isinstance(text, ErrorResponse):
        return text
    check_beside_images(flashtrace, text.context.images)
    if flashtrace.guard is not None:
        require_messages(text.completion)
    await _check(text, flashtrace, state.vllm_config.model_config.max_model_len)
    result = await service.attribute(
        flashtrace,
        text.completion,
        text.context,
        reasoning_parser=text.reasoning_parser,
        render=text.render,
        trace_id=new_trace_id(),
        route="/v1/attributions",
    )
    error = result.get("error") or {}
    code = error.get("code")
    if code in _FIELD_AT_FAULT:
        raise InvalidRequestError(_FIELD_AT_FAULT[code], error["message"], code=code)
    return result


async def _existing_text(
    state: Any, body: AttributionBody, raw_request: Request
) -> ExistingText | ErrorResponse:
    if body.messages is not None:
        for name in ("prompt", "completion"):
            if getattr(body, name) is not None:
                raise InvalidRequestError(name, f"{name} cannot be combined with messages")
        handler = _handler(state.openai_serving_chat)
        options = body.options(_CHAT_OPTIONS)
        engine = await engine_options(handler, body, raw_request)
        return await existing_chat(handler, body.messages, options, engine)
    if body.prompt is None or body.completion is None:
        missing = "prompt" if body.prompt is None else "completion"
        raise InvalidRequestError(
            missing, f"{missing} is missing: give messages, or prompt and completion"
        )
    handler = _handler(state.openai_serving_completion)
    options = body.options(_PROMPT_OPTIONS)
    engine = await engine_options(handler, body, raw_request)
    return await existing_plain(handler, body.prompt, body.completion, options, engine)


def _handler(handler: Any) -> Any:
    if handler is None:
        raise NotImplementedError("the served model does not generate text")
    return handler


async def _check(text: ExistingText, flashtrace: FlashTraceRequest, max_model_len: int) -> None:
    """Refuses what the text makes impossible.

    Raises:
        InvalidRequestError: Too long for the model, a span beyond the text, or a source that is
            not in it.
    """
    length = len(text.completion.token_ids)
    if length > max_model_len:
        raise InvalidRequestError(
            "completion" if text.completion.messages is None else "messages",
            f"prompt and completion have {length} tokens together; the model's context has "
            f"{max_model_len}",
        )
    check_against_limit(flashtrace, len(text.completion.generated_token_ids))
    await check_sources(flashtrace, text.completion, text.render)
