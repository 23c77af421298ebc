"""What became of a row, in the form of OpenAI's batch files, and as a table.

What became of a row, in the form of OpenAI's batch files.

Invariant: a row is in the output file or in the error file, never in both: it is an error where
there is no completion (or, for existing text, no attribution) to show for it.

The results as a table: one row for each choice of a completion, each attribution, each error.

Invariant: the schema is fixed and every column describes itself (field metadata ``description``);
the lists that belong to scores have one length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

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


_HOP_MASSES = ("input_mass", "reasoning_mass", "target_mass", "skipped_mass")
_MASSES = ("input_mass", "remaining_mass", "target_mass", "skipped_mass")


def result_schema() -> pa.Schema:
    """The columns, their types and what they mean."""
    import pyarrow as pa

    ints, text = pa.list_(pa.int32()), pa.string()
    hop = pa.struct([("hop", pa.int32()), *((name, pa.float64()) for name in _HOP_MASSES)])
    columns: list[tuple[str, pa.DataType, str]] = [
        ("custom_id", text, "The row's id: its own, else file:line."),
        ("source", text, "Name of the input file."),
        ("line", pa.int64(), "Line (JSONL) or record (Parquet) in it, from 1."),
        ("choice", pa.int32(), "Index of the choice; null in an error row."),
        ("status", text, "completed, failed or skipped (attribution); untraced; error."),
        ("text", text, "The completion."),
        ("finish_reason", text, "Why it ended."),
        ("target", text, "The explained part of it."),
        ("prompt_tokens", pa.int64(), "Tokens of the rendered prompt."),
        ("completion_tokens", pa.int64(), "Tokens generated, over all choices."),
        ("indices", ints, "Position of each scored token in the rendered prompt."),
        ("scores", pa.list_(pa.float32()), "Its score. All prompt tokens where top_k is null."),
        ("token_ids", ints, "Its token id."),
        ("tokens", pa.list_(text), "Its text."),
        ("message", ints, "Message that it lies in; null for tokens of the template."),
        ("start", ints, "First character within that message."),
        ("end", ints, "One past the last character."),
        *((name, pa.float64(), f"The attribution's {name}.") for name in _MASSES),
        ("hops", pa.list_(hop), "Mass by hop."),
        ("trace_id", text, "Id of the attribution."),
        ("error_code", text, "Code of the row's or the attribution's error."),
        ("error_message", text, "Its sentence."),
    ]
    return pa.schema(
        [pa.field(name, kind, metadata={"description": what}) for name, kind, what in columns],
        metadata={"description": "Attributions by vllm-flashtrace batch."},
    )


def table_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """The rows of one outcome; columns that are missing in them are null."""
    body = outcome.body or {}
    row: dict[str, Any] = {
        "custom_id": outcome.custom_id,
        "source": outcome.source,
        "line": outcome.line,
    }
    if outcome.error is not None:
        return [_clean({**row, "status": "error", **_error(outcome.error)})]
    if body.get("object") == "flashtrace.attribution":
        return [_clean({**row, "choice": 0, **_attribution(body)})]
    usage = body.get("usage") or {}
    sizes = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return [_clean({**row, **sizes, **_choice(choice)}) for choice in body.get("choices") or ()]


def make_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of :func:`result_schema`."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=result_schema())


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    row = {
        "choice": choice.get("index"),
        "status": "untraced",
        "text": text,
        "finish_reason": choice.get("finish_reason"),
    }
    attribution = choice.get("flashtrace")
    return {**row, **_attribution(attribution)} if isinstance(attribution, Mapping) else row


def _attribution(data: Mapping[str, Any]) -> dict[str, Any]:
    row = {"status": data.get("status"), "trace_id": data.get("id"), **_error(data.get("error"))}
    if data.get("status") != "completed":
        return row
    scores = data["scores"]
    columns = {
        "indices": "index",
        "scores": "score",
        "token_ids": "token_id",
        "tokens": "token",
        "message": "message",
        "start": "start",
        "end": "end",
    }
    return {
        **row,
        "target": data["target"]["text"],
        "prompt_tokens": data["prompt_tokens"],
        **{column: [score.get(key) for score in scores] for column, key in columns.items()},
        **{name: data.get(name) for name in _MASSES},
        "hops": [{key: hop.get(key) for key in ("hop", *_HOP_MASSES)} for hop in data["hops"]],
    }


def _error(error: Mapping[str, Any] | None) -> dict[str, Any]:
    if not error:
        return {}
    return {"error_code": error.get("code"), "error_message": error.get("message")}


def _clean(value: Any) -> Any:
    """Text without halves of characters, which Parquet cannot hold; a token may end in one."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {k: _clean(v) for k, v in value.items()} if isinstance(value, dict) else value
