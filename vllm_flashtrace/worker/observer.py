"""The one observer of the forward pass that is running, if any.

Invariant: there is an observer only during the forward pass of a step that computes target rows of
a trace. At all other times :func:`current` is None, and whoever asks does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

_current: ForwardObserver | None = None


class ForwardObserver(Protocol):
    """Sees every layer of a forward pass; must never raise."""

    def on_attention(self, layer_name: str, query: torch.Tensor) -> None:
        """Called after an attention kernel with its queries ``[tokens, H, d]``."""

    def on_residual(self, residual: torch.Tensor) -> None:
        """Called twice per decoder layer: before and after the attention block is added.

        Args:
            residual: ``[tokens, D]``, the residual stream.
        """


def current() -> ForwardObserver | None:
    """The observer of the running forward pass."""
    return _current


@contextmanager
def observing(observer: ForwardObserver) -> Iterator[None]:
    """Makes an observer the current one; a worker runs one forward pass at a time."""
    global _current
    _current = observer
    try:
        yield
    finally:
        _current = None
