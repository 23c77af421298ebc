"""Errors that a client or the user of a command is told about, and how one is put in a line.

Every refusal or failure of a trace carries a stable code and a sentence that names the offending
field and value.
"""

from __future__ import annotations

from typing import Any


class FlashTraceError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        code: Stable identifier, e.g. ``"target_not_found"``.
        message: One sentence for a person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def to_dict(self) -> dict[str, Any]:
        """The ``error`` object of an attribution with status ``failed`` or ``skipped``."""
        return {"code": self.code, "message": self.message}


class TraceError(FlashTraceError):
    """One trace cannot be completed; the completion it explains is unaffected."""


class InvalidRequestError(FlashTraceError):
    """A ``flashtrace`` field that is refused before anything is generated (HTTP 400).

    Attributes:
        param: Dotted path of the offending field, e.g. ``"flashtrace.hops"``.
    """

    def __init__(self, param: str, message: str, code: str = "invalid_flashtrace") -> None:
        super().__init__(code, message)
        self.param = param


class UnsupportedModelError(FlashTraceError):
    """The served model cannot be traced exactly; the message names the feature in the way."""

    def __init__(self, message: str) -> None:
        super().__init__("unsupported_model", message)


class CommandError(Exception):
    """A mistake or a failure that one line explains."""


def in_one_line(error: BaseException) -> str:
    """The message of any exception as one line; of a pydantic error only what it complains of."""
    details = getattr(error, "errors", None)
    if isinstance(error, ValueError) and callable(details):
        messages = [str(each["msg"]).removeprefix("Value error, ") for each in details()]
        return " ".join("; ".join(messages).split())
    return " ".join(str(error).split()) or type(error).__name__
