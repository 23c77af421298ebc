"""Options of ``vllm-flashtrace batch`` and how they are written on the command line.

Invariant: what passes here is well-formed; whether an engine takes it is the engine's to say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flashtrace.scale.batch.inputs import Defaults

# They name the model, or belong to a server's socket.
_NO_ENGINE_OPTIONS = ("--model", "--host", "--port", "--api-key", "--uds")


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Options of the command.

    Attributes:
        input: File or folder.
        output: Folder for the results.
        model: Model name or folder.
        argv: Options of ``vllm serve``.
        replicas: Fewest and most engines.
        batch_size: Rows that an engine is handed at once.
        defaults: What rows get that say nothing.
    """

    input: Path
    output: Path
    model: str
    argv: tuple[str, ...]
    replicas: tuple[int, int]
    batch_size: int
    defaults: Defaults


def parse_flashtrace(text: str) -> Any:
    """The default ``flashtrace`` field: ``true``, ``false`` or an object.

    Raises:
        ValueError: It is not JSON.
        InvalidRequestError: The field is refused.
    """
    from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field

    try:
        field = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--flashtrace is not JSON: {error}") from None
    parsed = parse_flashtrace_field(field, RequestLimits(max_hops=64))
    if parsed is not None and parsed.mode != "inline":
        raise ValueError("--flashtrace: mode must be inline in a batch")
    return field


def parse_replicas(text: str) -> tuple[int, int]:
    """``2`` or ``1-4`` as the fewest and the most replicas.

    Raises:
        ValueError: It is neither.
    """
    fewest, dash, most = text.partition("-")
    sizes = (fewest, most if dash else fewest)
    if all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        low, high = map(int, sizes)
        if low <= high:
            return low, high
    raise ValueError(f"--replicas must be a number of at least 1, or two as in 1-4, got {text!r}")


def engine_argv(arguments: Sequence[str]) -> tuple[str, ...]:
    """Arguments after ``--`` as engine options.

    Raises:
        ValueError: One that the command sets itself is among them.
    """
    for argument in arguments:
        if argument.partition("=")[0] in _NO_ENGINE_OPTIONS:
            raise ValueError(f"{argument} is no engine option of a batch")
    return tuple(arguments)
