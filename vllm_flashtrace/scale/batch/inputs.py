"""Input files of a batch: read row by row, and each row made a request or an error.

A row is either a request that the server's routes take, or an error that says which field is at
fault; nothing that a client wrote is dropped silently. A line that cannot be read is a row with an
error, and only a file that cannot be read at all stops the run. Reading a file twice gives the same
rows with the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flashtrace.api.checks import check_messages, check_text, is_unicode, shown
from vllm_flashtrace.api.request import FIELD
from vllm_flashtrace.base.errors import FlashTraceError, InvalidRequestError

CHAT, COMPLETIONS, ATTRIBUTIONS = "/v1/chat/completions", "/v1/completions", "/v1/attributions"
ROUTES = (CHAT, COMPLETIONS, ATTRIBUTIONS)
_BATCH_KEYS = frozenset({"custom_id", "method", "url", "body"})
_ROW_KEYS = frozenset({"custom_id", "messages", "prompt", "completion"})
_LONGEST_ID = 512
JSONL, PARQUET = ".jsonl", ".parquet"
LONGEST_LINE = 64 << 20
_BOM = b"\xef\xbb\xbf"
_RECORDS_AT_ONCE = 256


class RowError(FlashTraceError):
    """A row that no engine can answer."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What rows get that say nothing themselves.

    Attributes:
        flashtrace: The ``flashtrace`` field.
        max_tokens: Most tokens to generate; None leaves vLLM's own default.
    """

    flashtrace: Any = True
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request to a route of the server."""

    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in its file.

    Attributes:
        line: Line of a JSONL file, or record of a Parquet file, from 1.
        custom_id: The row's own id, else its file's name and its line.
        value: What was decoded; None when ``error`` says why nothing was.
        error: Why the row cannot be read.
    """

    line: int
    custom_id: str
    value: Any
    error: RowError | None = None


def input_files(path: Path) -> list[tuple[str, Path]]:
    """The files of an input with the names that rows are known by, in sorted order.

    Args:
        path: A ``.jsonl`` or ``.parquet`` file, or a folder searched through for them.

    Raises:
        OSError: There is no such path.
        ValueError: It is neither, or the folder has none.
    """
    if not path.is_dir():
        path.stat()
        if path.suffix not in (JSONL, PARQUET):
            raise ValueError(f"{path} is neither a {JSONL} nor a {PARQUET} file")
        return [(path.name, path)]
    found = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.suffix in (JSONL, PARQUET) and file.is_file()
    )
    if not found:
        raise ValueError(f"there is no {JSONL} or {PARQUET} file in {path}")
    return found


def read_rows(name: str, path: Path) -> Iterator[RawRow]:
    """All rows of a file; blank lines are none.

    Raises:
        OSError: The file cannot be read.
        ValueError: A Parquet file is broken.
    """
    records = _records(path) if path.suffix == PARQUET else _lines(path)
    for line, value in records:
        own = f"{name}:{line}"
        if isinstance(value, RowError):
            yield RawRow(line, own, None, value)
        else:
            yield RawRow(line, custom_id_of(value) or own, value)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
                while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, _malformed(f"it is longer than {LONGEST_LINE} bytes")
                continue
            text = raw.removeprefix(_BOM) if number == 1 else raw
            if text.strip():
                yield number, _decoded(text)


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except RecursionError:
        return _malformed("it is nested too deeply")
    except ValueError as error:
        return _malformed(str(error))


def _malformed(reason: str) -> RowError:
    return RowError("invalid_json_line", f"this line is not JSON that can be read: {reason}")


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_RECORDS_AT_ONCE):
            for record in batch.to_pylist():
                number += 1
                yield number, plain_record(record)


def plain_record(record: dict[str, Any]) -> Any:
    """A record of a table as JSON.

    A null is an absent key. ``flashtrace`` and ``body`` may be JSON text, which keeps its nulls.

    Args:
        record: Columns by name.

    Returns:
        The value, or the `RowError` that says why there is none.
    """
    value = {name: _without_nulls(item) for name, item in record.items() if item is not None}
    for name in (FIELD, "body"):
        if isinstance(value.get(name), str):
            try:
                value[name] = json.loads(value[name])
            except (ValueError, RecursionError) as error:
                return RowError("invalid_row", f"{name} is a text that is not JSON: {error}")
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def custom_id_of(value: Any) -> str | None:
    """The row's own id; None where it has none, or none that can be used."""
    custom_id = value.get("custom_id") if isinstance(value, Mapping) else None
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
        return None
    return custom_id if is_unicode(custom_id) else None


def request_of(value: Any, defaults: Defaults) -> Request:
    """The request in one decoded row.

    Args:
        value: An OpenAI batch row (``custom_id``, ``method``, ``url``, ``body``), or a plain row
            with ``messages`` or ``prompt``, perhaps ``completion`` (text to explain), and any field
            of the route's body.
        defaults: What the row gets where it says nothing.

    Raises:
        RowError: Naming the field at fault.
    """
    if not isinstance(value, Mapping):
        raise RowError("invalid_row", f"a row is a JSON object, got {shown(value)}")
    if value.get("custom_id") is not None and custom_id_of(value) is None:
        got = shown(value["custom_id"])
        raise _bad("custom_id", f"must be a text of 1 to {_LONGEST_ID} characters, got {got}")
    request = _batch_request(value) if _BATCH_KEYS & {*value} - {"custom_id"} else _plain(value)
    _check_body(request)
    return _with_defaults(request, defaults)


def _batch_request(value: Mapping[str, Any]) -> Request:
    for name in sorted({*value} - _BATCH_KEYS):
        raise _bad(name, f"is no field of a batch row ({', '.join(sorted(_BATCH_KEYS))})")
    if value.get("method", "POST") != "POST":
        raise _bad("method", f"must be POST, got {shown(value['method'])}")
    url, body = value.get("url"), value.get("body")
    if url not in ROUTES:
        raise _bad("url", f"must be one of {', '.join(ROUTES)}, got {shown(url)}")
    if not isinstance(body, Mapping):
        raise _bad("body", f"must be an object, got {shown(body)}")
    return Request(str(url), dict(body))


def _plain(value: Mapping[str, Any]) -> Request:
    options = {name: option for name, option in value.items() if name not in _ROW_KEYS}
    messages, prompt, completion = (value.get(k) for k in ("messages", "prompt", "completion"))
    if (messages is None) == (prompt is None):
        raise _bad("messages", "or prompt is needed, and not both")
    if messages is None:
        if completion is None:
            return Request(COMPLETIONS, {"prompt": prompt, **options})
        return Request(ATTRIBUTIONS, {"prompt": prompt, "completion": completion, **options})
    if not isinstance(messages, list):
        raise _bad("messages", "must be a list")
    if completion is None:
        return Request(CHAT, {"messages": messages, **options})
    if not isinstance(completion, str):
        raise _bad("completion", "of messages must be a text")
    answered = [*messages, {"role": "assistant", "content": completion}]
    return Request(ATTRIBUTIONS, {"messages": answered, **options})


def _check_body(request: Request) -> None:
    body = request.body
    for name in ("stream", "stream_options"):
        if body.get(name):
            raise _bad(name, "has no place in a batch")
    field = body.get(FIELD)
    if isinstance(field, Mapping) and field.get("mode", "inline") != "inline":
        raise _bad("flashtrace.mode", "must be inline in a batch")
    try:
        check_text(body, "body")
        messages = body.get("messages")
        check_messages(messages if isinstance(messages, list) else (), "messages")
    except InvalidRequestError as error:
        raise RowError("invalid_row", error.message) from None


def _with_defaults(request: Request, defaults: Defaults) -> Request:
    body = dict(request.body)
    if body.get(FIELD) is None:
        body[FIELD] = defaults.flashtrace
    sized = any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
    if request.url != ATTRIBUTIONS and defaults.max_tokens is not None and not sized:
        body["max_tokens"] = defaults.max_tokens
    return Request(request.url, body)


def _bad(field: str, phrase: str) -> RowError:
    return RowError("invalid_row", f"{field} {phrase}")
