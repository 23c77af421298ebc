"""Attention weights of a few target rows, before division by their denominators.

Invariant: a row's exponentials and their sum are finite for finite input, whatever the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_flashtrace.core.attention_form import AttentionForm

_LARGEST_DENOMINATOR = 1e25
# Far below overflow, and its reciprocal times a small weight is far from float32's subnormals.


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Some ascending rows and the columns they can see.

    Attributes:
        rows: Rows of the query tensor, a slice where they are adjacent.
        row_weights: float32 ``[B]``.
        positions: int64 ``[B]``.
        columns: Number of columns that the last row sees.
        common: Number of columns that every row sees.
        hidden: bool ``[B, columns - common]``, True where a row may not look; None if nowhere.
    """

    rows: Tensor | slice
    row_weights: Tensor
    positions: Tensor
    columns: int
    common: int
    hidden: Tensor | None

    def queries(self, query: Tensor, num_kv_heads: int, scale: float) -> Tensor:
        """Scaled queries of the block, float32 ``[G, H/G * B, d]``."""
        queries = query[self.rows].float().mul(scale)
        queries = queries.view(len(self.row_weights), num_kv_heads, -1, query.shape[-1])
        return queries.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, query.shape[-1])

    def plain_weights(self, queries: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``[H, B, columns]`` and their denominators ``[H, B]`` in plain causal attention.

        Softmax does not change when one number is subtracted from all logits of a row. Taking the
        logit of the first key, which every row sees, turns that into one subtraction per key
        vector: ``q.k_j - q.k_0 = q.(k_j - k_0)``. Rows in which this does not keep the exponentials
        within float32 are computed again with their largest logit subtracted.

        Args:
            queries: See `queries`.
            keys: float32 ``[G, d, >= columns]``, with the first key subtracted from all.
            memory: float32, at least as many as there are weights; holds them afterwards.
        """
        grouped, attention = self._within(memory, queries, self.columns)
        self._plain_logits(queries, keys, grouped)
        denominators = attention.exp_().sum(dim=-1)
        if not bool((denominators <= _LARGEST_DENOMINATOR).all()):
            self._plain_logits(queries, keys, grouped)
            attention.sub_(attention.amax(dim=-1, keepdim=True)).exp_()
            denominators = attention.sum(dim=-1)
        return attention, denominators

    def weights_of(
        self, form: AttentionForm, queries: Tensor, keys: Tensor, first: int, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `plain_weights` for any form and keys as cached, over the columns from `first` on.

        The third result, ``[H, B]``, is the logit that was subtracted from a row's others.
        """
        grouped, logits = self._within(memory, queries, self.columns - first)
        torch.bmm(queries, keys[:, :, first : self.columns], out=grouped)
        if form.soft_cap:
            logits.div_(form.soft_cap).tanh_().mul_(form.soft_cap)
        columns = torch.arange(first, self.columns, device=logits.device)
        distances = self.positions.to(logits.device)[:, None] - columns  # [B, n]
        if form.alibi_slopes is not None:
            logits -= form.alibi_slopes[:, None, None] * distances
        hidden = distances < 0
        if form.sliding_window is not None:
            hidden |= distances >= form.sliding_window
        logits.masked_fill_(hidden, float("-inf"))
        largest = logits.amax(dim=-1, keepdim=True)
        if form.sinks is not None:
            largest = torch.maximum(largest, form.sinks[:, None, None])
        denominators = logits.sub_(largest).exp_().sum(dim=-1)
        if form.sinks is not None:
            denominators += (form.sinks[:, None] - largest.squeeze(-1)).exp_()
        return logits, denominators, largest.squeeze(-1)

    def _plain_logits(self, queries: Tensor, keys: Tensor, out: Tensor) -> None:
        torch.bmm(queries, keys[:, :, : self.columns], out=out)
        if self.hidden is not None:
            later = out.view(-1, len(self.row_weights), self.columns)[:, :, self.common :]
            later.masked_fill_(self.hidden, float("-inf"))

    def _within(self, memory: Tensor, queries: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Two views into the memory: ``[G, H/G * B, columns]`` and ``[H, B, columns]``."""
        groups, count = queries.shape[:2]
        grouped = memory[: groups * count * columns].view(groups, count, columns)
        return grouped, grouped.view(-1, len(self.row_weights), columns)
