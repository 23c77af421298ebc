"""Options of a replica's engine: from Python keywords, and how many devices they ask for.

Invariant: options reach vLLM's own parser unchanged, which judges them where the engine starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_PARALLEL = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--data-parallel-size", "-dp"),
)


def as_argv(engine_args: Mapping[str, Any]) -> tuple[str, ...]:
    """``{"max_model_len": 2048, "enforce_eager": True}`` as options of ``vllm serve``.

    Args:
        engine_args: Names with ``_`` or ``-``. True and False switch, None is left out, lists
            become several values, and mappings become JSON.
    """
    argv: list[str] = []
    for name, value in engine_args.items():
        option = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Mapping):
            argv += [f"--{option}", json.dumps(value)]
        elif isinstance(value, list | tuple):
            argv += [f"--{option}", *map(str, value)]
        else:
            argv += [f"--{option}", str(value)]
    return tuple(argv)


def workers_of(argv: Sequence[str]) -> int:
    """Worker processes, hence GPUs, of one engine: the product of its parallel sizes.

    Raises:
        ValueError: A size is no number of at least 1.
    """
    workers = 1
    for names in _PARALLEL:
        workers *= _size(argv, names)
    return workers


def _size(argv: Sequence[str], names: tuple[str, ...]) -> int:
    size: str | None = None
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in names:
            size = value if equals else next(iter(argv[position + 1 : position + 2]), "")
    if size is None:
        return 1
    if not (size.isascii() and size.isdigit() and int(size) > 0):
        raise ValueError(f"engine options: {names[0]} must be a number of at least 1, got {size!r}")
    return int(size)
