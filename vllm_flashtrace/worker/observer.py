"""The one observer of the forward pass that is running, and the attention mixin that calls it.

There is an observer only during the forward pass of a step that computes target rows of a trace. At
all other times :func:`current` returns None, and the attention mixin and the taps do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

TELLING_VERSIONS = (2, 3)
"""Of FlashAttention, those that the patch `attention_backends` asks for the log-sum-exp."""

_current: ForwardObserver | None = None
_lse: torch.Tensor | None = None


class ForwardObserver(Protocol):
    """Sees every layer of a forward pass; must never raise.

    What it is shown is valid during the call: others may write there when it is over.
    """

    def on_attention(
        self,
        layer_name: str,
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Called after an attention kernel.

        Args:
            layer_name: The attention layer's name in vLLM's forward context.
            query: ``[tokens, H, d]``, its queries.
            output: ``[tokens, H, d]`` or ``[tokens, H * d]``, what it returned.
            lse: float32 ``[H, tokens]``, the log-sum-exp of each query's logits, a sink included,
                to base e; None where the kernel has not told it, see :func:`note_lse`.
        """

    def on_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """Called once per decoder layer, before its attention block is added to the stream.

        Args:
            update: ``[tokens, D]``, what the block adds.
            residual: ``[tokens, D]``, the residual stream.
        """

    def on_residual(self, residual: torch.Tensor) -> None:
        """Called instead, twice per decoder layer: before and after the block has been added.

        Where `on_block` is called too it is called once, behind or before that: with the stream
        before.

        Args:
            residual: ``[tokens, D]``, the residual stream.
        """

    def on_block(self, output: torch.Tensor) -> None:
        """Called once per decoder layer, where what the block adds is the norm of its output.

        It is called behind `on_attention`.

        Args:
            output: ``[tokens, D]``, the block's output.
        """

    def on_other_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """As `on_update`, once per decoder layer that is not traced."""

    def on_other_residual(self, residual: torch.Tensor) -> None:
        """As `on_residual`, twice per decoder layer that is not traced."""

    def on_block_input(self, hidden_states: torch.Tensor) -> None:
        """Called once per decoder layer whose block has an output gate, before `on_attention`.

        Args:
            hidden_states: ``[tokens, D]``, what goes into the block.
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


def note_lse(lse: torch.Tensor) -> None:
    """Keeps what an attention kernel has told, until `RecordingAttention` shows it.

    Args:
        lse: See `ForwardObserver.on_attention`.
    """
    global _lse
    _lse = lse


def _take_lse() -> torch.Tensor | None:
    global _lse
    lse, _lse = _lse, None
    return lse


class RecordingAttention:
    """Mixin of an attention implementation; its first base, before the stock one."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs the stock kernel, then shows its queries and its output to the observer.

        Without an observer the cost is reading one variable. There is no metadata in runs that only
        measure memory.
        """
        arguments = (layer, query, key, value, kv_cache, attn_metadata, *args)
        result: torch.Tensor
        observer = current()
        if observer is None or attn_metadata is None:
            result = super().forward(*arguments, **kwargs)  # type: ignore[misc]
            return result
        _take_lse()  # That of a kernel whose layer nobody records.
        with self.telling():
            result = super().forward(*arguments, **kwargs)  # type: ignore[misc]
        observer.on_attention(layer.layer_name, query, result, _take_lse())
        return result

    @staticmethod
    def telling() -> AbstractContextManager[None]:
        """While it lasts the stock kernel may call `note_lse`."""
        return nullcontext()
