"""Weighted column sums of causal attention, ``c_h[j] = sum_i w_i alpha^h_ij`` (section 3.2).

The only part of the method that touches the attention matrix. The matrix is never stored: rows are
taken in blocks of bounded size, and each block computes only the columns that its rows can see. The
sums are additive over rows, so a target may be fed in pieces, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_FLOATS = 1 << 22
"""Largest block of attention weights held at a time (16 MiB of float32)."""

_BLOCK_ROWS = 128
"""Rows of a matrix product per key/value head: enough for its speed, few enough for the cache."""

_LARGEST_DENOMINATOR = 1e25
"""Far below overflow, and its reciprocal times a small weight is far from float32's subnormals."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionForm:
    """How a layer makes attention weights: everything it does to a logit before the softmax.

    With ``z = scale * q_ih . k_j``, the logit is ``soft_cap * tanh(z / soft_cap)`` if there is a
    cap and ``z`` otherwise, plus ``alibi_slopes[h] * (j - i)``. Keys further back than the window,
    or in front of the query's chunk, are not seen. A sink is one more logit in the denominator that
    belongs to no token.

    Attributes:
        scale: Positive factor on the dot products.
        sliding_window: Query ``i`` sees keys ``i - sliding_window < j <= i``; None sees all.
        chunk_size: Query ``i`` sees keys ``i // chunk_size * chunk_size <= j <= i``; None sees all.
        soft_cap: Largest absolute logit; 0 for no cap.
        alibi_slopes: float32 ``[H]``, or None.
        sinks: float32 ``[H]``, or None.

    Raises:
        ValueError: A number is out of its range.
    """

    scale: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    soft_cap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if self.sliding_window is not None and self.chunk_size is not None:
            raise ValueError("a layer has a sliding window or chunks, not both")
        if not 0 <= self.soft_cap < math.inf:
            raise ValueError(f"soft_cap must not be negative, got {self.soft_cap}")

    @property
    def is_plain(self) -> bool:
        """Whether the layer is a causal softmax of scaled dot products and nothing else."""
        return (
            self.sliding_window is None
            and self.chunk_size is None
            and self.soft_cap == 0
            and self.alibi_slopes is None
            and self.sinks is None
        )

    def first_visible(self, position: int) -> int:
        """The first key that a query sees."""
        if self.chunk_size is not None:
            return position // self.chunk_size * self.chunk_size
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)


class TargetRowBlocks:
    """The rows of a target cut into blocks; the same for every layer, so made once.

    Rows of weight zero are left out. Memory for one block of attention weights is kept from layer
    to layer.

    Attributes:
        blocks: Ascending by position.
        columns: Number of keys needed: one more than the last position.
    """

    def __init__(
        self,
        weights: Tensor,
        positions: Tensor,
        num_heads: int,
        num_kv_heads: int,
        *,
        rows: Tensor | None = None,
        block_rows: int | None = None,
    ) -> None:
        """Cuts the rows.

        Args:
            weights: float32 ``[R]``, non-negative target weight of each row; ``[T, R]`` for the
                sums of T targets, which share the attention weights of their rows.
            positions: int64 ``[R]``, absolute position of each row; row ``i`` attends to keys
                ``j <= positions[i]``. Any order.
            num_heads: Query heads H.
            num_kv_heads: Key/value heads G.
            rows: int64 ``[R]``, where the rows lie in the query tensor; ``0..R-1`` if None.
            block_rows: Upper limit on the rows of a block; chosen by the head counts if None.

        Raises:
            ValueError: The shapes do not fit together, or a position is negative.
        """
        if num_kv_heads == 0 or num_heads % num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads"
            )
        if weights.dim() not in (1, 2) or weights.shape[-1:] != positions.shape:
            raise ValueError(
                f"weights and positions must be of one length; "
                f"got {tuple(weights.shape)} and {tuple(positions.shape)}"
            )
        if block_rows is None:
            block_rows = max(1, _BLOCK_ROWS * num_kv_heads // num_heads)
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        weights = torch.atleast_2d(weights)
        kept = (weights != 0).any(dim=0).nonzero().squeeze(1)
        kept = kept[positions[kept].argsort()]  # ascending, so early blocks see few columns
        places = kept if rows is None else rows[kept]
        visible = (positions[kept] + 1).tolist()
        if visible and visible[0] < 1:
            raise ValueError(f"positions must not be negative, got {visible[0] - 1}")
        self.columns: int = visible[-1] if visible else 0
        self.blocks: list[RowBlock] = []
        start = 0
        while start < len(visible):
            limit = min(start + block_rows, len(visible))
            fitting = _BLOCK_FLOATS // (num_heads * visible[limit - 1])
            stop = start + max(1, min(limit - start, fitting))
            self.blocks.append(
                RowBlock(
                    rows=as_slice(places[start:stop]),
                    row_weights=weights[:, kept[start:stop]].float(),
                    given=kept[start:stop],
                    positions=positions[kept[start:stop]],
                    columns=visible[stop - 1],
                    common=visible[start],
                    hidden=_hidden(visible[start:stop], weights.device),
                )
            )
            start = stop
        largest = max((len(b.positions) * b.columns for b in self.blocks), default=0)
        self._memory_size = num_heads * largest
        self._memory: Tensor | None = None

    def add(
        self,
        query: Tensor,
        keys: Tensor,
        form: AttentionForm,
        out: Tensor | Sequence[Tensor],
        scales: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        """Adds ``c_h[j] = sum_i w_i s_i alpha^h_ij`` for every head and token.

        Factors may differ between heads, ``s_i^h``, and between the coordinates of a head's value,
        ``s_i^h[e]``; then ``c_h[j][e] = sum_i w_i s_i^h[e] alpha^h_ij``.

        Args:
            query: ``[tokens, H, d]``, queries after position encoding, any float dtype.
            keys: float32 ``[G, d, n]`` with ``n >= columns``, keys as cached, one column a token;
                overwritten.
            form: How the layer makes attention weights ``alpha`` of queries and keys.
            out: float32 ``[H, >= n]``, added to in place; of several targets, one for each. With
                factors for each coordinate ``[H * d, >= n]``, those of a head side by side.
            scales: float32 ``[R]``, ``[H, R]`` or ``[H, d, R]``, factors ``s`` on the weights of
                the rows in this layer, in the order in which they were given; 1 if None.
            lse: float32 ``[H, R]``, the log-sum-exp of the rows' logits, a sink included, in the
                same order; computed if None.
        """
        if not self.blocks:
            return
        outs = [out] if isinstance(out, Tensor) else out
        keys = keys[:, :, : self.columns]
        if form.is_plain and lse is None:
            keys -= keys[:, :, :1].clone()
        memory = self.block_memory(keys)
        for block in self.blocks:
            queries = block.queries(query, self.num_kv_heads, form.scale)
            if form.is_plain and lse is None:
                first, attention, denominators = 0, *block.plain_weights(queries, keys, memory)
            else:
                first = form.first_visible(int(block.positions[0]))
                weights = block.weights_of(form, queries, keys, first, memory)
                attention, denominators, largest = weights
                if lse is not None:
                    denominators = (lse[:, block.given] - largest).exp()
            # The softmax denominator is folded into the row weights: one pass less over the block.
            row_weights = block.row_weights / denominators[:, None]  # [H, T, B]
            if scales is not None and scales.dim() == 3:
                own = scales[..., block.given]  # [H, d, B]
                for target, one in enumerate(outs):
                    by_head = one[:, first : block.columns].unflatten(0, (len(own), -1))
                    by_head.baddbmm_(own * row_weights[:, target : target + 1], attention)
                continue
            if scales is not None:
                own = scales[..., block.given]
                row_weights *= own if own.dim() == 1 else own[:, None]
            sums = torch.bmm(row_weights, attention)
            for target, one in enumerate(outs):
                one[:, first : block.columns] += sums[:, target]

    def block_memory(self, like: Tensor) -> Tensor:
        """Memory for one block of attention weights, made at first use."""
        if self._memory is None or self._memory.device != like.device:
            self._memory = torch.empty(self._memory_size, device=like.device)
        return self._memory


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows that ascend by position, and the columns they can see.

    Its weights are exponentials that are finite for finite input, whatever the logits, and are not
    yet divided by their sums, the denominators.

    Attributes:
        rows: Rows of the query tensor, a slice where they are adjacent.
        row_weights: float32 ``[T, B]``.
        given: int64 ``[B]``, their places among all rows as they were given.
        positions: int64 ``[B]``.
        columns: Number of columns that the last row sees.
        common: Number of columns that every row sees.
        hidden: bool ``[B, columns - common]``, True where a row may not look; None if nowhere.
    """

    rows: Tensor | slice
    row_weights: Tensor
    given: Tensor
    positions: Tensor
    columns: int
    common: int
    hidden: Tensor | None

    def queries(self, query: Tensor, num_kv_heads: int, scale: float) -> Tensor:
        """Scaled queries of the block, float32 ``[G, H/G * B, d]``."""
        queries = query[self.rows].float().mul(scale)
        queries = queries.view(len(self.positions), num_kv_heads, -1, query.shape[-1])
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
        positions = self.positions.to(logits.device)[:, None]
        distances = positions - columns  # [B, n]
        if form.alibi_slopes is not None:
            logits -= form.alibi_slopes[:, None, None] * distances
        hidden = distances < 0
        if form.sliding_window is not None:
            hidden |= distances >= form.sliding_window
        if form.chunk_size is not None:
            hidden |= distances > positions % form.chunk_size
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
            later = out.view(-1, len(self.positions), self.columns)[:, :, self.common :]
            later.masked_fill_(self.hidden, float("-inf"))

    def _within(self, memory: Tensor, queries: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Two views into the memory: ``[G, H/G * B, columns]`` and ``[H, B, columns]``."""
        groups, count = queries.shape[:2]
        grouped = memory[: groups * count * columns].view(groups, count, columns)
        return grouped, grouped.view(-1, len(self.positions), columns)


def _hidden(visible: list[int], device: torch.device) -> Tensor | None:
    """Columns beyond the common ones that a row may not see, bool ``[B, last - first]``."""
    if visible[0] == visible[-1]:
        return None
    ends = torch.tensor(visible, device=device)
    return torch.arange(visible[0], visible[-1], device=device) >= ends[:, None]


def as_slice(rows: Tensor) -> Tensor | slice:
    """Adjacent ascending rows as a slice, which is a view and not a copy."""
    first, last = int(rows[0]), int(rows[-1])
    adjacent = last - first + 1 == rows.numel() and bool((rows.diff() == 1).all())
    return slice(first, last + 1) if adjacent else rows
