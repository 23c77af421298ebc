"""Errors that a client or the command line is told about, each with a stable code.

Errors that a client is told about, each with a stable machine-readable code.

Invariant: every refusal or failure of a trace carries a code from this module's vocabulary and
a sentence that names the offending field and value.

What the command line reports in one line.
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
