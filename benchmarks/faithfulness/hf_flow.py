"""Information flow of a recorded forward pass: per span, per token, and composed over the response.

Invariant: rows are float64 distributions over the tokens that a row sees, so that composing them
never creates mass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.faithfulness.example import Prepared, Span
from benchmarks.faithfulness.hf_record import LayerRecord, RecordedForward
from vllm_flashtrace.core import (
    HopRecursion,
    HopResult,
    TargetWeights,
    l1_proximity,
    token_proximity,
    token_shares,
)

OneHop = Callable[[TargetWeights], Tensor]

_TEMPORARY_FLOATS = 1 << 18
"""Largest block of contributions held at a time (1 MiB, to stay in the cache)."""

_REACH_SLACK = 1 + 1e-5
"""Rounding of the reach must never hide a coordinate."""


def proximity_scores(recorded: RecordedForward, target: TargetWeights) -> Tensor:
    """FlashTrace's attribution pass (arXiv 2602.01914): ``[N]`` float64, summed over layers."""
    rows, weights, seen = target.positions, target.weights, target.last + 1
    scores = torch.zeros(len(recorded.layers[0].before), dtype=torch.float64)
    for layer in recorded.layers:
        attention = layer.attention[:, rows, :seen]
        stream = weights @ layer.after[rows]
        tokens = token_proximity(
            (weights[None, None] @ attention).squeeze(1),
            layer.values[:seen],
            layer.projection.weight,
            stream,
            column_norms=layer.projection.column_norms,
        )
        residual = l1_proximity(weights @ layer.before[rows], stream)
        scores[:seen] += token_shares(tokens, tokens.sum() + residual)
    return scores


def norm_scores(recorded: RecordedForward, target: TargetWeights) -> Tensor:
    """``sum c_h[j] ||v_j^h W_O^h||_2`` over layers and heads (Kobayashi et al. 2020), ``[N]``."""
    rows, weights = target.positions, target.weights
    scores = torch.zeros(len(recorded.layers[0].before), dtype=torch.float64)
    for layer in recorded.layers:
        column_sums = (weights[None, None] @ layer.attention[:, rows]).squeeze(1)  # [H, N]
        projected = layer.projection.weight  # [H, d, D]
        # ||v W||^2 = v (W W^T) v^T, which never makes a vector of size D for each pair.
        gram = projected @ projected.transpose(1, 2)
        groups = layer.values.shape[1]
        values = layer.values.transpose(0, 1).repeat_interleave(len(gram) // groups, dim=0)
        norms = ((values @ gram) * values).sum(-1).clamp(min=0).sqrt()
        scores += (column_sums * norms).double().sum(0)
    return scores


def token_rows(recorded: RecordedForward, positions: Span) -> Tensor:
    """IFR (Ferrando & Voita 2024) of each of these tokens alone: ``[R, N]``, each row sums to 1.

    The same numbers as `proximity_scores` with one position at a time, for all positions at once.
    """
    rows, seen = slice(*positions), positions[1]
    length = len(recorded.layers[0].before)
    scores = torch.zeros(positions[1] - positions[0], length, dtype=torch.float64)
    for layer in recorded.layers:
        stream = layer.after[rows]
        tokens = _row_proximities(layer, rows, seen)
        residual = l1_proximity(layer.before[rows], stream)
        scores[:, :seen] += token_shares(tokens, tokens.sum(-1) + residual)
    return distributions(scores)


def _row_proximities(layer: LayerRecord, rows: slice, seen: int) -> Tensor:
    """``sum_h prox(alpha_ij v_j W_O^h)`` of every row with its own stream, ``[R, seen]``.

    As in `vllm_flashtrace.core.token_proximity`: the sum of ``t = sign(x) z`` is one product for
    each pair, pairs where it is not positive have no proximity, and only pairs that reach past zero
    in some coordinate, ``alpha_ij ||v_j|| ||W_O^h[:, i]|| > |x_i|``, need their vectors.
    """
    attention = layer.attention[:, rows, :seen].transpose(0, 1)  # [R, H, seen]
    weight, column_norms = layer.projection  # [H, d, D], [H, D]
    shared = len(weight) // layer.values.shape[1]
    values = layer.values[:seen].transpose(0, 1).repeat_interleave(shared, dim=0)  # [H, seen, d]
    stream = layer.after[rows]
    signs, size = torch.where(stream < 0, -1.0, 1.0), stream.abs()
    directions = torch.einsum("rD,hdD->hrd", signs, weight)
    totals = torch.bmm(directions, values.transpose(1, 2)).transpose(0, 1) * attention

    nearest = (size[:, None] / column_norms).nan_to_num(torch.inf).amin(-1)  # [R, H]
    reach = attention * torch.linalg.vector_norm(values, dim=-1) * _REACH_SLACK
    row, head, token = ((totals > 0) & (reach > nearest[..., None])).nonzero(as_tuple=True)
    contributions = values @ weight  # [H, seen, D]
    for part in torch.arange(len(row)).split(_TEMPORARY_FLOATS // stream.shape[1]):
        at = row[part], head[part], token[part]
        aligned = contributions[at[1], at[2]] * attention[at][:, None] * signs[at[0]]
        totals[at] -= 2 * (aligned - size[at[0]]).clamp_(min=0).sum(-1)
    return totals.clamp_(min=0).sum(1)


def distributions(rows: Tensor) -> Tensor:
    """Rows divided by their sums; a row without mass stays zero."""
    totals = rows.sum(-1, keepdim=True)
    return torch.where(totals > 0, rows / totals, torch.zeros_like(rows))


def compose(start: Tensor, units: Sequence[Span], rows: Sequence[Tensor]) -> Tensor:
    """Sends mass on units of the reasoning back to what comes before them, the last unit first.

    Args:
        start: float64 ``[N]``, mass that the target puts on every token.
        units: Ascending disjoint ranges of tokens.
        rows: float64 ``[N]`` of each unit: its scores. Mass that a unit gives to itself goes round
            until it has left, so only what comes before the unit counts.

    Returns:
        float64 ``[N]``, what has arrived at each token and was not sent on.
    """
    mass = start.clone()
    for (first, end), row in reversed(list(zip(units, rows, strict=True))):
        earlier = row[:first].sum()
        if earlier > 0:
            mass[:first] += mass[first:end].sum() * row[:first] / earlier
            mass[first:end] = 0
    return mass


def recursion(prepared: Prepared, hops: int, one_hop: OneHop) -> HopResult:
    """Hops from the target through the reasoning, with the attribution pass that is given."""
    length = len(prepared.token_ids)
    followed = torch.zeros(length, dtype=torch.bool)
    followed[slice(*prepared.reasoning)] = True
    target = TargetWeights.from_spans([prepared.target])
    steps = HopRecursion(target, prepared.prompt_length, length, followed, hops=hops)
    while (weights := steps.next_weights()) is not None:
        steps.add(one_hop(weights))
    return steps.result()
