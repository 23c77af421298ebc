"""What became of a row, in the form of OpenAI's batch files.

Invariant: a row is in the output file or in the error file, never in both: it is an error where
there is no completion (or, for existing text, no attribution) to show for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

_OK = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row.

    Attributes:
        custom_id: The row's id.
        source: Name of its file.
        line: Its line or record there, from 1.
        status_code: HTTP status of the answer; None where none was asked for.
        body: The answer; None likewise.
        error: ``{"code", "message"}`` of a row that failed.
    """

    custom_id: str
    source: str
    line: int
    status_code: int | None = None
    body: Mapping[str, Any] | None = None
    error: Mapping[str, str] | None = None

    @classmethod
    def answered(
        cls, custom_id: str, source: str, line: int, status_code: int, body: Mapping[str, Any]
    ) -> Outcome:
        """The outcome of a row that a route answered."""
        error = None if status_code == _OK else _error_of(status_code, body)
        return cls(custom_id, source, line, status_code, body, error)

    def to_json(self) -> str:
        """One line that :meth:`from_json` reads; ASCII only."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_json(cls, text: str | bytes) -> Outcome:
        """Reads what :meth:`to_json` wrote."""
        return cls(**json.loads(text))

    def to_batch_record(self, run: str) -> dict[str, Any]:
        """The row of OpenAI's batch output.

        Args:
            run: Fingerprint of the run, part of the record's id.
        """
        digest = sha256(f"{run}\n{self.source}\n{self.line}".encode()).hexdigest()
        response = None
        if self.status_code is not None:
            request_id = (self.body or {}).get("id") or f"req_{digest[:24]}"
            response = {
                "status_code": self.status_code,
                "request_id": request_id,
                "body": self.body,
            }
        return {
            "id": f"batch_req_{digest[:24]}",
            "custom_id": self.custom_id,
            "response": response,
            "error": None if self.error is None else dict(self.error),
        }


def _error_of(status_code: int, body: Mapping[str, Any]) -> dict[str, str]:
    error = body.get("error")
    details = error if isinstance(error, Mapping) else {}
    message = str(details.get("message") or f"the engine answered with status {status_code}")
    if (param := details.get("param")) and str(param) not in message:
        message = f"{param}: {message}"
    code = details.get("type") or details.get("code") or status_code
    return {"code": str(code), "message": message}
