"""How much memory the accumulators of traces may take, and what one trace takes of it.

A worker reports limit and prices with its status, so API servers and offline jobs count as it does
without knowing the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm_flashtrace.base.errors import TraceError

_FLOAT_BYTES = 4
_HALF_BYTES = 2
_DEFAULT_PART_OF_MEMORY = 16
# A trace that keeps rows takes at most this part of the limit.
_MOST_KEPT = 4


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of the traced model on this worker; heads are those of its tensor-parallel rank.

    Attributes:
        num_layers: Layers that are traced.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        hidden_size: Size of the residual stream.
        sums_per_head: Column sums that each head and token has: the head size where each
            coordinate has a gate of its own, else 1.
        other_layers: Layers that are not traced, whose change of the stream is measured.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    sums_per_head: int = 1
    other_layers: int = 0

    @property
    def stream_layers(self) -> int:
        """Layers around which the stream is added up: first those that are traced."""
        return self.num_layers + self.other_layers


@dataclass(frozen=True, slots=True)
class AccumulatorBudget:
    """A limit and the price of a trace.

    Attributes:
        limit_bytes: What all traces together may hold.
        bytes_per_token: Cost of each token of a trace's context.
        fixed_bytes: Cost of a trace beside its context.
        bytes_per_row: Cost of each row that a trace keeps for further hops; 0 where workers keep
            none.
        attention_bytes_per_token: Further cost of each token where sums of attention are asked for.
    """

    limit_bytes: int
    bytes_per_token: int
    fixed_bytes: int
    bytes_per_row: int = 0
    attention_bytes_per_token: int = 0

    @classmethod
    def of_model(
        cls,
        limit_bytes: int,
        shape: ModelShape,
        bytes_per_row: int = 0,
        *,
        scaled: bool = False,
        with_mass: bool = False,
    ) -> Self:
        """The budget of a worker: column sums per head, ``r`` and ``x`` per layer, in float32.

        Sums of attention are a copy in float16 of the column sums; where rows are ``scaled``, since
        blocks are normed or gated, column sums are of other weights, and those of attention are
        also added up by themselves. Where the worker measures what column sums must come to
        (``with_mass``), that is three numbers a head.
        """
        sums = shape.num_layers * shape.num_heads
        streams = shape.stream_layers * 2 * shape.hidden_size
        return cls(
            limit_bytes,
            bytes_per_token=sums * shape.sums_per_head * _FLOAT_BYTES,
            fixed_bytes=(streams + 3 * sums * with_mass) * _FLOAT_BYTES,
            bytes_per_row=bytes_per_row,
            attention_bytes_per_token=sums * (_HALF_BYTES + (_FLOAT_BYTES if scaled else 0)),
        )

    @classmethod
    def from_status(cls, status: Mapping[str, Any]) -> Self | None:
        """Reads a worker's status; None if it does not limit accumulators."""
        if status.get("accumulator_budget_bytes") is None:
            return None
        return cls(
            limit_bytes=status["accumulator_budget_bytes"],
            bytes_per_token=status["accumulator_bytes_per_token"],
            fixed_bytes=status["accumulator_fixed_bytes"],
            bytes_per_row=status.get("accumulator_bytes_per_row", 0),
            attention_bytes_per_token=status.get("accumulator_attention_bytes_per_token", 0),
        )

    @classmethod
    def tightest(cls, budgets: Sequence[Self]) -> Self:
        """One budget that admits a trace only if it has room on every worker.

        Workers differ where pipeline stages hold different numbers of layers or where less memory
        is free. All are brought to the smallest limit, prices in proportion, rounded up.
        """
        limit = min(budget.limit_bytes for budget in budgets)
        return cls(
            limit,
            bytes_per_token=max(b._scaled(b.bytes_per_token, limit) for b in budgets),
            fixed_bytes=max(b._scaled(b.fixed_bytes, limit) for b in budgets),
            bytes_per_row=max(b._scaled(b.bytes_per_row, limit) for b in budgets),
            attention_bytes_per_token=max(
                b._scaled(b.attention_bytes_per_token, limit) for b in budgets
            ),
        )

    def _scaled(self, price: int, limit: int) -> int:
        return -(-price * limit // self.limit_bytes) if self.limit_bytes else price

    def to_status(self) -> dict[str, int]:
        """What :meth:`from_status` reads."""
        return {
            "accumulator_budget_bytes": self.limit_bytes,
            "accumulator_bytes_per_token": self.bytes_per_token,
            "accumulator_fixed_bytes": self.fixed_bytes,
            "accumulator_bytes_per_row": self.bytes_per_row,
            "accumulator_attention_bytes_per_token": self.attention_bytes_per_token,
        }

    def shared_by(self, parts: int) -> Self:
        """The same prices with an equal part of the limit."""
        return dataclasses.replace(self, limit_bytes=self.limit_bytes // max(1, parts))

    def cost(self, context: int, kept_rows: int = 0, *, attention: bool = False) -> int:
        """Bytes that a trace of ``context`` tokens takes.

        Args:
            context: Its tokens.
            kept_rows: Rows that are kept for further hops.
            attention: Whether sums of attention are asked for.
        """
        per_token = self.bytes_per_token + (self.attention_bytes_per_token if attention else 0)
        return self.fixed_bytes + per_token * context + self.bytes_per_row * kept_rows

    def keeps(self, context: int, rows: int) -> bool:
        """Whether a trace may keep ``rows`` rows: not where that leaves too little for others."""
        most = self.limit_bytes // _MOST_KEPT
        return self.bytes_per_row > 0 and self.cost(context, rows) <= most

    def check(
        self, context: int, held_bytes: int = 0, kept_rows: int = 0, *, attention: bool = False
    ) -> None:
        """Refuses a trace of ``context`` tokens beside ``held_bytes`` of others if it has no room.

        Raises:
            TraceError: ``overloaded``.
        """
        cost = self.cost(context, kept_rows, attention=attention)
        if held_bytes + cost > self.limit_bytes:
            held = f", of which {held_bytes} bytes are taken" if held_bytes else ""
            raise TraceError(
                "overloaded",
                f"a trace of {context} tokens needs {cost} bytes of accumulators; the budget "
                f"(max_accumulator_mib) is {self.limit_bytes} bytes{held}",
            )


def part_of_memory() -> int:
    """The default limit where accumulators live in the machine's memory, a sixteenth of it."""
    import psutil

    total: int = psutil.virtual_memory().total
    return total // _DEFAULT_PART_OF_MEMORY
