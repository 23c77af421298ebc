"""What the log says of a lost trace, and what it keeps to itself."""

from __future__ import annotations

import logging

import pytest

from vllm_flashtrace.base import logs

KNOWN = {"status": "failed", "code": "recording_failed", "message": "RuntimeError: boom"}


@pytest.fixture
def lines(monkeypatch):
    """The lines logged; vLLM's logger does not propagate, so a handler is put on ours."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keep()
    monkeypatch.setattr(logs, "_seen", set())
    before = logs.logger.level
    logs.logger.addHandler(handler)
    logs.logger.setLevel(logging.DEBUG)
    yield records
    logs.logger.removeHandler(handler)
    logs.logger.setLevel(before)


def test_a_lost_trace_is_one_line_with_all_that_identifies_it(lines):
    logs.log_lost_trace("ft-1", **KNOWN, request_id="chatcmpl-7", route="/v1/messages", hop=2)
    [record] = lines
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "Trace ft-1 failed: request=chatcmpl-7 route=/v1/messages code=recording_failed hop=2 "
        'cause="RuntimeError: boom"'
    )


def test_what_is_not_known_is_a_dash(lines):
    logs.log_lost_trace("ft-1", **KNOWN)
    assert "request=- route=- code=recording_failed hop=- " in lines[0].getMessage()


def test_a_cause_with_a_line_break_stays_one_line(lines):
    logs.log_lost_trace("ft-1", **{**KNOWN, "message": "first\nsecond"})
    assert "\n" not in lines[0].getMessage()


@pytest.mark.parametrize("code", ["target_not_found", "internal_error", "a_code_of_tomorrow"])
def test_a_message_that_may_quote_text_is_not_logged(lines, code):
    logs.log_lost_trace("ft-1", status="failed", code=code, message="the text 'my secret' ...")
    assert "secret" not in lines[0].getMessage()
    assert code in lines[0].getMessage()


def test_a_client_that_leaves_is_no_warning(lines):
    logs.log_lost_trace("ft-1", status="cancelled", code="cancelled", message="left")
    assert lines[0].levelno == logging.INFO


def test_an_unexpected_error_has_its_traceback_once_for_each_place(lines):
    def fail(key: str) -> Exception:
        try:
            {}[key]
        except KeyError as error:
            return error
        raise AssertionError

    for key in ("a", "b"):
        logs.log_unexpected("a test", fail(key))
    logs.log_unexpected("a test", ValueError("elsewhere"))
    assert [record.exc_info is not None for record in lines] == [True, True]
    assert [record.exc_info[0] for record in lines] == [KeyError, ValueError]


def test_the_logger_is_below_vllms():
    assert logs.logger.name.startswith("vllm.")
