"""Signature checks that patches share.

They compare names of parameters only: a vLLM release that adds a parameter with a default still
fits, one that moves or renames an interface does not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

refused_options: dict[str, str] = {}
"""Options whose patch does not fit the installed vLLM, each with what does not fit."""


class PatchError(RuntimeError):
    """A private vLLM interface is not what a patch was written for."""


def require_parameters(function: Callable[..., Any] | None, name: str, *parameters: str) -> None:
    """Raises PatchError unless ``function`` exists and takes ``parameters`` first, in order."""
    if function is None:
        raise PatchError(f"{name} does not exist in this vLLM")
    found = list(inspect.signature(inspect.unwrap(function)).parameters)
    if found[: len(parameters)] != list(parameters):
        raise PatchError(f"{name} takes {found}, expected it to begin with {list(parameters)}")


def require_fields(kind: type, *fields: str) -> None:
    """Raises PatchError unless a dataclass has the fields."""
    found = [field.name for field in dataclasses.fields(kind)]
    missing = [name for name in fields if name not in found]
    if missing:
        raise PatchError(f"{kind.__name__} has no {', '.join(missing)} in this vLLM")


def require_tuple_fields(kind: Any, name: str, *fields: str) -> None:
    """Raises PatchError unless a named tuple exists and has the fields."""
    missing = [field for field in fields if field not in getattr(kind, "_fields", ())]
    if missing:
        raise PatchError(f"{name} has no {', '.join(missing)} in this vLLM")


def require_keyword(function: Callable[..., Any] | None, name: str, keyword: str) -> None:
    """Raises PatchError unless ``function`` exists and can be given ``keyword`` by name."""
    if function is None:
        raise PatchError(f"{name} does not exist in this vLLM")
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    found = parameters.get(keyword)
    if found is None or found.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise PatchError(f"{name} takes {list(parameters)}, expected {keyword!r} among them")
