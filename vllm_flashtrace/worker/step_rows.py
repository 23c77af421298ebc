"""Rows of one engine step: those of its requests, and target rows with all their block tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_flashtrace.kernels import KeptQueries, PagedRows


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One request's place in a step.

    Attributes:
        req_id: The engine's request id.
        first_row: Its first row among the step's tokens.
        start: Absolute position of that row, i.e. tokens computed before this step.
        stop: Absolute position after its last row.
        block_tables: int32, ids of the request's KV blocks as the attention kernels count them, on
            the step's device; one for each group of `cache_groups.CacheGroups`.
    """

    req_id: str
    first_row: int
    start: int
    stop: int
    block_tables: Sequence[Tensor]


class StepRows:
    """Target rows that are recorded in one call, as a model reads its KV cache for them.

    Attributes:
        rows: The target rows.
        block_tables: Of the request of each of their segments, see `BatchRow`.
        kept: Where their queries wait for the end of the step; None where they do not.
    """

    def __init__(self, rows: PagedRows, block_tables: Sequence[Sequence[Tensor]]) -> None:
        """Without queries that wait."""
        self.rows = rows
        self.block_tables = block_tables
        self.kept: KeptQueries | None = None
        self._rows_in: dict[tuple[int, int], PagedRows] = {}

    def rows_in(self, place: int, rows: PagedRows) -> PagedRows:
        """Its rows with the block tables of one group of the KV cache.

        Args:
            place: The group's place in `cache_groups.CacheGroups`.
            rows: `rows`, or the same in a row.
        """
        if place == 0:
            return rows
        key = place, id(rows)  # Both live as long as this does.
        if key not in self._rows_in:
            tables = [tables[place] for tables in self.block_tables]
            self._rows_in[key] = rows.with_block_tables(tables)
        return self._rows_in[key]
