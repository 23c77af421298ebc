"""The package's logger, and what is logged about traces: one line for each that has no result.

A line holds ids, codes and numbers, never text of a prompt or a completion.
"""

from __future__ import annotations

import json
import logging
from typing import Any

# A child of vLLM's own logger, so that its handlers, level and format apply.
LOGGER_NAME = "vllm.flashtrace"
logger = logging.getLogger(LOGGER_NAME)

# Errors whose message is made of numbers and names of ours. Other messages may quote the request or
# the completion; the client reads those in its response.
_LOGGED_MESSAGES = frozenset(
    {
        "aborted",
        "bad_scores",
        "cancelled",
        "empty_completion",
        "engine_dead",
        "forged_spec",
        "mass_imbalance",
        "no_layer_scores",
        "nothing_generated",
        "overloaded",
        "recording_failed",
        "recording_gap",
        "recording_incomplete",
        "result_missing",
        "span_out_of_range",
        "target_beyond_context",
        "timeout",
        "unsupported_input",
        "unsupported_model",
        "weights_changed",
    }
)
# What was asked for is not there. The client reads so in its response; the server is in order.
CLIENT_CODES = frozenset(
    {
        "argument_not_found",
        "assistant_not_located",
        "empty_completion",
        "empty_target",
        "nothing_generated",
        "reasoning_not_found",
        "regex_timeout",
        "source_not_found",
        "sources_overlap",
        "span_out_of_range",
        "target_beyond_context",
        "target_not_found",
        "too_many_attention_sums",
        "too_many_layer_scores",
        "too_many_targets",
        "tool_call_not_found",
        "unsupported_input",
    }
)
_LONGEST_ID = 128  # Clients may choose it.
_seen: set[tuple[str, str, int]] = set()


def log_lost_trace(
    trace_id: str,
    *,
    status: str,
    code: str,
    message: str,
    request_id: str | None = None,
    route: str | None = None,
    hop: int | None = None,
) -> None:
    """Logs the one line of a trace that has no result: a warning, unless its client explains it.

    Args:
        trace_id: Public id of the attribution.
        status: ``failed``, ``skipped`` or ``cancelled``.
        code: Error code.
        message: The error's sentence; logged only where it cannot quote any text.
        request_id: vLLM's id of the completion, if there was one.
        route: Route of the HTTP request.
        hop: The hop that was running, if any was.
    """
    cause = message if code in _LOGGED_MESSAGES else "see the response"
    calm = status == "cancelled" or code in CLIENT_CODES
    logger.log(
        logging.INFO if calm else logging.WARNING,
        "Trace %s %s: request=%s route=%s code=%s hop=%s cause=%s",
        trace_id,
        status,
        (request_id or "-")[:_LONGEST_ID],
        route or "-",
        code,
        "-" if hop is None else hop,
        json.dumps(cause),
    )


def log_unexpected(what: str, error: BaseException) -> None:
    """Logs the traceback of an error that nobody foresaw, once for each place it comes from."""
    place = _place(error)
    if place not in _seen:
        _seen.add(place)
        logger.error("Unexpected error in %s (logged once)", what, exc_info=error)


def _place(error: BaseException) -> tuple[str, str, int]:
    frame: Any = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return type(error).__name__, "", 0
    return type(error).__name__, frame.tb_frame.f_code.co_filename, frame.tb_lineno
