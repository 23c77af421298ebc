"""What became of a row: in the form of OpenAI's batch files, and as a table.

In the files a row is in the output or among the errors, never in both: it is an error where there
is no completion (or, for existing text, no attribution) to show for it. The table has one row for
each choice of a completion, each attribution of existing text and each error. Its columns for an
attribution are the fields of the models in :mod:`vllm_flashtrace.api.response`, with their
descriptions; the list columns that belong to scores have one length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from vllm_flashtrace.api.response import (
    OBJECT,
    AttributionError,
    AttributionObject,
    Coverage,
    HopMass,
    SentenceScore,
    TargetFound,
    TokenScore,
)

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


# Columns of one list per attribution have the plural of the field's name where it has one.
_PLURALS = {"index": "indices", "score": "scores", "token_id": "token_ids", "token": "tokens"}


def _scalar_fields(model: type[BaseModel]) -> dict[str, tuple[type, str]]:
    """Type and description of each field that is a number or a text."""
    return {
        name: (kind, field.description or "")
        for name, field in model.model_fields.items()
        if (kind := _scalar_type(field.annotation)) is not None
    }


def _scalar_type(annotation: Any) -> type | None:
    """The int, float or str that an annotation asks for, None aside."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str
    if origin is Annotated:
        return _scalar_type(parts[0])
    if origin in (Union, UnionType):
        return next((kind for part in parts if (kind := _scalar_type(part))), None)
    return annotation if annotation in (int, float, str) else None


_SCORE_FIELDS = _scalar_fields(TokenScore)
_HOP_FIELDS = _scalar_fields(HopMass)
_SENTENCE_FIELDS = _scalar_fields(SentenceScore)
_FIELDS = _scalar_fields(AttributionObject)
_MASSES = [name for name in _FIELDS if name.endswith("_mass")]


def result_schema() -> pa.Schema:
    """The columns, their types and what they mean."""
    import pyarrow as pa

    text = pa.string()
    small = {int: pa.int32(), float: pa.float32(), str: text}
    large = {int: pa.int64(), float: pa.float64(), str: text}
    # Masses have the full precision, so that they add up to 1; the many scores have not.
    masses = {**small, float: pa.float64()}
    hop = pa.struct([(name, masses[kind]) for name, (kind, _) in _HOP_FIELDS.items()])
    sentence = pa.struct([(name, small[kind]) for name, (kind, _) in _SENTENCE_FIELDS.items()])

    def field(name: str) -> tuple[str, pa.DataType, str]:
        kind, what = _FIELDS[name]
        return name, large[kind], what

    columns: list[tuple[str, pa.DataType, str]] = [
        ("custom_id", text, "The row's id: its own, else file:line."),
        ("source", text, "Name of the input file."),
        ("line", pa.int64(), "Line (JSONL) or record (Parquet) in it, from 1."),
        ("choice", pa.int32(), "Index of the choice; null in an error row."),
        ("status", text, "completed, failed or skipped (attribution); untraced; error."),
        ("text", text, "The completion."),
        ("finish_reason", text, "Why it ended."),
        ("target", text, _described(TargetFound, "text")),
        field("prompt_tokens"),
        ("completion_tokens", pa.int64(), "Tokens generated, over all choices."),
        *(
            (_PLURALS.get(name, name), pa.list_(small[kind]), f"Of each scored token: {what}")
            for name, (kind, what) in _SCORE_FIELDS.items()
        ),
        *(field(name) for name in _MASSES),
        ("hops", pa.list_(hop), _described(AttributionObject, "hops")),
        field("auto_stopped"),
        ("sentences", pa.list_(sentence), _described(AttributionObject, "sentences")),
        ("covered_layers", pa.list_(pa.int32()), _described(Coverage, "layers")),
        ("model_layers", pa.int32(), _described(Coverage, "model_layers")),
        field("change_share"),
        ("trace_id", text, _described(AttributionObject, "id")),
        ("error_code", text, _described(AttributionError, "code")),
        ("error_message", text, _described(AttributionError, "message")),
    ]
    return pa.schema(
        [pa.field(name, kind, metadata={"description": what}) for name, kind, what in columns],
        metadata={"description": "Attributions by vllm-flashtrace batch."},
    )


def _described(model: type[BaseModel], name: str) -> str:
    return model.model_fields[name].description or ""


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
    if body.get("object") == OBJECT:
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
    return {
        **row,
        "target": data["target"]["text"],
        "prompt_tokens": data["prompt_tokens"],
        **{
            _PLURALS.get(name, name): [score.get(name) for score in scores]
            for name in _SCORE_FIELDS
        },
        **{name: data.get(name) for name in (*_MASSES, "auto_stopped", "change_share")},
        "hops": _structs(data["hops"], _HOP_FIELDS),
        "sentences": _structs(data.get("sentences"), _SENTENCE_FIELDS),
        **_coverage(data.get("coverage")),
    }


def _structs(
    entries: Sequence[Mapping[str, Any]] | None, names: Iterable[str]
) -> list[dict[str, Any]] | None:
    if entries is None:
        return None
    return [{name: entry.get(name) for name in names} for entry in entries]


def _coverage(coverage: Mapping[str, Any] | None) -> dict[str, Any]:
    if not coverage:
        return {}
    return {"covered_layers": coverage["layers"], "model_layers": coverage["model_layers"]}


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
