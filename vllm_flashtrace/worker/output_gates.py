"""Gates between attention and ``W_O``: what a block multiplies attention's output by.

A gate is one number for each head, or one for each coordinate of a head's output, that the block
makes of what goes into it: ``sigmoid(gate_proj(x))`` in AfMoE, ``softplus(g_proj(x))`` in Laguna, a
part of the query projection in Qwen3-Next. Which it is need not be known: the block's own code runs
once more on the rows that matter, with ones in the place of attention's output, and what it then
gives to ``W_O`` is the gate. The proof at the start shows that what the block adds is linear in
attention's output and that this is the factor.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_flashtrace.base.errors import UnsupportedModelError

# Projections that blocks have beside those of queries, keys, values and the output.
_PROJECTIONS = ("gate_proj", "g_proj")
_FLAG = "attn_output_gate"
INPUTS = ("positions", "hidden_states")
"""What blocks with gates are called with."""


@dataclass(frozen=True, slots=True)
class OutputGate:
    """The gate of an attention block.

    Attributes:
        block: The attention block.
        attention: vLLM's attention layer in it.
        projection: The output projection's name in the block.
        width: Numbers of a head: 1, or the head size d where each coordinate has its own.
    """

    block: nn.Module
    attention: Any
    projection: str
    width: int

    @classmethod
    def read(
        cls, layer_name: str, block: nn.Module, attention: Any, projection: str
    ) -> OutputGate | None:
        """Reads whether a block has a gate, and of which kind.

        Raises:
            UnsupportedModelError: It has one that is not known.
        """
        heads, size = attention.num_heads, attention.head_size
        found = [getattr(block, name, None) for name in _PROJECTIONS]
        projections = [module for module in found if isinstance(module, nn.Module)]
        width = size if bool(getattr(block, _FLAG, False)) else 0
        for module in projections:
            numbers = getattr(module, "output_size_per_partition", None)
            width = {heads: 1, heads * size: size}.get(numbers, 0)
        if not width and not projections:
            return None
        parameters = inspect.signature(block.forward).parameters
        if not width or tuple(parameters) != INPUTS:
            raise UnsupportedModelError(
                "traces are not supported with an output gate that is not one number for each head "
                f"or coordinate, or of a block that takes other inputs ({layer_name})"
            )
        return cls(block, attention, projection, width)

    def values(self, hidden_states: Tensor) -> Tensor:
        """The gates of rows of a block's input.

        Runs the block's code up to the output projection; nothing is written to a cache.

        Args:
            hidden_states: ``[R, D]``, what goes into the block.

        Returns:
            ``[H, R]`` or ``[H, d, R]``, float32, of this rank's heads.

        Raises:
            RuntimeError: The block did not come to its output projection.
        """
        rows = len(hidden_states)
        heads, size = self.attention.num_heads, self.attention.head_size
        seen: list[Tensor] = []

        def ones(*_: Any, **__: Any) -> Tensor:
            return hidden_states.new_ones(rows, heads * size)

        def end(gates: Tensor, *_: Any, **__: Any) -> None:
            seen.append(gates)
            raise _GateSeenError

        # Gates do not depend on positions.
        positions = torch.zeros(rows, dtype=torch.int64, device=hidden_states.device)
        with (
            _replaced(self.attention, ones),
            _replaced(getattr(self.block, self.projection), end),
        ):
            try:
                self.block.forward(positions=positions, hidden_states=hidden_states)
            except _GateSeenError:
                gates = seen[0].float().view(rows, heads, size).permute(1, 2, 0)
                return (gates[:, 0] if self.width == 1 else gates).contiguous()
        raise RuntimeError("the output projection of a block with a gate is not called")


class _GateSeenError(Exception):
    """Ends a block's code where the gate is known."""


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Lets a module do something else within the block."""
    stock = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if stock is not None:
            module.forward = stock
